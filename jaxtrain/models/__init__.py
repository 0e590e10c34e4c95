"""Models as Linen modules: pure functions that know neither mesh, data, optimizer nor flags."""

import importlib
from typing import Any

_PUBLIC = {
    "MLP": "mlp",
    "ConvNet": "convnet",
    "ResNet": "resnet",
    "ViT": "vit",
    "Transformer": "transformer",
    "Dropout": "layers",
}
_FAMILIES = ("mlp", "convnet", "resnet", "vit", "transformer")

__all__ = ["NAMES", *_PUBLIC]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for (PEP 562), so that naming this package costs
    nothing."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name == "NAMES":
        return {
            key: model
            for family in _FAMILIES
            for key, model in importlib.import_module(f"{__name__}.{family}").NAMES.items()
        }
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted(__all__)
