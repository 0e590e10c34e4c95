"""Data: sources, splits, the stateless order, and the pipeline to the devices. Names load their
file when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; tests/test_exports.py compares the two
    from collections.abc import Mapping

    from jaxtrain.data.pipeline import BatchLoader
    from jaxtrain.data.sources.arrays import Arrays
    from jaxtrain.data.sources.conversations import Conversations
    from jaxtrain.data.sources.digits import Digits
    from jaxtrain.data.sources.images import Images
    from jaxtrain.data.sources.labelled_text import LabelledText
    from jaxtrain.data.sources.markov import SyntheticTokens
    from jaxtrain.data.sources.own import Own
    from jaxtrain.data.sources.records import Records
    from jaxtrain.data.sources.synthetic import Synthetic
    from jaxtrain.data.sources.text import Mixture, Text
    from jaxtrain.data.sources.tfds_sets import Tfds
    from jaxtrain.data.splits import Splits
    from jaxtrain.data.table import Table

    NAMES: Mapping[str, Any]

__all__ = [
    "NAMES",
    "Arrays",
    "BatchLoader",
    "Conversations",
    "Digits",
    "Images",
    "LabelledText",
    "Mixture",
    "Own",
    "Records",
    "Splits",
    "Synthetic",
    "SyntheticTokens",
    "Table",
    "Text",
    "Tfds",
]

_FILES = {
    "Arrays": "sources.arrays",
    "Conversations": "sources.conversations",
    "Digits": "sources.digits",
    "Images": "sources.images",
    "LabelledText": "sources.labelled_text",
    "Own": "sources.own",
    "Records": "sources.records",
    "Splits": "splits",
    "BatchLoader": "pipeline",
    "Synthetic": "sources.synthetic",
    "SyntheticTokens": "sources.markov",
    "Table": "table",
    "Text": "sources.text",
    "Mixture": "sources.text",
    "Tfds": "sources.tfds_sets",
}
_SOURCES = {
    "digits": "Digits",
    "arrays": "Arrays",
    "tfds": "Tfds",
    "records": "Records",
    "images": "Images",
    "synthetic": "Synthetic",
    "tokens": "SyntheticTokens",
    "text": "Text",
    "mixture": "Mixture",
    "own": "Own",
    "conversations": "Conversations",
    "labelled_text": "LabelledText",
}
"""Each source by the word that `--data` takes."""


def __getattr__(name: str) -> Any:
    """Imports the file of a public name when it is first used (PEP 562)."""
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    if name == "NAMES":
        return {word: __getattr__(cls)() for word, cls in _SOURCES.items()}
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted(__all__)
