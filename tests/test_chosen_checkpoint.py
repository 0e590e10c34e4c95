"""--checkpoint: which of a run's steps is evaluated or gone on from; and nothing is lost when a run
goes back."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_run import digest, lines, start

from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.horizon import Horizon


def run(workdir: Path, *argv: str) -> int:
    """The status of a run of twelve steps that keeps its commits of every fourth."""
    return start(workdir, *argv, keep=9, steps=12, eval_every=Horizon(4, "steps"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 0
    assert Checkpoints(folder).steps() == [4, 8, 12]
    return folder


@pytest.mark.parametrize("word", ["best", "8", "last"])
def test_the_step_that_is_evaluated(
    word: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished, "--eval_only", f"--checkpoint={word}") == 0
    best = Checkpoints(finished).best()
    step = {"best": best, "8": 8, "last": 12}[word]
    said = capsys.readouterr().out
    assert f"evaluated step {step}\n" in said
    [expected] = [
        line["loss"]
        for line in lines(finished)
        if (line["step"], line["split"]) == (step, "validation")
    ]
    assert f"{expected:.4f}" in said
    assert (finished / "metrics.jsonl").read_bytes() == before


REFUSED = [
    (
        "--checkpoint=7 --eval_only",
        "--checkpoint=7: no such checkpoint; {W}/checkpoints holds 4, 8, 12",
    ),
    ("--checkpoint=bst", "--checkpoint='bst': must be best, last or a step; did you mean 'best'?"),
    ("--checkpoint=08", "--checkpoint=08: must be best, last or a step"),
    (
        "--checkpoint=4",
        (
            "--checkpoint=4: going on from step 4 would replace the later steps 8, 12; add"
            " --rewind to set them aside, or take a new --workdir with --init_from={W}"
            " --init_checkpoint=4"
        ),
    ),
    ("--checkpoint=4 --resume=never", "--checkpoint=4 and --resume=never: cannot go together"),
    (
        "--rewind",
        "--rewind: goes on from an earlier step; give it with --checkpoint=best or a step",
    ),
    ("--checkpoint=4 --max_restarts=2", "--checkpoint=4: every restart would go back to it; drop"),
]


FOLLOWED: list[list[str]] = [
    ["--checkpoint=8 --eval_only"],
    ["--checkpoint=best --eval_only"],
    ["--checkpoint=8 --eval_only"],
    [
        "--checkpoint=4 --rewind",
        "--init_from={W} --init_checkpoint=4",
    ],
    ["--checkpoint=12", "--resume=never"],
    ["--checkpoint=4 --rewind"],
    ["--checkpoint=4 --rewind"],
]
"""What the lines of `REFUSED` say to write instead, in their order."""


@pytest.mark.parametrize(
    ("argv", "followed"),
    [(row[0], argv) for row, each in zip(REFUSED, FOLLOWED, strict=True) for argv in each],
)
def test_the_remedies_are_accepted(
    argv: str, followed: str, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    mended = followed.format(W=folder, tmp=tmp_path)
    assert mended != argv
    if "--init_from" in mended or "--resume" in mended:  # in a new workdir
        folder = tmp_path / "new"
    assert run(folder, *mended.split()) == 0


@pytest.mark.parametrize(("argv", "line"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused(
    argv: str, line: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(finished)
    assert run(finished, *argv.split()) == 2
    said = capsys.readouterr().err
    assert line.format(W=finished) in said and said.count("\n") == 1
    assert digest(finished) == before and Checkpoints(finished).steps() == [4, 8, 12]


def test_an_empty_folder_has_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", "--checkpoint=4") == 2
    line = f"--checkpoint=4: no committed checkpoint in {tmp_path}/run/checkpoints\n"
    assert capsys.readouterr().err.endswith(line)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_back_sets_the_later_steps_aside(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It repeats the steps to the same bits, and what was there before is whole elsewhere."""
    metrics, before = (finished / "metrics.jsonl").read_bytes(), digest(finished)
    old_lines = lines(finished)
    assert run(finished, "--checkpoint=4", "--rewind") == 0
    [place] = finished.glob("rewound-*")
    shown = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"back to step 4: steps 8, 12 and the metrics so far are in", shown)
    assert digest(finished) == before and lines(finished) == old_lines
    assert Checkpoints(finished).steps() == [4, 8, 12]
    assert Checkpoints(place).steps() == [8, 12] and digest(place) == before
    assert (place / "metrics.jsonl").read_bytes() == metrics
    record = json.loads((finished / "run.json").read_text())
    assert len(record["resumed"]) == 1
