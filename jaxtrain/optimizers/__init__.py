"""Optimizers as frozen dataclasses over Optax, and the table of their names."""

from jaxtrain.optimizers.base import (
    Decaying as Decaying,
    Optimizer as Optimizer,
    match_table as match_table,
)
from jaxtrain.optimizers.common import (
    NAMES as NAMES,
    SGD as SGD,
    Adam as Adam,
    AdamW as AdamW,
    Adafactor as Adafactor,
    Lamb as Lamb,
    Lars as Lars,
    Lion as Lion,
    Muon as Muon,
    ScheduleFreeAdamW as ScheduleFreeAdamW,
    ScheduleFreeSGD as ScheduleFreeSGD,
    evaluation_params as evaluation_params,
)

__all__ = [
    "Adafactor",
    "Adam",
    "AdamW",
    "Decaying",
    "Lamb",
    "Lars",
    "Lion",
    "Muon",
    "NAMES",
    "Optimizer",
    "SGD",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "adaptive",
    "evaluation_params",
    "match_table",
    "rare",
]
