"""Models as Linen modules: pure functions that know neither mesh, data, optimizer nor flags."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; tests/test_exports.py compares the two
    from collections.abc import Mapping

    from flax import linen as nn

    from jaxtrain.models.convnet import ConvNet
    from jaxtrain.models.encoder import Encoder
    from jaxtrain.models.fitted import Fitted
    from jaxtrain.models.layers import Dropout
    from jaxtrain.models.mlp import MLP
    from jaxtrain.models.pretrained import Pretrained
    from jaxtrain.models.resnet import ResNet
    from jaxtrain.models.transformer import Transformer
    from jaxtrain.models.vit import ViT

    NAMES: Mapping[str, nn.Module]

__all__ = [
    "MLP",
    "NAMES",
    "ConvNet",
    "Dropout",
    "Encoder",
    "Fitted",
    "Pretrained",
    "ResNet",
    "Transformer",
    "ViT",
]

_FILES = {
    "MLP": "mlp",
    "ConvNet": "convnet",
    "ResNet": "resnet",
    "ViT": "vit",
    "Transformer": "transformer",
    "Encoder": "encoder",
    "Fitted": "fitted",
    "Pretrained": "pretrained",
    "Dropout": "layers",
}
_FAMILIES = ("mlp", "convnet", "resnet", "vit", "transformer", "fitted", "sizes", "pretrained")


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for (PEP 562), so that naming this package costs
    nothing."""
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
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
