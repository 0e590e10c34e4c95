"""The trip of one batch: the walk that README prints is real, and it is short."""

import importlib
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

import jaxtrain
from jaxtrain import schedules
from jaxtrain.data.sources.synthetic import Synthetic
from jaxtrain.models import MLP
from jaxtrain.optimizers import AdamW
from jaxtrain.runner import main as runner_main
from jaxtrain.tasks import Classification
from jaxtrain.train import feeds

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "jaxtrain"
MOST_FILES = 8


def walk() -> list[str]:
    """The dotted names of README's walk."""
    text = (ROOT / "README.md").read_text()
    block = text.split("## The trip of one batch")[1].split("```text")[1].split("```")[0]
    return re.findall(r"^ *([\w.]+)  ", block, re.MULTILINE)


def test_each_name_of_the_walk_is_a_real_function() -> None:
    names = walk()
    assert len(names) > 8
    for name in names:
        parts = name.split(".")
        found: Any = importlib.import_module(f"jaxtrain.{parts[0]}.{parts[1]}")
        for part in parts[2:]:
            found = getattr(found, part)
        assert callable(found), name


def test_from_main_to_the_update_of_the_optimizer_in_eight_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of ours that is on the stack when the optimizer's update is traced, and when the
    feed dispatches a step."""
    seen: dict[str, None] = {}

    def noting(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            for frame in traceback.extract_stack():
                path = Path(frame.filename)
                if path.is_relative_to(HOUSE):
                    seen.setdefault(str(path.relative_to(HOUSE)))
            return method(*arguments, **options)

        return call

    transform = AdamW.transform

    def transforming(self: AdamW, *arguments: Any, **options: Any) -> Any:
        made = transform(self, *arguments, **options)
        return made._replace(update=noting(made.update))

    monkeypatch.setattr(AdamW, "transform", transforming)
    monkeypatch.setattr(feeds.ResidentFeed, "advance", noting(feeds.ResidentFeed.advance))
    run = jaxtrain.Run(
        name="toy",
        model=MLP(num_classes=3, widths=(4,)),
        data=Synthetic(shape=(2, 2, 1), examples=32, test_examples=8, num_classes=3),
        task=Classification(),
        optimizer=AdamW(),
        schedule=schedules.Constant(),
        augment=None,
        steps=2,
        batch_size=8,
        report=False,
        tensorboard=False,
        mesh="data:1",
        workdir=str(tmp_path / "run"),
    )
    assert runner_main.launch(run, []) == 0
    capsys.readouterr()
    print(len(seen), "files:", *seen)
    assert "train/train_step.py" in seen
    assert len(seen) <= MOST_FILES, list(seen)
