"""`python -m jaxtrain sample`: a run of ours and a folder of Hugging Face's say what the library
says, in whole characters; a chat reads lines; what cannot be is said in one line."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain
from jaxtrain import optimizers, schedules, weights
from jaxtrain.cli import main as cli
from jaxtrain.cli import sample
from jaxtrain.data.sources.text import Text
from jaxtrain.data.text.plain_tokenizers import Bytes
from jaxtrain.inference import sampling, trained
from jaxtrain.models import Transformer
from jaxtrain.runner import main as runner
from jaxtrain.tasks import NextToken

MODEL = Transformer(vocabulary=257, width=16, depth=1, heads=2, max_length=32)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a small text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("To be, or not to be: that is the quéstion.\n" * 40)
    run = jaxtrain.Run(
        name="tiny",
        model=MODEL,
        data=Text(
            path=(str(folder / "text.txt"),),
            length=16,
            split_by="tokens",
            cache=str(folder / "cache"),
        ),
        task=NextToken(),
        optimizer=optimizers.SGD(learning_rate=0.1),
        schedule=schedules.Constant(),
        steps=2,
        batch_size=8,
        workdir=str(folder / "work"),
    )
    assert jaxtrain.train(run) is not None
    return folder / "work"


def command(*arguments: str) -> int:
    return cli.main(["sample", *arguments])
