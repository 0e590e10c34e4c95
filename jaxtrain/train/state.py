"""The state of training: one frozen pytree of everything that changes over time, and its birth on
the mesh."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import adapters, precision, rng, tree
from jaxtrain.errors import UserError
from jaxtrain.optimizers import Optimizer
from jaxtrain.parallel import sharding
from jaxtrain.precision import stochastic_rounding
from jaxtrain.precision.loss_scale import LossScale
from jaxtrain.tasks import Task
from jaxtrain.train import hyper
from jaxtrain.train.recipe import Batch, Options, Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Position:
    """Which example comes next: `offset` examples of epoch `epoch` are consumed, in the order that
    belongs to `seed`. All uint32 scalars."""

    seed: jax.Array
    epoch: jax.Array
    offset: jax.Array


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
    """The moving average of the parameters, or None."""
    hyper: dict[str, jax.Array]
    """The numbers of the recipe, float32, by dotted name."""
    key: jax.Array
    """The root of all random streams; it never changes, streams are folded by name and step."""
    position: Position
    scaling: LossScale | None = None
    """The loss scale of fp16, or None."""


def init_state(
    model: Any,
    task: Task,
    optimizer: Optimizer,
    batch: Batch,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    **options: Unpack[Options],
) -> TrainState:
    """The state before the first step, born on the mesh: shapes first, shardings from shapes, then
    the arrays.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.zeros((4, 8)), "label": jnp.zeros(4, jnp.int32)}
    >>> state = init_state(MLP(num_classes=3), Classification(), SGD(), batch)
    >>> int(state.step), round(float(state.hyper["optimizer.learning_rate"]), 3)
    (0, 0.1)

    `batch` shows shapes and dtypes and may be abstract. `ValueError` if a number of the recipe is
    out of bounds.
    """
    recipe = Recipe(model, task, optimizer, **options)
    if recipe.optimizer_state == "bf16" and optimizer.keeps_parameters:
        kind = type(optimizer).__name__
        raise UserError(
            f"--optimizer_state=bf16: {kind} keeps copies of the parameters in its state, and would"
            " round them; use --optimizer_state=fp32"
        )
    numbers = hyper.collect(recipe)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(batch))

    def born(numbers: dict[str, jax.Array]) -> TrainState:
        key = rng.root(seed)
        inputs = recipe.inputs(
            {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
        )
        variables = adapters.functions(model).init(rng.stream(key, "init", 0), inputs)
        params = variables.pop("params")
        transform = hyper.bind(optimizer, numbers, "optimizer").transform(
            params, numbers["optimizer.learning_rate"]
        )
        start = Position(*(jnp.asarray(np.uint32(value)) for value in (seed, 0, 0)))
        average = None if recipe.ema_decay is None else jax.tree.map(jnp.copy, params)
        opt_state = transform.init(params)
        if recipe.optimizer_state == "bf16":
            opt_state = stochastic_rounding.to_bf16(opt_state, rng.stream(key, "rounding", 0))
        scaling = LossScale.new() if precision.POLICIES[recipe.precision].scaled else None
        return TrainState(
            jnp.int32(0), params, opt_state, variables, average, numbers, key, start, scaling
        )

    values = {name: np.float32(value) for name, value in numbers.items()}
    if mesh is None:
        return jax.jit(born)(values)
    return jax.jit(
        born, out_shardings=state_shardings(recipe, shapes, jax.eval_shape(born, values), mesh)
    )(values)


def state_shardings(recipe: Recipe, batch: Batch, state: TrainState, mesh: Mesh) -> TrainState:
    """A `NamedSharding` for each array of an (abstract) state."""
    _, placed = parameter_places(
        recipe, jax.eval_shape(recipe.inputs, dict(batch)), state.params, mesh
    )
    replicate = sharding.replicated(mesh)
    rest = jax.tree.map(lambda _: replicate, state)
    opt_state = sharding.like_parameters(state.opt_state, state.params, placed, mesh)
    if recipe.offload == "optimizer":
        opt_state = jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), opt_state)
    return dataclasses.replace(
        rest, params=placed, opt_state=opt_state, ema=None if state.ema is None else placed
    )


def parameter_places(
    recipe: Recipe, inputs: Any, params: tree.PyTree, mesh: Mesh
) -> tuple[tree.PyTree, tree.PyTree]:
    """The logical axes of each parameter and its `NamedSharding`; `inputs` and `params` may be
    abstract."""
    axes = adapters.logical_axes(recipe.model, inputs)["params"]
    return axes, sharding.parameters(params, axes, mesh, rules=recipe.shard)


def working_opt_state(recipe: Recipe, state: TrainState) -> tree.PyTree:
    """The optimizer's state as arithmetic wants it: in the device's memory, and in the dtypes that
    the optimizer gave it."""
    opt_state = state.opt_state
    if recipe.offload == "optimizer":
        opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
    if recipe.optimizer_state == "fp32":
        return opt_state
    return stochastic_rounding.to_fp32(
        opt_state, jax.eval_shape(recipe.optimizer.transform(state.params, 1.0).init, state.params)
    )
