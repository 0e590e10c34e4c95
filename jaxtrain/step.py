"""The step: `(state, batch) -> (state, metrics)`, pure, for training, evaluation and prediction.

In the order of a batch's trip: prepare -> augment -> model -> task -> gradients -> clip -> optimizer -> average.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from jaxtrain import adapters, hyper, metrics, sharding, streams, tree
from jaxtrain.data import order, pipeline
from jaxtrain.optimizers import Optimizer, evaluation_params
from jaxtrain.recipe import Batch, Options, Recipe
from jaxtrain.state import Position, TrainState, state_shardings
from jaxtrain.tasks import Task

Update = Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]


def make_train_step(model: Any, task: Task, optimizer: Optimizer, *, mesh: Mesh | None = None, **options: Unpack[Options]) -> Update:
    """The compiled training step `(state, batch) -> (state, sums)`; it takes over (donates) the state that it is given.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.state import init_state
    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.ones((4, 8)), "label": jnp.zeros(4, jnp.int32)}
    >>> parts = MLP(num_classes=3), Classification(), SGD()
    >>> state, sums = make_train_step(*parts)(init_state(*parts, batch), batch)
    >>> int(state.step), float(sums["loss"][1])
    (1, 4.0)

    `sums` holds (sum, count) of the task's metrics, of `learning_rate` and of `grad_norm` (before clipping). Give the options that
    `init_state` was given.
    """
    recipe = Recipe(model, task, optimizer, **options)
    return jax.jit(lambda state, batch: _train(recipe, mesh, state, batch), donate_argnums=0)


def make_train_steps(
    model: Any, task: Task, optimizer: Optimizer, *, batch_size: int, mesh: Mesh | None = None, **options: Unpack[Options]
) -> "TrainSteps":
    """The compiled `(state, data, count) -> (state, sums)`: `count` steps in one dispatch over data that lies on the device.

    `data` holds whole arrays (see `pipeline.resident_arrays`); each step gathers its batch by `state.position`. `count` is an int32 scalar, not
    a constant: one program serves every length. The sums are those of all its steps.
    """
    recipe = Recipe(model, task, optimizer, **options)

    def one(state: TrainState, data: Batch) -> tuple[TrainState, metrics.Sums]:
        length = len(next(iter(data.values())))
        place = state.position
        ids_B = order.example_ids(place.seed, place.epoch, place.offset, batch_size, length, jnp)
        if mesh is not None:
            ids_B = jax.lax.with_sharding_constraint(ids_B, sharding.batch(mesh))
        return _train(dataclasses.replace(recipe, num_examples=length), mesh, state, pipeline.gather(data, ids_B))

    def steps(state: TrainState, data: Batch, count: jax.Array) -> tuple[TrainState, metrics.Sums]:
        shapes = jax.eval_shape(one, state, data)[1]
        # One vector of all sums: a loop on CPU pays for each operation, however small, and this saves it eight.
        start, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

        def body(_: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
            state, sums = one(carry[0], data)
            return state, carry[1] + ravel_pytree(sums)[0]

        state, totals = jax.lax.fori_loop(0, count, body, (state, start))
        return state, unravel(totals)

    def single(state: TrainState, data: Batch, count: jax.Array) -> tuple[TrainState, metrics.Sums]:
        del count
        return one(state, data)

    # A loop in the program is not free: XLA runs a convolution inside one 25 times slower on CPU. So the loop is a choice, and one step has none.
    return TrainSteps(jax.jit(steps, donate_argnums=0), jax.jit(single, donate_argnums=0))


@dataclasses.dataclass(frozen=True)
class TrainSteps:
    """Several steps by the looped program; `single` is the same without a loop, for one step a dispatch."""

    several: Any
    single: Any

    def __call__(self, state: TrainState, data: Batch, count: jax.Array) -> tuple[TrainState, metrics.Sums]:
        return self.several(state, data, count)


def make_eval_step(
    model: Any, task: Task, optimizer: Optimizer, *, mesh: Mesh | None = None, **options: Unpack[Options]
) -> Callable[[TrainState, Batch], metrics.Sums]:
    """The compiled `(state, batch) -> sums` of evaluation: no augmentation, no dropout, running averages, averaged parameters if there are.

    A batch may hold `weight` (B,), 0 for padding.
    """
    recipe = Recipe(model, task, optimizer, **options)

    def evaluate(state: TrainState, batch: Batch) -> metrics.Sums:
        bound = hyper.bind(recipe, state.hyper)
        batch = _prepared(bound, batch, mesh)
        return dict(bound.task.loss(_outputs(bound, state, batch), batch, train=False))

    return jax.jit(evaluate)


def make_predict_step(
    model: Any, task: Any, optimizer: Optimizer, *, mesh: Mesh | None = None, **options: Unpack[Options]
) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """The compiled `(state, batch) -> task.examine(outputs, batch)`: what the model says of each example, with its `id` and `weight`."""
    recipe = Recipe(model, task, optimizer, **options)

    def predict(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        bound = hyper.bind(recipe, state.hyper)
        kept = {name: batch[name] for name in ("id", "weight") if name in batch}
        batch = _prepared(bound, batch, mesh)
        return bound.task.examine(_outputs(bound, state, batch), batch) | kept

    return jax.jit(predict)


def _train(recipe: Recipe, mesh: Mesh | None, state: TrainState, batch: Batch) -> tuple[TrainState, metrics.Sums]:
    """One update."""
    bound = hyper.bind(recipe, state.hyper)
    batch_size = jax.tree.leaves(dict(batch))[0].shape[0]
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(batch))
    gradients, sums, collections = _gradients(bound, state, _augmented(bound, state, _prepared(bound, batch, mesh)))

    norm = optax.tree.norm(gradients)
    if bound.clip_norm is not None:
        gradients = jax.tree.map(lambda gradient: gradient * jnp.minimum(1.0, bound.clip_norm / (norm + 1e-9)), gradients)
    rate = bound.optimizer.learning_rate * bound.schedule.multiplier(state.step, bound.total_steps)
    transform = bound.optimizer.transform(state.params, rate)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.float32(1)
    new = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        collections=collections,
        ema=_average(bound.ema_decay, state, params),
        hyper=state.hyper,
        key=state.key,
        position=_advance(state.position, batch_size, recipe.num_examples),
    )
    if mesh is not None and mesh.size > 1:
        # Nothing else says that the new state should lie as the old one did.
        new = jax.lax.with_sharding_constraint(new, state_shardings(recipe, abstract, new, mesh))
    return new, dict(sums) | {"learning_rate": (jnp.float32(rate), one), "grad_norm": (norm, one)}


def _gradients(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[tree.PyTree, metrics.Sums, dict[str, tree.PyTree]]:
    """The gradient of the mean loss, the sums of the metrics and the new collections, over all microbatches."""
    apply = adapters.functions(recipe.model).apply
    dropout = streams.stream(state.key, "dropout", state.step)

    def total(params: tree.PyTree, part: Batch, index: int | jax.Array) -> tuple[jax.Array, tuple[metrics.Sums, dict[str, tree.PyTree]]]:
        variables = {"params": params} | state.collections
        rngs = {"dropout": jax.random.fold_in(dropout, index)}
        outputs, collections = apply(variables, recipe.task.inputs(part), train=True, rngs=rngs)
        sums = dict(recipe.task.loss(outputs, part))
        return sums["loss"][0], (sums, collections)

    def one(part: Batch, index: int | jax.Array) -> tuple[tree.PyTree, metrics.Sums, dict[str, tree.PyTree]]:
        (_, (sums, collections)), gradients = jax.value_and_grad(total, has_aux=True)(state.params, part, index)
        return gradients, sums, collections

    if recipe.microbatches == 1:
        gradients, sums, collections = one(batch, 0)
    else:
        gradients, sums, collections = _over_microbatches(one, batch, recipe.microbatches)
    count = jnp.maximum(sums["loss"][1], 1e-9)
    return jax.tree.map(lambda gradient: gradient / count, gradients), sums, collections


def _over_microbatches(one: Callable[..., Any], batch: Batch, count: int) -> tuple[tree.PyTree, metrics.Sums, dict[str, tree.PyTree]]:
    """Sums of gradients and metrics over the parts. Each part starts from the step's own collections, and their mean is kept: an average
    of running averages is the running average of the mean, so batch statistics move once a step however many parts there are."""

    def split(array: jax.Array) -> jax.Array:
        # Part m takes examples m, m + count, ...: each device's share of the batch then gives an even share of every part.
        return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, dict(batch))
    if jax.default_backend() == "cpu":
        # Unrolled, for convolutions in a loop are slow there; elsewhere a loop keeps the memory of one part.
        results = [one(jax.tree.map(lambda array, index=index: array[index], parts), index) for index in range(count)]
        gradients, sums, collections = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *results)
    else:
        shapes = jax.eval_shape(one, jax.tree.map(lambda array: array[0], parts), 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def body(carry: Any, item: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, one(*item)), None

        (gradients, sums, collections), _ = jax.lax.scan(body, zeros, (parts, jnp.arange(count)))
    mean = jax.tree.map(lambda leaf: (leaf / count).astype(leaf.dtype), collections)
    return gradients, sums, mean


def _prepared(recipe: Recipe, batch: Batch, mesh: Mesh | None) -> Batch:
    batch = dict(batch)
    if mesh is not None and mesh.size > 1:
        batch = jax.lax.with_sharding_constraint(batch, sharding.batch(mesh))
    return batch if recipe.prepare is None else recipe.prepare(batch)


def _augmented(recipe: Recipe, state: TrainState, batch: Batch) -> Batch:
    if recipe.augment is None:
        return batch
    key = streams.stream(state.key, "augment", state.step)
    ids_B = batch["id"] if "id" in batch else jnp.arange(jax.tree.leaves(dict(batch))[0].shape[0])
    return recipe.augment(batch, streams.per_example(key, ids_B), streams.stream(state.key, "mixture", state.step))


def _outputs(recipe: Recipe, state: TrainState, batch: Batch) -> Any:
    params = evaluation_params(recipe.optimizer, state.opt_state, state.params) if state.ema is None else state.ema
    variables = {"params": params} | state.collections
    return adapters.functions(recipe.model).apply(variables, recipe.task.inputs(batch), train=False)[0]


def _average(decay: jax.Array | None, state: TrainState, params: tree.PyTree) -> tree.PyTree:
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: (now * old + (1.0 - now) * new).astype(old.dtype), state.ema, params)


def _advance(position: Position, count: int, length: int | None) -> Position:
    if length is None:
        return dataclasses.replace(position, offset=position.offset + np.uint32(count))
    epoch, offset = order.advance(position.epoch, position.offset, np.uint32(count), np.uint32(length))
    return dataclasses.replace(position, epoch=epoch, offset=offset)
