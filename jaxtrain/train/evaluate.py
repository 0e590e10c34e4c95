"""Evaluation of a finite set, exact: every example once, whatever the batch size and the number of
devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxtrain import metrics
from jaxtrain.errors import UserError
from jaxtrain.processes import heartbeat
from jaxtrain.train.state import TrainState
from jaxtrain.tree import Batch

ShapeKey = tuple[tuple[Any, ...], ...]


def evaluate(
    eval_step: Callable[[TrainState, Batch], metrics.Sums],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    compiled: set[ShapeKey] | None = None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> dict[str, float]:
    """The means of a task's metrics over all batches, summed in float64.

    >>> evaluate(
    ...     lambda state, batch: {"loss": (batch["image"].sum(), batch["weight"].sum())},
    ...     None,
    ...     [
    ...         {"image": np.ones(2), "weight": np.ones(2)},
    ...         {"image": np.full(2, 4.0), "weight": np.array([1.0, 0.0])},
    ...     ],
    ... )
    {'loss': 3.3333333333333335}

    Padding has `weight` 0 (see `pipeline.evaluation_batches`); `eval_step` comes from
    `steps.make_eval_step`. `compiled` holds the shapes of the batches that it has been called with,
    and is added to: a batch of other shapes may take as long as a compilation.
    """
    totals = metrics.Totals()
    pending = None
    compiled = set() if compiled is None else compiled
    heartbeat.beat("evaluating")
    for batch in batches:
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        if shapes not in compiled:
            compiled.add(shapes)
            heartbeat.beat("compiling")
        sums = eval_step(state, batch)
        heartbeat.beat("evaluating")
        if pending is not None:
            totals.add(fetch(pending))  # the host waits for the batch before this one
        pending = sums
    if pending is None:
        raise UserError("evaluation of 0 examples; give a split that holds some")
    totals.add(fetch(pending))
    return totals.means()


def predictions(
    predict_step: Callable[[TrainState, Batch], dict[str, jax.Array]],
    state: TrainState,
    batches: Iterable[Batch],
) -> dict[str, np.ndarray]:
    """What the model says of every example, padding left out: each array of the task's `examine`,
    and `id`, over the whole set."""
    parts: list[dict[str, np.ndarray]] = []
    for batch in batches:
        values = {
            name: np.asarray(value)
            for name, value in jax.device_get(predict_step(state, batch)).items()
        }
        kept = values.pop("weight") > 0
        parts.append({name: value[kept] for name, value in values.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
