"""Optimizers as frozen dataclasses over Optax, the table of their names, and any transformation of
Optax as one of them."""

from jaxtrain.optimizers import adaptive, parameters, rare
from jaxtrain.optimizers.base import Decaying, Optimizer, match_table
from jaxtrain.optimizers.common import (
    NAMES,
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Lamb,
    Lars,
    Lion,
    Muon,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    evaluation_params,
)
from jaxtrain.optimizers.from_optax import FromOptax, Given, of

__all__ = [
    "NAMES",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Decaying",
    "FromOptax",
    "Given",
    "Lamb",
    "Lars",
    "Lion",
    "Muon",
    "Optimizer",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "adaptive",
    "evaluation_params",
    "match_table",
    "of",
    "parameters",
    "rare",
]
