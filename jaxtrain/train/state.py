"""The state of training: one frozen pytree of everything that changes over time, and how it is
initialized on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain import adapters, optimizers, precision, rng, tree
from jaxtrain.errors import UserError
from jaxtrain.parallel import sharding
from jaxtrain.precision import stochastic_rounding
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.schedules import FromFunction
from jaxtrain.tasks import Task
from jaxtrain.train import hyper
from jaxtrain.train.recipe import Recipe
from jaxtrain.tree import Batch, Shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and all that a checkpoint holds."""

    step: jax.Array
    """Updates done, int32."""
    params: tree.PyTree
    opt_state: tree.PyTree
    collections: dict[str, tree.PyTree]
    """The model's other variables, such as batch statistics."""
    ema: tree.PyTree
    """The moving average of the parameters, float32 where they are narrower, or None."""
    hyper: dict[str, jax.Array]
    """The numbers of the recipe, float32, by dotted name."""
    key: jax.Array
    """The root of all random streams; it never changes, streams are folded by name and step."""
    position: tree.PyTree
    """Where the order of the data stands; only the order itself knows what is in it."""
    scaling: LossScale | None = None
    """The loss scale of fp16, or None."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each array of a state lies on a mesh."""

    mesh: Mesh
    axes: tree.PyTree
    """The logical axes of each parameter: a tuple of names, or None."""
    state: TrainState
    """A `NamedSharding` for each array."""


def init_state(
    model: Any,
    task: Task,
    optimizer: optimizers.Given,
    batch: Batch | Shapes,
    *,
    seed: int | jax.Array = 0,
    mesh: Mesh | None = None,
    **options: Any,
) -> TrainState:
    """The state before the first step, initialized on the mesh: shapes first, shardings from
    shapes, then the arrays.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.zeros((4, 8)), "label": jnp.zeros(4, jnp.int32)}
    >>> state = init_state(MLP(num_classes=3), Classification(), SGD(), batch)
    >>> int(state.step), round(float(state.hyper["optimizer.learning_rate"]), 3)
    (0, 0.1)

    `batch` shows shapes and dtypes and may be abstract; `options` are fields of `Recipe`. `seed`
    may be a tracer, so `jax.vmap` over seeds makes stacked states. `UserError` if a number of the
    recipe is out of bounds.
    """
    recipe = Recipe(model, task, optimizers.of(optimizer), **options)
    initialize, numbers = initializer(recipe, batch), initial_numbers(recipe)
    start: Any = np.uint32(seed) if isinstance(seed, int) else seed
    if mesh is None:
        return jax.jit(initialize)(numbers, start)
    state = jax.eval_shape(initialize, numbers, start)
    places = place(recipe, state, batch, mesh)
    return jax.jit(initialize, out_shardings=places.state)(numbers, start)


def initial_numbers(recipe: Recipe) -> dict[str, np.float32]:
    """The numbers of a recipe as `TrainState.hyper` holds them."""
    return {name: np.float32(value) for name, value in hyper.collect(recipe).items()}


def initializer(
    recipe: Recipe, batch: Batch | Shapes, axes: tree.PyTree | None = None
) -> Callable[..., TrainState]:
    """The pure function `(numbers, seed) -> state` that makes the state before the first step;
    `batch` may be abstract, and `axes` spares the reading of the logical axes."""
    if isinstance(recipe.schedule, FromFunction):
        rate = float(recipe.optimizer.learning_rate)
        recipe.schedule.check(learning_rate=rate, total_steps=recipe.total_steps)
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    axes = parameter_axes(recipe, batch) if axes is None else axes

    def initialize(numbers: dict[str, jax.Array], seed: jax.Array) -> TrainState:
        key = rng.root(seed)
        inputs = recipe.inputs({name: jnp.zeros(*spec) for name, spec in shapes.items()})
        variables = adapters.functions(recipe.model).init(rng.stream(key, "init", 0), inputs)
        params = jax.tree.map(_strong, variables.pop("params"))
        recipe.optimizer.check(params)
        opt_state, average = beginning(recipe, params, numbers, key, axes)
        scaling = LossScale.new() if precision.POLICIES[recipe.precision].scaled else None
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=opt_state,
            collections=jax.tree.map(_strong, variables),
            ema=average,
            hyper=numbers,
            key=key,
            position=recipe.order.start(seed),
            scaling=scaling,
        )

    return initialize


def _strong(leaf: Any) -> jax.Array:
    """An array whose dtype is its own: a weak one would be another after a step, which compiles a
    second program."""
    array = jnp.asarray(leaf)
    return (
        jax.lax.convert_element_type(array, array.dtype)
        if getattr(array, "weak_type", False)
        else array
    )


def _begun_average(leaf: jax.Array) -> jax.Array:
    # An average moves by a thousandth of its distance or less, which bfloat16 and float16 round
    # to nothing.
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else jnp.copy(leaf)


def beginning(
    recipe: Recipe,
    params: tree.PyTree,
    numbers: dict[str, jax.Array],
    key: jax.Array,
    axes: tree.PyTree,
) -> tuple[tree.PyTree, tree.PyTree]:
    """The optimizer's state and the average, or None, before the first step from these
    parameters."""
    _check_rounding(recipe, params)
    optimizer = hyper.bind(recipe.optimizer, numbers, "optimizer")
    transform = optimizer.transform(params, optimizer.learning_rate, axes)
    average = None if recipe.ema_decay is None else jax.tree.map(_begun_average, params)
    opt_state = transform.init(params)
    if recipe.optimizer_state == "bf16":
        opt_state = stochastic_rounding.to_bf16(opt_state, rng.stream(key, "rounding", 0))
    return opt_state, average


def _check_rounding(recipe: Recipe, params: tree.PyTree) -> None:
    if recipe.optimizer_state == "bf16" and recipe.optimizer.holds_parameters(params):
        kind = type(recipe.optimizer).__name__
        raise UserError(
            f"--optimizer_state=bf16: {kind} keeps copies of the parameters in its state, and would"
            " round them; use --optimizer_state=fp32"
        )


def place(
    recipe: Recipe,
    state: TrainState,
    batch: Batch | Shapes,
    mesh: Mesh,
    axes: tree.PyTree | None = None,
) -> Placement:
    """Where each array of a state lies; `state` and `batch` may be abstract, and `axes` spares the
    reading of the logical axes."""
    axes = parameter_axes(recipe, batch) if axes is None else axes
    placed = sharding.parameters(state.params, axes, mesh, rules=recipe.shard)
    replicate = sharding.replicated(mesh)
    rest = jax.tree.map(lambda _: replicate, state)
    opt_state = sharding.like_parameters(state.opt_state, state.params, placed, mesh)
    if recipe.offload == "optimizer":
        opt_state = jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), opt_state)
    ema = None if state.ema is None else placed
    everything = dataclasses.replace(rest, params=placed, opt_state=opt_state, ema=ema)
    return Placement(mesh, axes, everything)


def parameter_axes(recipe: Recipe, batch: Batch | Shapes) -> tree.PyTree:
    """The logical axes of each parameter, by which sharding knows where it lies, and the optimizer
    what it is; `batch` may be abstract."""
    inputs = jax.eval_shape(recipe.inputs, dict(batch))
    return adapters.logical_axes(recipe.model, inputs)["params"]


def with_sharding(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, and where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def on_device(recipe: Recipe, opt_state: tree.PyTree) -> tree.PyTree:
    """The optimizer's state in the device's memory."""
    if recipe.offload == "optimizer":
        return jax.device_put(opt_state, jax.memory.Space.Device)
    return opt_state


def working_opt_state(
    recipe: Recipe, state: TrainState, transform: optax.GradientTransformation
) -> tree.PyTree:
    """The optimizer's state as arithmetic wants it: in the device's memory, and in the dtypes that
    `transform` gave it."""
    opt_state = on_device(recipe, state.opt_state)
    if recipe.optimizer_state == "fp32":
        return opt_state
    return stochastic_rounding.to_fp32(opt_state, jax.eval_shape(transform.init, state.params))
