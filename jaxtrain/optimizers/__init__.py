"""Optimizers as frozen dataclasses over Optax, and the table of their names."""

from jaxtrain.optimizers.base import (
    Decaying as Decaying,
)
from jaxtrain.optimizers.base import (
    Optimizer as Optimizer,
)
from jaxtrain.optimizers.base import (
    match_table as match_table,
)
from jaxtrain.optimizers.common import (
    NAMES as NAMES,
)
from jaxtrain.optimizers.common import (
    SGD as SGD,
)
from jaxtrain.optimizers.common import (
    Adafactor as Adafactor,
)
from jaxtrain.optimizers.common import (
    Adam as Adam,
)
from jaxtrain.optimizers.common import (
    AdamW as AdamW,
)
from jaxtrain.optimizers.common import (
    Lamb as Lamb,
)
from jaxtrain.optimizers.common import (
    Lars as Lars,
)
from jaxtrain.optimizers.common import (
    Lion as Lion,
)
from jaxtrain.optimizers.common import (
    Muon as Muon,
)
from jaxtrain.optimizers.common import (
    ScheduleFreeAdamW as ScheduleFreeAdamW,
)
from jaxtrain.optimizers.common import (
    ScheduleFreeSGD as ScheduleFreeSGD,
)
from jaxtrain.optimizers.common import (
    evaluation_params as evaluation_params,
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
    "rare",
]
