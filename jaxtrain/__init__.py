"""jaxtrain: train JAX models fast, and trust the result. The public names, each imported when first
used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; tests/test_exports.py compares the two
    from jaxtrain import (
        adapters,
        augment,
        data,
        losses,
        metrics,
        models,
        optimizers,
        schedules,
        tasks,
    )
    from jaxtrain.config import Run
    from jaxtrain.horizon import Horizon
    from jaxtrain.inference.trained import load
    from jaxtrain.runner.main import main
    from jaxtrain.train.recipe import Recipe
    from jaxtrain.train.state import TrainState, init_state
    from jaxtrain.train.steps import (
        make_eval_step,
        make_predict_step,
        make_train_step,
        make_train_steps,
    )

__version__ = "0.1.0"

__all__ = [
    "Horizon",
    "Recipe",
    "Run",
    "TrainState",
    "adapters",
    "augment",
    "data",
    "init_state",
    "load",
    "losses",
    "main",
    "make_eval_step",
    "make_predict_step",
    "make_train_step",
    "make_train_steps",
    "metrics",
    "models",
    "optimizers",
    "schedules",
    "tasks",
]

_FILES = {
    "Run": "config",
    "Horizon": "horizon",
    "Recipe": "train.recipe",
    "TrainState": "train.state",
    "init_state": "train.state",
    "make_train_step": "train.steps",
    "make_train_steps": "train.steps",
    "make_eval_step": "train.steps",
    "make_predict_step": "train.steps",
    "load": "inference.trained",
    "main": "runner.main",
}
"""The file of each public name that is not itself a module."""


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name (PEP 562): `import jaxtrain` alone loads nothing
    heavy."""
    if name in _FILES:
        return getattr(importlib.import_module(f"jaxtrain.{_FILES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"jaxtrain.{name}")
    raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
