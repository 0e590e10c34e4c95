"""The step, compiled: one update, several in a dispatch, gradients alone, evaluation, prediction.

What a step does stands in `train_step.py`. Each function here takes a model, a task and an
optimizer, and the other fields of `Recipe` by name; `lowering.py` takes the recipe itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from jaxtrain import metrics, optimizers, tree
from jaxtrain.data import pipeline
from jaxtrain.data.order import Shuffled
from jaxtrain.parallel import sharding
from jaxtrain.tasks import Task
from jaxtrain.train import train_step
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import Placement, TrainState
from jaxtrain.tree import Batch

Update = Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]


def make_train_step(
    model: Any, task: Task, optimizer: optimizers.Given, *, mesh: Mesh | None = None, **options: Any
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
    return jit_train_step(Recipe(model, task, optimizers.of(optimizer), **options), mesh)


def jit_train_step(recipe: Recipe, mesh: Mesh | None, places: Placement | None = None) -> Any:
    """The compiled training step of a recipe, see `make_train_step`."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, metrics.Sums]:
        return train_step.train_step(recipe, state, batch, mesh, places)

    return jax.jit(step, donate_argnums=0)


def make_gradients(
    model: Any, task: Task, optimizer: optimizers.Given, *, mesh: Mesh | None = None, **options: Any
) -> Callable[[TrainState, Batch], tuple[tree.PyTree, metrics.Sums]]:
    """The compiled `(state, batch) -> (gradients, sums)`: the gradient of the mean loss, before
    clipping, and nothing changed."""
    return jit_gradients(Recipe(model, task, optimizers.of(optimizer), **options), mesh)


def jit_gradients(recipe: Recipe, mesh: Mesh | None, places: Placement | None = None) -> Any:
    """The compiled gradients of a recipe, see `make_gradients`."""

    def gradients(state: TrainState, batch: Batch) -> tuple[tree.PyTree, metrics.Sums]:
        return train_step.mean_gradients(recipe, state, batch, mesh, places)

    return jax.jit(gradients)


def make_train_steps(
    model: Any,
    task: Task,
    optimizer: optimizers.Given,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    **options: Any,
) -> "TrainSteps":
    """The compiled `(state, data, count) -> (state, sums)`: `count` steps in one dispatch over data
    that lies on the device.

    `data` holds whole arrays (see `pipeline.resident_arrays`); each step gathers its batch by
    `state.position`, in the recipe's order, or shuffled anew each epoch. `count` is an int32
    scalar, not a constant: one program serves every length. The sums are those of all its steps.
    """
    return jit_train_steps(
        Recipe(model, task, optimizers.of(optimizer), **options), mesh, batch_size=batch_size
    )


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


def jit_train_steps(
    recipe: Recipe, mesh: Mesh | None, places: Placement | None = None, *, batch_size: int
) -> TrainSteps:
    """The compiled steps of a recipe over data on the device, see `make_train_steps`."""

    def step(state: TrainState, data: Batch) -> tuple[TrainState, metrics.Sums]:
        order = recipe.order
        if order == Shuffled():
            order = Shuffled(len(next(iter(data.values()))))
        ids_B = order.ids(state.position, batch_size, jnp)
        if mesh is not None:
            ids_B = jax.lax.with_sharding_constraint(ids_B, sharding.batch(mesh))
        batch = pipeline.gather(data, ids_B)
        ordered = dataclasses.replace(recipe, order=order)
        return train_step.train_step(ordered, state, batch, mesh, places)

    # Inlined: it is traced once, and leaves no call in the programs.
    one = jax.jit(step, inline=True)

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


def make_eval_step(
    model: Any, task: Task, optimizer: optimizers.Given, *, mesh: Mesh | None = None, **options: Any
) -> Callable[[TrainState, Batch], metrics.Sums]:
    """The compiled `(state, batch) -> sums` of evaluation: no augmentation, no dropout, running
    averages, averaged parameters if there are.

    A batch may hold `weight` (B,), 0 for padding.
    """
    return jit_eval_step(Recipe(model, task, optimizers.of(optimizer), **options), mesh)


def jit_eval_step(recipe: Recipe, mesh: Mesh | None, places: Placement | None = None) -> Any:
    """The compiled evaluation of a recipe, see `make_eval_step`."""

    def step(state: TrainState, batch: Batch) -> metrics.Sums:
        return train_step.evaluation_step(recipe, state, batch, mesh, places)

    return jax.jit(step)


def make_predict_step(
    model: Any, task: Any, optimizer: optimizers.Given, *, mesh: Mesh | None = None, **options: Any
) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """The compiled `(state, batch) -> task.examine(outputs, batch)`: what the model says of each
    example, with its `id` and `weight`."""
    return jit_predict_step(Recipe(model, task, optimizers.of(optimizer), **options), mesh)


def jit_predict_step(recipe: Recipe, mesh: Mesh | None, places: Placement | None = None) -> Any:
    """The compiled prediction of a recipe, see `make_predict_step`."""

    def step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        return train_step.prediction_step(recipe, state, batch, mesh, places)

    return jax.jit(step)


def jit_measuring_step(recipe: Recipe, mesh: Mesh | None, places: Placement | None = None) -> Any:
    """The compiled `(state, batch) -> (sums, examined)`: evaluation and prediction by one pass."""

    def step(state: TrainState, batch: Batch) -> tuple[metrics.Sums, dict[str, jax.Array]]:
        return train_step.measuring_step(recipe, state, batch, mesh, places)

    return jax.jit(step)
