"""Evaluation on the way: several sets by name, what the best is chosen by, early stopping, and a
user's own functions, all exact through kill and resume."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_resume import stopped
from test_run import digest, lines, start, wrong_at_start

from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.horizon import Horizon
from jaxtrain.optimizers import AdamW
from jaxtrain.train.selection import Standing, parse

SOURCE = Synthetic(
    shape=(4, 4, 1),
    num_classes=4,
    examples=120,
    test_examples=30,
    noise=0.5,
    train="train[:80%]",
    validation="train[80%:]",
)


def rotated() -> Arrays:
    """The test images, turned."""
    test = SOURCE.open().test
    assert test is not None and test.arrays is not None
    images = np.rot90(test.arrays["image"], axes=(1, 2)).copy()
    return Arrays.of({"image": images, "label": test.arrays["label"]}, train="train", test="")


def four_images(dtype: Any) -> Arrays:
    """A set of four blank images."""
    images = np.zeros((4, 4, 4, 1), dtype)
    return Arrays.of({"image": images, "label": np.arange(4)}, test="train")


def split_lines(folder: Path, split: str) -> list[dict[str, Any]]:
    """The lines of one set."""
    return [line for line in lines(folder) if line["split"] == split]


def test_several_sets_are_evaluated_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"rotated": rotated(), "seen": "train[:80%]"}
    assert start(tmp_path, evaluate=sets) == 0
    for name, size in (("rotated", 30), ("seen", 96)):
        found = split_lines(tmp_path, name)
        assert [line["step"] for line in found] == [0, 6, 12, 18, 24]
        # An exact mean over the set: a whole number of right answers.
        right = np.array([line["accuracy"] for line in found]) * size
        np.testing.assert_allclose(right, np.round(right), atol=1e-5)
    test = split_lines(tmp_path, "test")[-1]
    assert split_lines(tmp_path, "rotated")[-1]["accuracy"] != test["accuracy"]
    said = capsys.readouterr().out
    assert "30 rotated" in re.sub(r"[│\s]+", " ", said) and "step 24  rotated  accuracy" in said
    # The other lines are those of a run without further sets.
    other = tmp_path / "other"
    assert start(other, "--evaluate=also=test") == 0
    mine = [line for line in lines(tmp_path) if line["split"] not in sets]
    assert mine == [line for line in lines(other) if line["split"] != "also"]
    assert split_lines(other, "also")[-1] | {"split": "test"} == test
    assert start(other, "--eval_only", "--evaluate=also=test[:10]") == 0
    said = capsys.readouterr().out
    assert "step 24  also  accuracy" in said and "evaluation only" in said


REFUSED: list[tuple[str, str]] = [
    ("--evaluate=test=test", "--evaluate=test=...: is the name of another set; rename the set"),
    ("--evaluate=a=test,a=train", "--evaluate=a=...: is the name of another set; rename"),
    ("--evaluate=a/b=test", "--evaluate=a/b=...: use letters, digits, points, - and _; rename"),
    ("--evaluate=rotated", "--evaluate='rotated': 'rotated' is not NAME=SPLIT; expected e.g."),
    ("--evaluate=a=tset", "--evaluate=a='tset': unknown split 'tset'; valid: train, test"),
    (
        "--best=acuracy,max",
        "--best=acuracy,max: the task has no metric 'acuracy'; it has accuracy",
    ),
    (
        "--best=error",
        "--best=error: is more or less of it better? write error,min or error,max",
    ),
    (
        "--best=los",
        "--best=los: is more or less of it better? write los,min or los,max; did you",
    ),
    ("--best=loss,up", "--best=loss,up: 'up' is no direction; write loss,min or loss,max"),
    (
        "--best=rotatd/loss",
        "--best=rotatd/loss: 'rotatd' is not evaluated on the way; there is",
    ),
    ("--best=test/loss", "--best=test/loss: 'test' is not evaluated on the way; there is"),
    (
        "--stop_after=5steps",
        "--stop_after='5steps': not a number of evaluations; expected e.g.",
    ),
    ("--stop_after=0", "--stop_after=0: not a number of evaluations; expected e.g. 5evals"),
    (
        "--stop_after=5 --eval_every=0",
        "--stop_after=5 and --eval_every=0: nothing is evaluated",
    ),
    ("--stop_after=5 --data.validation=", "--stop_after=5: no validation split tells whether"),
]
FOLLOWED: list[str] = [
    "--evaluate=other=test",
    "--evaluate=a=test,b=train",
    "--evaluate=a.b=test",
    "--evaluate=rotated=test[:50%]",
    "--evaluate=a=test",
    "--best=accuracy,max",
    "--best=error,min",
    "--best=loss",
    "--best=loss,min",
    "--best=validation/loss",
    "--best=validation/loss",
    "--stop_after=5evals",
    "--stop_after=5evals",
    "--stop_after=5 --eval_every=6",
    "--stop_after=5 --data.validation= --evaluate=held=train[80%:] --best=held/loss",
]
"""What the lines of `REFUSED` say to write instead, in their order."""
NEXT = {
    "--best=error,min": "--best=error,min: the task has no metric 'error'; it has accuracy, loss",
}
"""What shows as wrong then, where something does."""


@pytest.mark.parametrize(
    ("arguments", "followed"),
    [(wrong, followed) for (wrong, _), followed in zip(REFUSED, FOLLOWED, strict=True)],
)
def test_the_remedies_are_accepted(arguments: str, followed: str, tmp_path: Path) -> None:
    assert followed != arguments
    assert wrong_at_start(tmp_path / "run", *followed.split()) == NEXT.get(followed, "")


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_what_cannot_be_evaluated_is_one_line(
    arguments: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", *arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jaxtrain: error: {line}") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "words", "followed"),
    [
        (
            Synthetic(shape=(5, 5, 1), num_classes=4, examples=40),
            "--evaluate=odd=Synthetic: ",
            Synthetic(shape=(4, 4, 1), num_classes=4, examples=40),
        ),
        (
            four_images(np.float32),
            "--evaluate=odd=Arrays: image is uint8 in train and float32 in odd; save both in one",
            four_images(np.uint8),
        ),
        (
            3,
            "evaluate={'odd': int}: give a split of the data as text, or a data source",
            "test",
        ),
    ],
)
def test_a_set_that_does_not_fit_is_found_out_before_training(
    source: Any, words: str, followed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", evaluate={"odd": source}) == 2
    assert capsys.readouterr().err.startswith(f"jaxtrain: error: {words}")
    assert wrong_at_start(tmp_path / "run", evaluate={"odd": followed}) == ""


def test_standings_and_directions() -> None:
    values = {"validation": {"error": 3.0, "accuracy": 0.5, "loss": 2.0}, "b": {"loss": 1.0}}
    for text, score in (
        ("error,min", -3.0),
        ("error,max", 3.0),
        ("accuracy", 0.5),
        ("b/loss", -1.0),
    ):
        assert parse(text, ["validation", "b"], lambda _: 0.0).of(values) == score
    standing, best, since = Standing(), -np.inf, 0
    for score in np.random.default_rng(0).integers(0, 9, 40).astype(float):
        standing = standing.after(score)
        since = 0 if score > best else since + 1
        best = max(best, score)
        assert (standing.best, standing.since) == (best, since)


def test_the_best_is_that_of_the_metric_asked_for(tmp_path: Path) -> None:
    options = ["--best=seen/loss,max", "--keep=1", "--eval_every=2"]
    assert start(tmp_path, *options, evaluate={"seen": "train[:80%]"}) == 0
    found = split_lines(tmp_path, "seen")[1:]  # nothing is committed before the first step
    losses = {line["step"]: line["loss"] for line in found}
    best = Checkpoints(tmp_path).best()
    assert best is not None and losses[best] == max(losses.values())
    assert max(losses.values()) < split_lines(tmp_path, "seen")[0]["loss"]


# Trains until it is no better: at this rate the loss soon goes up again.
WORSE = {"eval_every": Horizon(2, "steps"), "steps": 60, "checkpoint_every": Horizon(50, "steps")}
STOP = ["--stop_after=3evals", "--best=loss", "--optimizer.learning_rate=0.3", "--ema_decay=none"]


def expected_end(folder: Path, patience: int) -> int:
    """Where early stopping ends, by the lines of a run without it."""
    best, since = np.inf, 0
    for line in split_lines(folder, "validation")[1:]:
        since = 0 if line["loss"] < best else since + 1
        best = min(best, line["loss"])
        if since == patience:
            return line["step"]
    raise AssertionError("it always got better")


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended early."""
    folder = tmp_path_factory.mktemp("early") / "run"
    assert start(folder, *STOP, **WORSE) == 0
    return folder


def test_a_run_that_gets_no_better_ends(
    early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "whole", *STOP[1:], **WORSE) == 0
    end = expected_end(tmp_path / "whole", 3)
    assert end < 60
    found = lines(early)
    assert found[-1]["step"] == end and found[-1]["split"] == "test"
    same = [line for line in lines(tmp_path / "whole") if line["step"] <= end]
    assert [line for line in found if line["split"] != "test"] == same
    assert Checkpoints(early).steps()[-1] == end
    before = sorted(path.stat().st_mtime_ns for path in (early / "checkpoints").rglob("*"))
    capsys.readouterr()
    assert start(early, *STOP, **WORSE) == 0
    assert (
        f"--stop_after=3evals: ended at step {end}, after 3 evaluations that were no better;"
        " nothing to do, raise or drop it to go on\n"
    ) in capsys.readouterr().out
    assert before == sorted(path.stat().st_mtime_ns for path in (early / "checkpoints").rglob("*"))


def test_more_patience_goes_on(early: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(early, tmp_path / "run"))
    end = lines(folder)[-1]["step"]
    assert start(folder, "--stop_after=4evals", *STOP[1:], **WORSE) == 0
    assert lines(folder)[-1]["step"] > end


@pytest.mark.parametrize("back", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_early_stopping_is_exact_through_a_signal(
    back: int,
    early: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the signal comes at the very evaluation that ends the run."""
    end = lines(early)[-1]["step"]
    options: dict[str, Any] = WORSE | {"stop_after": "3evals", "best": "loss", "ema_decay": None}
    options["optimizer"] = AdamW(learning_rate=0.3, weight_decay=0.01)
    folder = tmp_path / "run"
    assert stopped(folder, monkeypatch, step=end - back, **options) == 75
    assert start(folder, **options) == 0
    assert lines(folder) == lines(early)
    assert digest(folder) == digest(early)
    best = Checkpoints(folder).best()
    assert best == Checkpoints(early).best() and best is not None
    assert "ended at step" in capsys.readouterr().out


def test_early_stopping_is_exact_through_a_kill(tmp_path: Path) -> None:
    """A kill before the last commits leaves an earlier one, and lines that are cut back."""
    often = WORSE | {"checkpoint_every": Horizon(3, "steps")}
    assert start(tmp_path / "whole", *STOP, "--keep=99", **often) == 0
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    for step in Checkpoints(folder).steps()[-2:]:
        shutil.rmtree(folder / "checkpoints" / str(step))
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9')
    assert start(folder, *STOP, "--keep=99", **often) == 0
    assert lines(folder) == lines(tmp_path / "whole")
    assert digest(folder) == digest(tmp_path / "whole")


def test_sets_alone_are_enough(tmp_path: Path) -> None:
    flags = [
        "--data.validation=",
        "--evaluate=held=train[80%:]",
        "--eval_every=12",
        "--best=held/loss",
    ]
    assert start(tmp_path, *flags, "--stop_after=9") == 0
    assert [line["step"] for line in split_lines(tmp_path, "held")] == [0, 12, 24]
    assert Checkpoints(tmp_path).best() == 24


def test_the_best_is_exact_through_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal at the evaluation that is the best puts it off; its commit gets its score later."""
    options = {
        "eval_every": Horizon(2, "steps"),
        "checkpoint_every": Horizon(50, "steps"),
        "steps": 12,
    }
    assert start(tmp_path / "whole", **options) == 0
    best = Checkpoints(tmp_path / "whole").best()
    assert best is not None
    assert stopped(tmp_path / "run", monkeypatch, step=best, **options) == 75
    assert start(tmp_path / "run", **options) == 0
    assert Checkpoints(tmp_path / "run").best() == best
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert not [
        path for path in (tmp_path / "run" / "checkpoints").iterdir() if "damaged" in path.name
    ]


def test_own_functions_get_the_state_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[Any] = []
    evaluations: list[tuple[int, dict[str, float]]] = []

    def at_step(step: int, state: Any, metrics: Any) -> None:
        assert int(state.step) == step
        kept.append((step, state, dict(metrics)))
        metrics.clear()
        jax.jit(lambda x: x, donate_argnums=0)(state.params)  # theirs to spoil
        np.random.seed(step)
        if step == 10:
            raise KeyError("my own mistake")

    def at_evaluation(step: int, state: Any, metrics: Any) -> None:
        evaluations.append((step, dict(metrics)))
        raise SystemExit(3)

    assert start(tmp_path / "run", at_step=at_step, at_evaluation=at_evaluation) == 0
    assert start(tmp_path / "plain") == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "plain")
    assert digest(tmp_path / "run") == digest(tmp_path / "plain")
    train = split_lines(tmp_path / "run", "train")
    assert [step for step, _, _ in kept] == [line["step"] for line in train] == [5, 10, 15, 20, 24]
    assert [metrics["loss"] for _, _, metrics in kept] == [line["loss"] for line in train]
    validation = split_lines(tmp_path / "run", "validation")
    assert [step for step, _ in evaluations] == [0, 6, 12, 18, 24, 24]
    assert evaluations[1][1]["validation/loss"] == validation[1]["loss"]
    assert list(evaluations[-1][1]) == ["test/accuracy", "test/loss"]
    assert int(kept[0][1].step) == 5  # still there after the next steps
    said = capsys.readouterr()
    assert said.err.count("at_step: step 10: KeyError: 'my own mistake'") == 1
    assert said.err.count("at_evaluation: step 0: SystemExit: 3") == 1
    assert "failed 1 of 5 times" in said.out and "failed 6 of 6 times" in said.out


def test_what_is_no_function_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path / "run", at_step=3) == 2
    assert (
        "at_step=3: is a int; give a function of (step, state, metrics)" in capsys.readouterr().err
    )
    assert wrong_at_start(tmp_path / "run", at_step=lambda step, state, metrics: None) == ""
