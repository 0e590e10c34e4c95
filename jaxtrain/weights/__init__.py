"""Weights of other toolkits, in and out: Hugging Face's configurations and tensor names, and the
files that they stand in."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; tests/test_exports.py compares the two
    from jaxtrain.weights.exporting import save
    from jaxtrain.weights.loading import Opened, is_model, load, open_model, variables
    from jaxtrain.weights.safetensors_files import tokenizer_files

__all__ = ["Opened", "is_model", "load", "open_model", "save", "tokenizer_files", "variables"]

_FILES = {
    "Opened": "loading",
    "is_model": "loading",
    "load": "loading",
    "open_model": "loading",
    "variables": "loading",
    "save": "exporting",
    "tokenizer_files": "safetensors_files",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for (PEP 562)."""
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted(__all__)
