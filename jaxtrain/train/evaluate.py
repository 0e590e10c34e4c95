"""Evaluation of a finite set, exact: every example once, whatever the batch size and the number of
devices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    for sums in _results(eval_step, state, batches, compiled, fetch):
        totals.add(sums)
    return _means(totals)


def measure(
    measuring_step: Callable[[TrainState, Batch], tuple[metrics.Sums, Mapping[str, jax.Array]]],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    whole: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]],
    compiled: set[ShapeKey] | None = None,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> dict[str, float]:
    """`evaluate`, and the metrics of `whole`, a task's own `evaluate`, which sees every example
    once, in the order of the set, whatever the batch size and the mesh.

    `measuring_step` gives the sums of a batch and what the task's `examine` says of it. `UserError`
    if two metrics have one name.
    """
    totals, parts = metrics.Totals(), []
    for sums, examined in _results(measuring_step, state, batches, compiled, fetch):
        totals.add(sums)
        parts.append(_without_padding(examined))
    means, more = _means(totals), dict(whole(_joined(parts)))
    if both := sorted(means.keys() & more.keys()):
        raise UserError(
            f"task: {', '.join(both)} is among the sums of its loss and in its evaluate; rename one"
        )
    return means | {name: float(value) for name, value in more.items()}


def _results(
    step: Callable[[TrainState, Batch], Any],
    state: TrainState,
    batches: Iterable[Batch],
    compiled: set[ShapeKey] | None,
    fetch: Callable[[Any], Any],
) -> Iterator[Any]:
    """What a step says of each batch, on the host, which runs one batch behind the device."""
    pending, some = None, False
    compiled = set() if compiled is None else compiled
    heartbeat.beat("evaluating")
    for batch in batches:
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch))
        if shapes not in compiled:
            compiled.add(shapes)
            heartbeat.beat("compiling")
        result = step(state, batch)
        heartbeat.beat("evaluating")
        if some:
            yield fetch(pending)  # the host waits for the batch before this one
        pending, some = result, True
    if not some:
        raise UserError("evaluation of 0 examples; give a split that holds some")
    yield fetch(pending)


def _means(totals: metrics.Totals) -> dict[str, float]:
    means = totals.means()
    if "loss" not in means:
        raise UserError(
            "evaluation: every example has weight 0 or a label that --task.ignore leaves out, so"
            " there is nothing to measure; give a split that has labels"
        )
    return means


def predictions(
    predict_step: Callable[[TrainState, Batch], Mapping[str, jax.Array]],
    state: TrainState,
    batches: Iterable[Batch],
) -> dict[str, np.ndarray]:
    """What the model says of every example, padding left out: each array of the task's `examine`,
    `id`, and `weight`, over the whole set in its order."""
    return _joined(
        [_without_padding(jax.device_get(predict_step(state, batch))) for batch in batches]
    )


def _without_padding(examined: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rows of a batch that have some weight; bfloat16 as float32, for NumPy has none."""
    values = {
        name: np.asarray(value, np.float32 if value.dtype == jnp.bfloat16 else None)
        for name, value in examined.items()
    }
    if "weight" not in values:
        return values
    weight = values["weight"]
    kept = (weight > 0).reshape(len(weight), -1).any(1)
    return {name: value[kept] for name, value in values.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of all batches, by `id` where they have one."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "id" not in whole:
        return whole
    order_N = np.argsort(whole["id"], kind="stable")
    return {name: value[order_N] for name, value in whole.items()}
