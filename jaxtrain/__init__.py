"""jaxtrain: train JAX models fast, and trust the result. The public names, each imported when first
used."""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Run": "config",
    "Horizon": "horizon",
    "Recipe": "train.recipe",
    "TrainState": "train.state",
    "init_state": "train.state",
    "make_train_step": "train.steps",
    "make_train_steps": "train.steps",
    "make_eval_step": "train.steps",
    "make_predict_step": "train.steps",
    "main": "runner.main",
}
_MODULES = (
    "adapters",
    "augment",
    "data",
    "losses",
    "metrics",
    "models",
    "optimizers",
    "schedules",
    "tasks",
)
__all__ = [*_NAMES, *_MODULES]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name (PEP 562): `import jaxtrain` alone loads nothing
    heavy."""
    if name in _MODULES:
        return importlib.import_module(f"jaxtrain.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"jaxtrain.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
