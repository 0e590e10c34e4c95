"""Files of flags: what they may hold, what overrides what, and a line with file and number for each
mistake."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from test_bad_inputs import toy_run
from test_remedies import outcome

from jaxtrain.config import flagfile, flags, record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files of flags, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**files: str) -> None:
    """Writes `name="text"` into name.flags."""
    for name, text in files.items():
        Path(f"{name}.flags").write_text(text, encoding="utf-8")


@pytest.mark.usefixtures("here")
def test_flags_from_a_file() -> None:
    write(
        a="# what the paper says\n\n--steps=7\n  --optimizer=sgd  \r\n// more\n"
        "--optimizer.momentum=0.5\n--noreport\n--model.widths=3,4\n"
    )
    for form in (["--flagfile=a.flags"], ["--flagfile", "a.flags"], ["-flagfile=a.flags"]):
        run = flags.parse(toy_run(), form)
        assert (run.steps, run.optimizer.momentum, run.report) == (7, 0.5, False)
        assert run.model.widths == (3, 4)


@pytest.mark.usefixtures("here")
def test_what_comes_later_overrides_a_file() -> None:
    write(base="--steps=7\n--seed=1\n--report\n", more="--flagfile=base.flags\n--seed=2\n")
    run = flags.parse(toy_run(), ["--flagfile=more.flags", "--noreport", "--epochs=3"])
    assert (run.seed, run.report, run.steps, run.epochs) == (2, False, None, 3.0)
    # of two files, the later
    write(other="--seed=5\n")
    assert flags.parse(toy_run(), ["--flagfile=more.flags", "--flagfile=other.flags"]).seed == 5
    assert flags.parse(toy_run(), ["--flagfile=other.flags", "--flagfile=more.flags"]).seed == 2


@pytest.mark.usefixtures("here")
def test_a_file_repeats_another_part_and_the_command_line_another() -> None:
    write(a="--optimizer=sgd\n--optimizer.learning_rate=0.5\n")
    run = flags.parse(toy_run(), ["--flagfile=a.flags", "--optimizer=adamw"])
    assert (type(run.optimizer).__name__, run.optimizer.learning_rate) == ("Adam", 0.5)


@pytest.mark.usefixtures("here")
def test_with_from_run() -> None:
    earlier = flags.parse(toy_run(), ["--seed=3", "--steps=9", "--batch_size=8"])
    Path("run").mkdir()
    text = json.dumps({"name": "toy", "config": record.to_json(earlier)})
    Path("run/run.json").write_text(text, encoding="utf-8")
    write(a="--from_run=run\n--seed=4\n")
    run = flags.parse(toy_run(), ["--flagfile=a.flags", "--steps=5"])
    assert (run.seed, run.steps, run.batch_size) == (4, 5, 8)
    # and the other way round: a file beside the run that is repeated
    write(b="--seed=6\n")
    run = flags.parse(toy_run(), ["--from_run=run", "--flagfile=b.flags"])
    assert (run.seed, run.steps, run.batch_size) == (6, 9, 8)


BAD = {
    "--batch_sise=3": "a.flags:2: unknown flag --batch_sise; did you mean --batch_size?",
    "--fp16": "a.flags:2: unknown flag --fp16; write --precision=fp16",
    "--batch_size=abc": "a.flags:2: --batch_size='abc': must be an integer >= 1",
    "--batch_size": "a.flags:2: --batch_size: needs a value, e.g. --batch_size=32",
    "--optimizer=adamW": "a.flags:2: --optimizer='adamW': unknown; valid: adam, adamw, sgd; did you"
    " mean 'adamw'?",
    "--microbatches=3": "a.flags:2: --microbatches=3: must divide --batch_size=32; nearest: 2 or 4",
    "--seed=1\n--seed=2": "a.flags:3: --seed is given twice, as 1 and 2; give it once",
    "--noeval_only=true": "a.flags:2: --noeval_only: takes no value; write --noeval_only, or"
    " --eval_only=true|false",
    "batch_size: 32": "a.flags:2: 'batch_size: 32' is no flag; write --batch_size=32",
    "batch_size = 32": "a.flags:2: 'batch_size = 32' is no flag; write --batch_size=32",
    'mesh = "data:2"': "a.flags:2: 'mesh = \"data:2\"' is no flag; write --mesh=data:2",
    "[train]": "a.flags:2: is no flag; write one flag a line, --name=value",
    "train": "a.flags:2: is no flag; write one flag a line, --name=value",
    "{": "a.flags:2: is no flag; write one flag a line, --name=value",
    "--batch_size 32": "a.flags:2: '--batch_size 32' holds blanks; write --batch_size=32",
    "--batch_size = 32": "a.flags:2: '--batch_size = 32' holds blanks; write --batch_size=32",
    "--steps=3 --seed=1": "a.flags:2: '--steps=3 --seed=1' holds several flags; write one a line",
    "--steps=3  # few": "a.flags:2: a comment needs a line of its own; write --steps=3",
    '--mesh="data:2"': "a.flags:2: quotes are part of a value here; write --mesh=data:2",
    "--": "a.flags:2: '--' has no meaning in a file of flags; remove it",
    "--flagfile=a.flags": "a.flags:2: --flagfile=a.flags: includes itself",
    "--flagfile=b.flags": "a.flags:2: --flagfile=b.flags: no such file; in .: a.flags; did you"
    " mean it?",
    "--flagfile=": "a.flags:2: --flagfile: needs a value, e.g. --flagfile=FILE",
    "--flagfile": "a.flags:2: --flagfile: needs a value, e.g. --flagfile=FILE",
}
"""Wrong lines, below a comment, and what is said of them."""


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("text", BAD)
def test_a_wrong_line(text: str) -> None:
    write(a=f"# mine\n{text}\n")
    assert outcome(["--flagfile=a.flags"], toy_run()) == BAD[text]


REMEDY = re.compile(r"write (--[^;,]*)$|did you mean (--\w+)\?|nearest: (\d+)")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("text", [text for text in BAD if REMEDY.search(BAD[text])])
def test_a_wrong_line_after_its_remedy(text: str) -> None:
    match = REMEDY.search(BAD[text])
    assert match
    line = match[1] or (f"{match[2]}=4" if match[2] else f"{text.partition('=')[0]}={match[3]}")
    write(a=f"# mine\n{line}\n")
    assert outcome(["--flagfile=a.flags"], toy_run()) is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--flagfile=", "--flagfile: needs a value, e.g. --flagfile=FILE"),
        ("--flagfile", "--flagfile: needs a value, e.g. --flagfile=FILE"),
        ("--flagfile --seed=1", "--flagfile: needs a value, e.g. --flagfile=FILE"),
        ("--flagfile=c.flags", "--flagfile=c.flags: no such file; in .: b.flags; did you mean it?"),
        ("--flagfile=folder", "--flagfile=folder: is a directory, not a file of flags"),
        ("--flagfile=large", "--flagfile=large: is larger than 1.0 MB; no flags"),
        ("--flagfile=latin", "latin:2: not valid UTF-8"),
        ("--flagfiles=b.flags", "unknown flag --flagfiles; did you mean --flagfile?"),
        # a flag before the file is not overridden in silence
        (
            "--seed=1 --flagfile=b.flags",
            "b.flags:1: --seed is given twice, as 1 and 2; give it once",
        ),
        # the rest of the command line has no place
        ("--flagfile=b.flags --keep=0", "--keep=0: must be >= 1"),
        ("-- --seed=1", "unexpected argument '--seed=1'; flags stand before --, which ends them;"
        + " remove it"),
    ],
)  # fmt: skip
def test_a_wrong_file(arguments: str, line: str, here: Path) -> None:
    write(b="--seed=2\n")
    (here / "folder").mkdir()
    (here / "large").write_bytes(b"#" * (flagfile.LARGEST + 1))
    (here / "latin").write_bytes(b"--seed=1\n--name=\xe9\n")
    assert outcome(arguments.split(), toy_run()) == line


@pytest.mark.usefixtures("here")
def test_a_file_names_another_and_its_line_is_told() -> None:
    write(a="--flagfile=b.flags\n", b="\n\n--seed=-1\n")
    assert outcome(["--flagfile=a.flags"], toy_run()) == (
        "b.flags:3: --seed=-1: must be 0..4294967295"
    )
    write(a="--flagfile=b.flags\n", b="--flagfile=a.flags\n")
    assert outcome(["--flagfile=a.flags"], toy_run()) == (
        "b.flags:1: --flagfile=a.flags: includes itself"
    )


@pytest.mark.usefixtures("here")
def test_a_secret_in_a_file_is_not_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(a="--task.logger_token=abc\n")
    assert flags.parse(toy_run(), ["--flagfile=a.flags"]).task.logger_token == "abc"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("here")
def test_traceback_from_a_file() -> None:
    write(a="--traceback\n")
    assert flags.wants_traceback(["--flagfile=a.flags"])
    assert not flags.wants_traceback(["--flagfile=missing"])


@pytest.mark.usefixtures("here")
def test_the_page_on_flags_shows_a_file_that_works() -> None:
    """The file and the commands of docs/flags.md, as they stand there."""
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    section = text.split("## A file of flags")[1].split("\n## ")[0]
    found = re.findall(r"`([\w.]+\.flags)`:\n\n```text\n(.*?)```", section, re.DOTALL)
    assert len(found) == 2
    for name, content in found:
        Path(name).write_text(content, encoding="utf-8")
    run = runpy.run_path(str(ROOT / "experiments" / "digits.py"))["experiment"]()
    [commands] = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    parsed = [flags.parse(run, shlex.split(line)[2:]) for line in commands.strip().split("\n")]
    said = [(each.steps, each.epochs, each.seed, each.optimizer.learning_rate) for each in parsed]
    assert said == [(None, 20.0, 1, 0.001), (300, None, 2, 0.001)]
