"""Notes on horizons beyond the run and on numbers far outside the usual range: what they say, and
that what is usual is not remarked upon."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
from test_run import start, toy

from jaxtrain import optimizers
from jaxtrain.horizon import Horizon
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD, AdamW
from jaxtrain.runner import build, unusual
from jaxtrain.tasks import Classification

ROOT = Path(__file__).resolve().parent.parent


def notes(**changes: Any) -> list[str]:
    """What is said of the toy run with these changes: 96 examples, 24 steps of 16."""
    run = toy(**changes)
    return unusual.notes(run, build.lengths(run, 96), validation=True)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        # horizons
        (
            {"checkpoint_every": Horizon(5000)},
            [
                "note: --checkpoint_every=5000steps: the run ends at step 24; its end alone is"
                + " committed"
            ],
        ),
        ({"checkpoint_every": Horizon(24)}, []),
        (
            {"checkpoint_every": Horizon(5, "epochs")},
            [
                "note: --checkpoint_every=5epochs: the run ends at step 24; its end alone is"
                + " committed"
            ],
        ),
        (
            {"eval_every": Horizon(25)},
            [
                "note: --eval_every=25steps: the run ends at step 24; the validation split is"
                + " evaluated at its end alone"
            ],
        ),
        ({"steps": 3, "eval_every": Horizon(1, "epochs"), "checkpoint_every": Horizon(3)}, []),
        (
            {"keep_every": Horizon(1000)},
            [
                "note: --keep_every=1000steps: the run ends at step 24; no checkpoint is kept for"
                + " ever"
            ],
        ),
        (
            {"profile_steps": (20, 30)},
            ["note: --profile_steps=20,30: the run ends at step 24, and the trace with it"],
        ),
        # rates
        ({"optimizer": AdamW(learning_rate=0.1, weight_decay=0.0)}, []),
        (
            {"optimizer": AdamW(learning_rate=30.0, weight_decay=0.0)},
            [
                "note: --optimizer.learning_rate=30: is 3e+04 times above 1e-3, the default of"
                + " AdamW"
            ],
        ),
        (
            {"optimizer": SGD(learning_rate=1e-12)},
            ["note: --optimizer.learning_rate=1e-12: is 1e+11 times below 0.1, the default of SGD"],
        ),
        (
            {"optimizer": AdamW(learning_rate=0.05, weight_decay=10.0)},
            [
                "note: --optimizer.weight_decay=10: times the learning rate 0.05 takes 0.5 of a"
                + " weight in every step; usual is below 0.01"
            ],
        ),
        # shares
        (
            {"clip_norm": 1e-6},
            [
                "note: --clip_norm=1e-6: nearly every gradient is scaled down to it; usual is 0.1"
                + " to 10"
            ],
        ),
        (
            {"task": Classification(label_smoothing=0.9)},
            ["note: --task.label_smoothing=0.9: is a share of 1; usual is at most 0.5"],
        ),
        (
            {"model": MLP(num_classes=4, dropout=0.95)},
            ["note: --model.dropout=0.95: is a share of 1; usual is at most 0.8"],
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
    run = dataclasses.replace(run, epochs=None, steps=run.steps or 2000)
    assert unusual.notes(run, build.lengths(run, 50_000), validation=True) == []


def test_a_note_is_shown_once_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", "--checkpoint_every=5000", "--steps=2") == 0
    said = capsys.readouterr()
    line = "note: --checkpoint_every=5000steps: the run ends at step 2; its end alone is committed"
    assert said.out.count(line) == 1 and said.err == ""
