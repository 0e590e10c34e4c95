"""Notes on numbers far outside the usual range: what they say, and that what is usual is not
remarked upon."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from test_run import start, toy

from jaxtrain import optimizers
from jaxtrain.models import MLP
from jaxtrain.optimizers import AdamW
from jaxtrain.runner import build, unusual
from jaxtrain.tasks import Classification

ROOT = Path(__file__).resolve().parent.parent


def notes(**changes: Any) -> list[str]:
    """What is said of the toy run with these changes: 96 examples, 24 steps of 16."""
    run = toy(**changes)
    return unusual.notes(run, 24)


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


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_no_optimizer_is_unusual_by_itself(name: str) -> None:
    assert notes(optimizer=optimizers.NAMES[name]) == []


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_no_experiment_is_unusual(path: Path) -> None:
    run = runpy.run_path(str(path))["experiment"]()
    assert unusual.notes(build.accepted(run), 2000) == []


def test_a_note_is_shown_once_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", "--clip_norm=1e-6", "--steps=4", "--eval_every=2") == 0
    line = "--clip_norm=1e-6: nearly every gradient is scaled down to it; usual is 0.1 to 10"
    assert capsys.readouterr().err == f"jaxtrain: warning: {line}\n"
