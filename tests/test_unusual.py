"""Notes on numbers far outside the usual range: what they say, and that what is usual is not
remarked upon."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from test_run import start, toy

from jaxtrain import optimizers, schedules
from jaxtrain.horizon import Horizon
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD, AdamW, Lion
from jaxtrain.runner import build, unusual
from jaxtrain.tasks import Classification

ROOT = Path(__file__).resolve().parent.parent


def notes(**changes: Any) -> list[str]:
    """What is said of the toy run with these changes: 96 examples, 24 steps of 16."""
    run = toy(**changes)
    return unusual.notes(run, build.lengths(run, 96))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        (
            {"profile_steps": (20, 30)},
            ["--profile_steps=20,30: the run has 24 steps; the trace ends with it"],
        ),
        (
            {"optimizer": AdamW(learning_rate=0.05, weight_decay=10.0)},
            [
                "--optimizer.weight_decay=10: times the learning rate 0.05 it takes 0.5 of a"
                + " weight in every step; usual is below 0.01"
            ],
        ),
        # shares
        (
            {"clip_norm": 1e-6},
            [
                "--clip_norm=1e-6: nearly every gradient is scaled down to it; usual is 0.1"
                + " to 10"
            ],
        ),
        (
            {"task": Classification(label_smoothing=0.9)},
            ["--task.label_smoothing=0.9: is a share of 1; usual is at most 0.5"],
        ),
        (
            {"model": MLP(num_classes=4, dropout=0.95)},
            ["--model.dropout=0.95: is a share of 1; usual is at most 0.8"],
        ),
    ],
)
def test_notes(changes: dict[str, Any], lines: list[str]) -> None:
    assert notes(**changes) == lines


@pytest.mark.parametrize(
    ("optimizer", "count"),
    [
        (AdamW(), 0),
        (AdamW(learning_rate=0.1), 0),
        (AdamW(learning_rate=0.5), 1),
        (AdamW(learning_rate=1e-6), 0),
        (AdamW(learning_rate=1e-8), 1),
        (SGD(learning_rate=10.0), 0),
        (SGD(learning_rate=50.0), 1),
        (Lion(learning_rate=0.1), 1),
        (optimizers.NAMES["prodigy"], 0),
    ],
)
def test_rates_far_from_the_usual_get_a_line(optimizer: Any, count: int) -> None:
    assert len(notes(optimizer=optimizer)) == count


def test_what_is_said_of_a_rate() -> None:
    steep = SGD(learning_rate=99.0)
    assert notes(optimizer=steep) == [
        "--optimizer.learning_rate=99: 990 times the usual 0.1 of SGD, which mostly diverges"
    ]
    # The function may give the rates, and 99 a factor of them.
    assert notes(optimizer=steep, schedule=schedules.of(lambda step: 1.0)) == []


def test_horizons_beyond_the_run_get_a_line() -> None:
    beyond = {"eval_every": 500, "checkpoint_every": 25, "keep_every": 1000}
    assert notes(**{name: Horizon(steps) for name, steps in beyond.items()}) == [
        "--eval_every=500steps: the run has 24 steps; evaluated at its end only",
        "--checkpoint_every=25steps: the run has 24 steps; committed at its end only",
        "--keep_every=1000steps: the run has 24 steps; no checkpoint is kept for ever",
    ]
    assert notes(eval_every=Horizon(24), checkpoint_every=Horizon(0)) == []


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_no_optimizer_is_unusual_by_itself(name: str) -> None:
    assert notes(optimizer=optimizers.NAMES[name]) == []


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_no_experiment_is_unusual(path: Path) -> None:
    run = runpy.run_path(str(path))["experiment"]()
    assert unusual.notes(build.accepted(run), build.lengths(run, 10**6)) == []


def test_a_note_is_shown_once_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", "--clip_norm=1e-6", "--steps=4", "--eval_every=2") == 0
    line = "--clip_norm=1e-6: nearly every gradient is scaled down to it; usual is 0.1 to 10"
    assert capsys.readouterr().err == f"jaxtrain: warning: {line}\n"
