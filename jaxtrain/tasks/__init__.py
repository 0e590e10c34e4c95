"""Tasks: what is learnt from a batch, as losses and metrics in (sum, count) form.

A task is two functions: `inputs(batch)` picks what the model sees, `loss(outputs, batch,
train=...)` gives `{name: (sum, count)}` with "loss" among the names; that one is minimised. What
else a task may say stands in `protocol.Hooks`. Outputs may be any pytree that the task's own `loss`
understands.
"""

from jaxtrain.tasks.binary import Binary, MultiLabel
from jaxtrain.tasks.classification import Classification
from jaxtrain.tasks.labels import Wrong
from jaxtrain.tasks.masked_language import MaskedLanguage
from jaxtrain.tasks.next_token import NextToken
from jaxtrain.tasks.protocol import (
    Hooks,
    Task,
    has_hook,
    measures_whole_sets,
    score_of,
    units_of,
    with_derived,
)
from jaxtrain.tasks.regression import Regression

__all__ = [
    "NAMES",
    "Binary",
    "Classification",
    "Hooks",
    "MaskedLanguage",
    "MultiLabel",
    "NextToken",
    "Regression",
    "Task",
    "Wrong",
    "has_hook",
    "measures_whole_sets",
    "score_of",
    "units_of",
    "with_derived",
]

NAMES = {
    "classification": Classification(),
    "binary": Binary(),
    "multi_label": MultiLabel(),
    "regression": Regression(),
    "next_token": NextToken(),
    "masked_language": MaskedLanguage(),
}
