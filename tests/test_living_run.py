"""What looks at a run from outside harms nothing and takes nothing for damage: a run that goes on
while it is verified, reports beside a user's own files, paths a folder too deep."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from test_checkpoint import LOOP, digest, filled, small
from test_report import full_lines, make_run

from jaxtrain.checkpoints import committed, manifest
from jaxtrain.checkpoints.checkpoints import Checkpoints, verify_command
from jaxtrain.cli import main as cli_main
from jaxtrain.errors import UserError
from jaxtrain.report.page.html import write_report


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_commits_often_is_not_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = filled(tmp_path, (1, 2), keep=1)
    ended, failed = threading.Event(), []

    def commit() -> None:
        try:
            for step in range(3, 30):
                checkpoints.save(step, small(step), LOOP, wait=True)
        except Exception as error:  # noqa: BLE001 - said by the test below
            failed.append(error)
        ended.set()

    thread = threading.Thread(target=commit)
    thread.start()
    statuses = []
    while not ended.is_set():
        statuses.append(verify_command(tmp_path))
    thread.join()
    said = capsys.readouterr()
    assert not failed and statuses and set(statuses) == {0}, said
    assert "damaged" not in said.out and said.err == ""


@pytest.mark.parametrize("when", ["verifying", "digesting"])
def test_a_step_that_goes_while_it_is_read_is_gone(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, (4, 5))
    folder = checkpoints.folder / "5"
    if when == "verifying":
        problems = manifest.problems

        def vanishing(path: Path) -> list[str]:
            if path == folder:
                shutil.rmtree(folder)
            return problems(path)

        monkeypatch.setattr(manifest, "problems", vanishing)
    else:
        of = Checkpoints.digest

        def digest_of(self: Checkpoints, step: int) -> str:
            shutil.rmtree(folder, ignore_errors=True)
            return of(self, step)

        monkeypatch.setattr(Checkpoints, "digest", digest_of)
    assert verify_command(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"digest {digest(small(4))}"


def test_resuming_from_a_living_run_passes_over_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = filled(tmp_path, (4, 5))
    verify = committed.verify

    def vanishing(folder: Path, step: int) -> list[str]:
        if step == 5:
            shutil.rmtree(folder / "5", ignore_errors=True)
        return verify(folder, step)

    monkeypatch.setattr(committed, "verify", vanishing)
    assert checkpoints.newest_verified(pytest.fail) == 4


def test_verify_says_whose_digest_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = filled(tmp_path, (75, 80))
    (checkpoints.folder / "80" / "COMMIT").unlink()
    assert verify_command(tmp_path) == 74
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "step 75 is the newest whole one (80 damaged); its digest:",
        f"digest {digest(small(75))}",
    ]


def test_a_path_one_folder_too_deep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = filled(tmp_path, (4, 5)).folder
    for path, what in ((folder, "the folder of the checkpoints"), (folder / "5", "a checkpoint")):
        with pytest.raises(UserError) as error:
            Checkpoints(path)
        assert str(error.value) == f"{path}: is {what}; give the workdir, {tmp_path}"
    assert cli_main(["verify", str(folder)]) == 2
    assert "give the workdir" in capsys.readouterr().err
    assert Checkpoints(tmp_path).steps() == [4, 5]  # the remedy
    assert cli_main(["verify", str(tmp_path)]) == 0
    # A workdir may have any name.
    assert filled(tmp_path / "other" / "checkpoints", (1,)).steps() == [1]


def own_files(folder: Path) -> dict[str, bytes]:
    """A user's report.html and plots."""
    (folder / "plots").mkdir()
    (folder / "report.html").write_text("<p>my own</p>")
    (folder / "plots" / "loss.png").write_bytes(b"my own picture")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_reports_leave_other_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(make_run(tmp_path / name, full_lines(5))) for name in ("a", "b")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = own_files(Path())
    assert cli_main(["report", *runs]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == os.path.join("comparison", "report.html")
    assert {name: content for name, content in contents(Path()).items() if name in before} == before
    assert cli_main(["report", *runs]) == 0  # its own may be written over
    for folder in (".", "taken"):
        if folder == "taken":
            shutil.copytree("plots", "taken/plots")
        there = contents(Path())
        assert cli_main(["report", *runs, f"--out={folder}"]) == 2
        assert "not made by jaxtrain" in capsys.readouterr().err
        assert contents(Path()) == there
    assert cli_main(["report", *runs, "--out", "new"]) == 0
    # Plots of ours without the page are ours still.
    os.remove("new/report.html")
    assert cli_main(["report", *runs, "--out=new"]) == 0
    assert cli_main(["report", runs[0]]) == 0 and (tmp_path / "a" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "line", "followed"),
    [
        (
            ["--out"],
            "report --out: needs a folder, e.g. --out=comparison",
            ["--out=comparison"],
        ),
        (
            ["--out="],
            "report --out: needs a folder, e.g. --out=comparison",
            ["--out=comparison"],
        ),
        (["--out=a", "--out=b"], "report --out: is given twice; give it once", ["--out=b"]),
        (["--format=pdf"], "report: unknown flag --format=pdf; it takes none but --out", []),
    ],
)
def test_flags_of_report(
    arguments: list[str],
    line: str,
    followed: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what the line says, done."""
    run = str(make_run(tmp_path / "a", full_lines(5)))
    assert cli_main(["report", run, *arguments]) == 2
    assert capsys.readouterr().err == f"jaxtrain: error: {line}\n"
    monkeypatch.chdir(tmp_path)
    assert cli_main(["report", run, *followed]) == 0


def test_a_run_with_a_page_of_its_owner_still_ends_well(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", full_lines(5))
    (folder / "report.html").write_text("mine")
    with pytest.raises(UserError, match="was not made by jaxtrain and is left alone"):
        write_report([folder])
    assert (folder / "report.html").read_text() == "mine"
