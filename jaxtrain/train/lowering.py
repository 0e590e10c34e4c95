"""The programs of a recipe on a mesh, lowered from shapes alone; only `initialize` makes arrays.

`lower(recipe, batch, mesh)` is what a training run compiles, `--compare_meshes` runs, and
`scripts/wire.py` reads for machines that are not here. It opens no file and asks no device.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.parallel import sharding
from jaxtrain.train import steps
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import (
    Placement,
    TrainState,
    beginning,
    initial_numbers,
    initializer,
    parameter_axes,
    place,
    with_sharding,
)
from jaxtrain.tree import Batch, Shapes


@dataclasses.dataclass(frozen=True)
class Programs:
    """What trains and evaluates by one recipe on one mesh. Each program is traced when it is asked
    for, and once."""

    recipe: Recipe
    mesh: Mesh
    batch: Shapes
    """Shapes and dtypes of one global training batch."""
    state: TrainState
    """Shapes, dtypes and shardings."""
    places: Placement
    initializer: Any
    """`(numbers, seed) -> state`; traced once for the shapes and the arrays."""

    def initialize(self, seed: int) -> TrainState:
        """The state before the first step, initialized where it lies."""
        initialize = jax.jit(self.initializer, out_shardings=self.places.state)
        return initialize(initial_numbers(self.recipe), np.uint32(seed))

    def initialize_alone(self, seed: int) -> TrainState:
        """The same state by a program for one device, which rounds alike for every mesh."""
        return jax.jit(self.initializer)(initial_numbers(self.recipe), np.uint32(seed))

    def restart(self, state: TrainState) -> TrainState:
        """The state before the first step from the parameters that `state` holds: its optimizer's
        state and average made for these, for some optimizers keep copies of them."""

        def restarted(state: TrainState) -> tuple[Any, Any]:
            return beginning(self.recipe, state.params, state.hyper, state.key, self.places.axes)

        where = self.places.state
        opt_state, ema = jax.jit(restarted, out_shardings=(where.opt_state, where.ema))(state)
        return dataclasses.replace(state, opt_state=opt_state, ema=ema)

    @property
    def batch_size(self) -> int:
        """How many examples a global batch has."""
        return num_examples(self.batch)

    def batch_with_ids(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch as the data pipeline gives it, with the `id` of each example."""
        return {"id": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32), **self.batch}

    @functools.cached_property
    def train_step(self) -> Any:
        """`(state, batch) -> (state, sums)`, which takes over the state that it is given."""
        return steps.jit_train_step(self.recipe, self.mesh, self.places)

    @functools.cached_property
    def train_steps(self) -> steps.TrainSteps:
        """`(state, data, count) -> (state, sums)` over data in device memory."""
        size = self.batch_size
        return steps.jit_train_steps(self.recipe, self.mesh, self.places, batch_size=size)

    @functools.cached_property
    def gradients(self) -> Any:
        """`(state, batch) -> (gradients, sums)`, and nothing changed."""
        return steps.jit_gradients(self.recipe, self.mesh, self.places)

    @functools.cached_property
    def eval_step(self) -> Any:
        """`(state, batch) -> sums`."""
        return steps.jit_eval_step(self.recipe, self.mesh, self.places)

    @functools.cached_property
    def predict_step(self) -> Any:
        """`(state, batch) -> what the task's examine says`."""
        return steps.jit_predict_step(self.recipe, self.mesh, self.places)

    @functools.cached_property
    def measuring_step(self) -> Any:
        """`(state, batch) -> (sums, what the task's examine says)`."""
        return steps.jit_measuring_step(self.recipe, self.mesh, self.places)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step, lowered for a batch with the `id` of each example."""
        return self.train_step.lower(self.state, laid_out(self.batch_with_ids(), self.mesh))

    def lower_eval_step(self) -> jax.stages.Lowered:
        """The evaluation step, lowered for a batch of the training batch's shape."""
        weight = jax.ShapeDtypeStruct((self.batch_size,), jnp.float32)
        batch = {**self.batch_with_ids(), "weight": weight}
        return self.eval_step.lower(self.state, laid_out(batch, self.mesh))

    def state_bytes(self) -> int:
        """Bytes of the state on one device."""
        return sharding.bytes_per_device(self.state, self.places.state)

    def batch_bytes(self) -> int:
        """Bytes of a batch's fields on one device; without the ids, which a program takes only if
        it augments by example."""
        rows = laid_out(self.batch, self.mesh)
        return sharding.bytes_per_device(rows, {name: leaf.sharding for name, leaf in rows.items()})


def lower(recipe: Recipe, batch: Batch | Shapes, mesh: Mesh) -> Programs:
    """The programs of a recipe for batches of these shapes on this mesh.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.parallel import mesh
    >>> from jaxtrain.tasks import Classification
    >>> shapes = {
    ...     "image": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    ...     "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    ... }
    >>> recipe = Recipe(MLP(num_classes=3, widths=()), Classification(), SGD())
    >>> programs = lower(recipe, shapes, mesh.make("data:1"))
    >>> "dot_general" in programs.lower_train_step().as_text()
    True

    `batch` may be abstract, and the mesh may be of devices that are only described (see
    `plan.gpu_target`). `UserError` if a parameter does not fit the mesh.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in dict(batch).items()
    }
    axes = parameter_axes(recipe, shapes)  # read once, for the optimizer and the mesh
    initialize = jax.jit(initializer(recipe, shapes, axes), inline=True)
    state = jax.eval_shape(initialize, initial_numbers(recipe), np.uint32(0))
    places = place(recipe, state, shapes, mesh, axes)
    laid = jax.tree.map(with_sharding, state, places.state)
    return Programs(recipe, mesh, shapes, laid, places, initialize)


def laid_out(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch, split over the mesh as batches are."""
    return {name: with_sharding(leaf, sharding.batch(mesh)) for name, leaf in batch.items()}


def num_examples(batch: Mapping[str, Any]) -> int:
    """How many examples a batch has."""
    return next(iter(batch.values())).shape[0]
