"""Data: sources, splits, the stateless order, and the pipeline to the devices. Names load their
file when first used."""

import importlib
from typing import Any

_FILES = {
    "Arrays": "sources.arrays",
    "Digits": "sources.digits",
    "Images": "sources.images",
    "Records": "sources.records",
    "Splits": "splits",
    "Stream": "pipeline",
    "Synthetic": "sources.synthetic",
    "SyntheticTokens": "sources.markov",
    "Table": "table",
    "Tfds": "sources.tfds_sets",
}


def __getattr__(name: str) -> Any:
    """The public names, and `NAMES`: each source by the word that `--data` takes."""
    if name == "NAMES":
        sources = {
            "digits": "Digits",
            "arrays": "Arrays",
            "tfds": "Tfds",
            "records": "Records",
            "images": "Images",
            "synthetic": "Synthetic",
            "tokens": "SyntheticTokens",
        }
        return {word: __getattr__(cls)() for word, cls in sources.items()}
    if name in _FILES:
        return getattr(importlib.import_module(f"jaxtrain.data.{_FILES[name]}"), name)
    raise AttributeError(f"module 'jaxtrain.data' has no attribute {name!r}")
