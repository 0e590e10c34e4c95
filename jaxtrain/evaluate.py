"""Evaluation of a finite set, exact: every example once, whatever the batch size and the number of devices."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxtrain import metrics, pulse
from jaxtrain.recipe import Batch
from jaxtrain.state import TrainState

_compiled: weakref.WeakKeyDictionary[Callable[..., Any], set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
"""The shapes of batches that each program was called with, for which jax has compiled it."""


def evaluate(
    eval_step: Callable[[TrainState, Batch], metrics.Sums], state: TrainState, batches: Iterable[Batch], fetch: Callable[[Any], Any] = jax.device_get
) -> dict[str, float]:
    """The means of a task's metrics over all batches, summed in float64.

    >>> evaluate(lambda state, batch: {"loss": (batch["image"].sum(), batch["weight"].sum())}, None,
    ...          [{"image": np.ones(2), "weight": np.ones(2)}, {"image": np.full(2, 4.0), "weight": np.array([1.0, 0.0])}])
    {'loss': 3.3333333333333335}

    Padding has `weight` 0 (see `pipeline.evaluation_batches`); `eval_step` comes from `step.make_eval_step`.
    """
    totals = metrics.Totals()
    pending = None
    pulse.beat("evaluating")
    for batch in batches:
        if _is_new(eval_step, batch):
            pulse.beat("compiling")
        sums = eval_step(state, batch)
        pulse.beat("evaluating")
        if pending is not None:
            totals.add(fetch(pending))  # the host waits for the batch before this one
        pending = sums
    if pending is None:
        raise ValueError("evaluation of 0 examples; give a split that holds some")
    totals.add(fetch(pending))
    return totals.means()


def _is_new(eval_step: Callable[..., Any], batch: Batch) -> bool:
    """Whether this call will compile: the first one with a batch of these shapes."""
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
    try:
        known = _compiled.setdefault(eval_step, set())
    except TypeError:  # a callable that cannot be remembered; so it has the longer limit, which is never a false alarm
        return True
    new = shapes not in known
    known.add(shapes)
    return new


def predictions(predict_step: Callable[[TrainState, Batch], dict[str, jax.Array]], state: TrainState, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """What the model says of every example, padding left out: each array of the task's `examine`, and `id`, over the whole set."""
    parts: list[dict[str, np.ndarray]] = []
    for batch in batches:
        values = {name: np.asarray(value) for name, value in jax.device_get(predict_step(state, batch)).items()}
        kept = values.pop("weight") > 0
        parts.append({name: value[kept] for name, value in values.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
