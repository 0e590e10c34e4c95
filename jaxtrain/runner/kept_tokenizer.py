"""The tokenizer of the text that a run is trained on, and its copy in the run's folder."""

import json
from pathlib import Path

from jaxtrain.data import label_checks
from jaxtrain.data.table import Table
from jaxtrain.data.text import tokenizers
from jaxtrain.data.text.protocol import Tokenizer


def tokenizer_of(train: Table) -> Tokenizer | None:
    """The tokenizer of the text that a run is trained on; None if it is none."""
    return getattr(label_checks.unchecked(train), "tokenizer", None)


def keep(folder: Path, train: Table) -> None:
    """Writes the tokenizer into the run's folder, where `sample` finds it: one that was learned
    from the text may be nowhere else."""
    tokenizer = tokenizer_of(train)
    if tokenizer is None:
        return
    path = folder / tokenizers.SAVED
    try:
        same = json.loads(path.read_bytes()) == tokenizer.record()
    except (OSError, ValueError):
        same = False
    if not same:
        tokenizers.save(tokenizer, folder)
