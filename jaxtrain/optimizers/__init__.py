"""Optimizers as frozen dataclasses over Optax, and the table of their names."""

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

__all__ = [
    "NAMES",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Decaying",
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
    "parameters",
    "rare",
]
