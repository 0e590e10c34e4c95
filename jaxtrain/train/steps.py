"""The step: `(state, batch) -> (state, metrics)`, pure, for training, evaluation and prediction.

A batch's trip: `gradients.py` (prepare -> augment -> model -> task -> gradients), then `update.py`
(clip -> optimizer -> average). Here both are compiled, for one step and for many.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from jaxtrain import metrics, tree
from jaxtrain.data import order, pipeline
from jaxtrain.optimizers import Optimizer
from jaxtrain.parallel import sharding
from jaxtrain.tasks import Task
from jaxtrain.train import gradients, hyper, update
from jaxtrain.train.recipe import Batch, Options, Recipe
from jaxtrain.train.state import TrainState

Update = Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]


def make_train_step(
    model: Any,
    task: Task,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> Update:
    """The compiled training step `(state, batch) -> (state, sums)`; it takes over (donates) the
    state that it is given.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.train.state import init_state
    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.ones((4, 8)), "label": jnp.zeros(4, jnp.int32)}
    >>> parts = MLP(num_classes=3), Classification(), SGD()
    >>> state, sums = make_train_step(*parts)(init_state(*parts, batch), batch)
    >>> int(state.step), float(sums["loss"][1])
    (1, 4.0)

    `sums` holds (sum, count) of the task's metrics, of `learning_rate` and of `grad_norm` (before
    clipping). Give the options that `init_state` was given.
    """
    recipe = Recipe(model, task, optimizer, **options)
    return jax.jit(lambda state, batch: _train(recipe, mesh, state, batch), donate_argnums=0)


def make_gradients(
    model: Any,
    task: Task,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> Callable[[TrainState, Batch], tuple[tree.PyTree, metrics.Sums]]:
    """The compiled `(state, batch) -> (gradients, sums)`: the gradient of the mean loss, before
    clipping, and nothing changed."""
    recipe = Recipe(model, task, optimizer, **options)

    def mean_gradients(state: TrainState, batch: Batch) -> tuple[tree.PyTree, metrics.Sums]:
        total = gradients.total(recipe, state, batch, mesh=mesh)
        count = jnp.maximum(total.sums["loss"][1], 1e-9)
        return jax.tree.map(lambda gradient: gradient / count, total.gradients), dict(total.sums)

    return jax.jit(mean_gradients)


def make_train_steps(
    model: Any,
    task: Task,
    optimizer: Optimizer,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> "TrainSteps":
    """The compiled `(state, data, count) -> (state, sums)`: `count` steps in one dispatch over data
    that lies on the device.

    `data` holds whole arrays (see `pipeline.resident_arrays`); each step gathers its batch by
    `state.position`. `count` is an int32 scalar, not a constant: one program serves every length.
    The sums are those of all its steps.
    """
    recipe = Recipe(model, task, optimizer, **options)

    def one(state: TrainState, data: Batch) -> tuple[TrainState, metrics.Sums]:
        length = len(next(iter(data.values())))
        place = state.position
        ids_B = order.example_ids(place.seed, place.epoch, place.offset, batch_size, length, jnp)
        if mesh is not None:
            ids_B = jax.lax.with_sharding_constraint(ids_B, sharding.batch(mesh))
        return _train(
            dataclasses.replace(recipe, num_examples=length),
            mesh,
            state,
            pipeline.gather(data, ids_B),
        )

    def steps(state: TrainState, data: Batch, count: jax.Array) -> tuple[TrainState, metrics.Sums]:
        shapes = jax.eval_shape(one, state, data)[1]
        # One vector of all sums: a loop on CPU pays for each operation, however small, and this
        # saves it eight.
        start, unravel = ravel_pytree(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        )

        def body(_: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
            state, sums = one(carry[0], data)
            return state, carry[1] + ravel_pytree(sums)[0]

        state, totals = jax.lax.fori_loop(0, count, body, (state, start))
        return state, unravel(totals)

    def single(state: TrainState, data: Batch, count: jax.Array) -> tuple[TrainState, metrics.Sums]:
        del count
        return one(state, data)

    # A loop in the program is not free: XLA runs a convolution inside one 25 times slower on CPU.
    # So the loop is a choice, and one step has none.
    return TrainSteps(jax.jit(steps, donate_argnums=0), jax.jit(single, donate_argnums=0))


@dataclasses.dataclass(frozen=True)
class TrainSteps:
    """Several steps by the looped program; `single` is the same without a loop, for one step a
    dispatch."""

    several: Any
    single: Any

    def __call__(
        self, state: TrainState, data: Batch, count: jax.Array
    ) -> tuple[TrainState, metrics.Sums]:
        return self.several(state, data, count)


def make_eval_step(
    model: Any,
    task: Task,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> Callable[[TrainState, Batch], metrics.Sums]:
    """The compiled `(state, batch) -> sums` of evaluation: no augmentation, no dropout, running
    averages, averaged parameters if there are.

    A batch may hold `weight` (B,), 0 for padding.
    """
    recipe = Recipe(model, task, optimizer, **options)

    def evaluate(state: TrainState, batch: Batch) -> metrics.Sums:
        return evaluated(recipe, state, batch, mesh=mesh)

    return jax.jit(evaluate)


def evaluated(
    recipe: Recipe, state: TrainState, batch: Batch, *, mesh: Mesh | None = None
) -> metrics.Sums:
    """The sums of a raw batch in evaluation."""
    bound = hyper.bind(recipe, state.hyper)
    batch = gradients.prepared(bound, batch, mesh)
    return dict(bound.task.loss(gradients.outputs(bound, state, batch, mesh), batch, train=False))


def make_predict_step(
    model: Any,
    task: Any,
    optimizer: Optimizer,
    *,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """The compiled `(state, batch) -> task.examine(outputs, batch)`: what the model says of each
    example, with its `id` and `weight`."""
    recipe = Recipe(model, task, optimizer, **options)

    def predict(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        bound = hyper.bind(recipe, state.hyper)
        kept = {name: batch[name] for name in ("id", "weight") if name in batch}
        batch = gradients.prepared(bound, batch, mesh)
        found = bound.task.examine(gradients.outputs(bound, state, batch, mesh), batch) | kept
        # Every process can read an array only if it holds the whole of it.
        return (
            found
            if mesh is None
            else jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
        )

    return jax.jit(predict)


def _train(
    recipe: Recipe, mesh: Mesh | None, state: TrainState, batch: Batch
) -> tuple[TrainState, metrics.Sums]:
    """One update."""
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(batch)
    )
    total = gradients.total(recipe, state, batch, mesh=mesh)
    return update.update(
        recipe, state, total, abstract, batch_size=jax.tree.leaves(abstract)[0].shape[0], mesh=mesh
    )
