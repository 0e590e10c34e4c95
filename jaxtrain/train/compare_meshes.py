"""Comparing meshes: the same steps on one device and on other layouts of devices, and the first
parameter that tells them apart.

A run of many steps answers nothing, for rounding grows: a network with dropout is 4e-3 away after
twenty. So each mesh is asked twice: for a few steps of its own from its own initial state (which
tries the update, too), and for many single steps, each from a state of the one-device run.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain import metrics, optimizers, tree
from jaxtrain.errors import UserError
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.tasks import Task
from jaxtrain.train import lowering
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState

HostBatch = Mapping[str, np.ndarray]
FREE_STEPS = 5
"""How many steps each mesh runs on its own."""
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "fp8": 1e-1}
"""Relative differences up to here are rounding, by what the model computes in: a few units in the
last place. On small networks 1.7e-6 was found for fp32, 1.2e-3 for fp16 and 2.8e-3 for bf16; what a
broken layout does is of order 1."""
TF32 = 5e-3
"""The same for float32 products in TF32, whose operands have 10 bits of mantissa as float16's."""
FLOOR = 0.1
"""An array is judged by its own largest gradient, or by this share of the largest of all, whichever
is larger. A gradient whose true value is zero (a bias before a batch norm, the bias of attention's
keys) is nothing but the rounding of its terms: as far from itself as can be, and 1.6e-7 of the
largest of all in a small network. What a broken layout does to an array is of the array's own size;
in float32 it is seen where that is more than 1e-6 of the largest."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A parameter whose gradient differs, at which step (from 1), and by how much of its size."""

    step: int
    path: str
    size: float


@dataclasses.dataclass(frozen=True)
class Compared:
    """What was found on one mesh; all differences are relative to one device."""

    mesh: str
    free_run_losses: tuple[float, ...]
    """Of the losses of the first steps of its own run."""
    loss: float
    """The largest of the losses of the single steps."""
    gradient: float
    """The largest of the gradients of the single steps."""
    first: Difference | None
    """The first parameter in the tree's order, at the first step that has one, whose gradient
    differs beyond rounding."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found on each mesh."""

    meshes: tuple[Compared, ...]
    steps: int
    tolerance: float

    def agrees(self, found: Compared) -> bool:
        """Whether a mesh gave the numbers of one device, up to rounding."""
        return (
            found.first is None
            and max(*found.free_run_losses, found.loss, found.gradient) <= self.tolerance
        )

    @property
    def agree(self) -> bool:
        """Whether all meshes gave the numbers of one device, up to rounding."""
        return all(self.agrees(found) for found in self.meshes)

    def rows(self) -> list[tuple[str, tuple[float, ...], float, float, str]]:
        """The rows of `tables.comparison_table`."""
        return [
            (
                found.mesh,
                found.free_run_losses,
                found.loss,
                found.gradient,
                _difference_text(found.first) or "none",
            )
            for found in self.meshes
        ]

    def summary(self) -> str:
        """The last line: that all agree, or the first mesh that does not and what told it apart."""
        for found in self.meshes:
            if not self.agrees(found):
                what = (
                    f"gradient of {_difference_text(found.first)}"
                    if found.first
                    else f"losses by {max(*found.free_run_losses, found.loss):.1e}"
                )
                return (
                    f"--compare_meshes: {found.mesh} differs from one device beyond"
                    f" {self.tolerance:g}: {what}"
                )
        who = "1 mesh agrees" if len(self.meshes) == 1 else f"{len(self.meshes)} meshes agree"
        return f"{who} with one device within {self.tolerance:g} over {self.steps} steps"


def compare(
    model: Any,
    task: Task,
    optimizer: optimizers.Given,
    batches: Iterator[HostBatch],
    mesh_texts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    tolerance: float | None = None,
    devices: Sequence[meshes.Device] | None = None,
    **options: Any,
) -> Comparison:
    """`compare_recipe` for a model, a task, an optimizer and the other fields of `Recipe` by
    name."""
    return compare_recipe(
        Recipe(model, task, optimizers.of(optimizer), **options),
        batches,
        mesh_texts,
        seed=seed,
        steps=steps,
        tolerance=tolerance,
        devices=devices,
    )


def compare_recipe(
    recipe: Recipe,
    batches: Iterator[HostBatch],
    mesh_texts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    tolerance: float | None = None,
    devices: Sequence[meshes.Device] | None = None,
) -> Comparison:
    """Trains on one device and on each mesh with the same batches, and says how far they are apart.

    `batches` are whole batches in host memory, at least `steps` of them; `mesh_texts` are what
    `--mesh` takes, with `x` or commas between axes; `tolerance` None is that of the precision.
    Compiles two programs a mesh. `UserError` if a mesh, the batch or a parameter does not fit,
    before anything is compiled.
    """
    if jax.process_count() > 1:
        dry = "XLA_FLAGS=--xla_force_host_platform_device_count=8"
        raise UserError(f"--compare_meshes: needs all devices in one process; rehearse with {dry}")
    devices = jax.devices() if devices is None else devices
    asked = jax.config.values["jax_default_matmul_precision"]
    if tolerance is None:
        tf32 = asked == "tensorfloat32" and devices[0].platform == "gpu"
        tolerance = max(TOLERANCES[recipe.precision], TF32 if tf32 else 0.0)
    kept = list(itertools.islice(batches, steps))
    if len(kept) < steps:
        raise UserError(
            f"--compare_steps={steps}: there are only {len(kept)} batches; give at most as many"
        )
    layouts = [_Layout.of(recipe, seed, text, devices, kept[0]) for text in mesh_texts]
    alone = _Layout.of(recipe, seed, "data:1", devices[:1], kept[0])
    found = []
    # TF32 would round what is to be compared, unless somebody asked for it
    with jax.default_matmul_precision(asked or "highest"):
        losses, singles = _single_steps(alone, layouts, kept, tolerance)
        for layout, (loss, gradient, first) in zip(layouts, singles, strict=True):
            free = tuple(
                relative(*both)
                for both in zip(layout.losses(kept[:FREE_STEPS]), losses, strict=False)
            )
            found.append(
                Compared(meshes.describe(layout.programs.mesh), free, loss, gradient, first)
            )
    return Comparison(tuple(found), steps, tolerance)


def relative(value: float, reference: float) -> float:
    """How far two numbers are apart, as a share of the larger one; infinite where one alone is not
    finite.

    >>> relative(3.0, 4.0), relative(0.0, 0.0), relative(float("nan"), 1.0)
    (0.25, 0.0, inf)
    """
    if value == reference or (np.isnan(value) and np.isnan(reference)):
        return 0.0
    if not (np.isfinite(value) and np.isfinite(reference)):
        return float("inf")
    return abs(value - reference) / max(abs(value), abs(reference))


def gradient_differences(gradients: tree.PyTree, reference: tree.PyTree) -> dict[str, float]:
    """For each array, by path: the largest difference, as a share of its largest gradient or of
    `FLOOR` of the tree's largest.

    >>> gradient_differences(
    ...     {"a": np.array([3.0, 4.0]), "b": np.array([1e-9])},
    ...     {"a": np.array([3.0, 8.0]), "b": np.array([-1e-9])},
    ... )
    {'a': 0.5, 'b': 2.5e-09}
    """
    flat, other = tree.flatten(reference), tree.flatten(gradients)
    sizes = {
        path: np.abs(np.where(np.isfinite(array), array, 0)).max(initial=0.0)
        for path, array in flat.items()
    }
    floor = FLOOR * max(sizes.values(), default=0.0)
    return {
        path: _array_difference(other[path], array, max(sizes[path], floor))
        for path, array in flat.items()
    }


def _array_difference(array: np.ndarray, reference: np.ndarray, size: float) -> float:
    is_complex = np.iscomplexobj(array) or np.iscomplexobj(reference)
    kind = np.complex128 if is_complex else np.float64
    array, reference = (np.asarray(each, kind) for each in (array, reference))
    differs = ~((array == reference) | (np.isnan(array) & np.isnan(reference)))
    if not differs.any():
        return 0.0
    if not (
        np.isfinite(array[differs]).all() and np.isfinite(reference[differs]).all() and size > 0
    ):
        return float("inf")
    return float(np.abs(array[differs] - reference[differs]).max() / size)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One mesh, and the run on it."""

    programs: lowering.Programs
    seed: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        seed: int,
        text: str,
        devices: Sequence[meshes.Device],
        batch: HostBatch,
    ) -> "_Layout":
        """`UserError` if the batch or a parameter does not fit the mesh."""
        mesh = meshes.make(text, devices, flag="--compare_meshes")
        meshes.check_batch("batch_size", lowering.num_examples(batch), mesh)
        return cls(lowering.lower(recipe, jax.eval_shape(dict, batch), mesh), seed)

    def initial(self) -> TrainState:
        """The state before the first step."""
        return self.programs.initialize(self.seed)

    def gradients(self, state: TrainState, batch: HostBatch) -> tuple[tree.PyTree, float]:
        """The gradients, in host memory, and the loss of a state from anywhere."""
        here = jax.device_put(state, self.programs.places.state)
        gradients, sums = jax.device_get(self.programs.gradients(here, self.put(batch)))
        return gradients, _mean_loss(sums)

    def put(self, batch: HostBatch) -> dict[str, jax.Array]:
        """A batch on the mesh."""
        return jax.device_put(dict(batch), sharding.batch(self.programs.mesh))

    def losses(self, batches: Sequence[HostBatch]) -> list[float]:
        """The losses of a run of its own, a step a batch."""
        update, state, losses = self.programs.train_step, self.initial(), []
        for batch in batches:
            state, sums = update(state, self.put(batch))
            losses.append(_mean_loss(jax.device_get(sums)))
        return losses


def _single_steps(
    alone: _Layout, layouts: Sequence[_Layout], batches: Sequence[HostBatch], tolerance: float
) -> tuple[list[float], list[tuple[float, float, Difference | None]]]:
    """The losses of the one-device run; and for each mesh, over single steps from the states of
    that run, the largest difference of loss and of gradient, and the first parameter to differ."""
    update, state, losses = alone.programs.train_step, alone.initial(), []
    found: list[tuple[float, float, Difference | None]] = [(0.0, 0.0, None)] * len(layouts)
    for index, batch in enumerate(batches, start=1):
        wanted, wanted_loss = alone.gradients(state, batch)
        for place, layout in enumerate(layouts):
            given, given_loss = layout.gradients(state, batch)
            differences = gradient_differences(given, wanted)
            beyond = next(
                (
                    Difference(index, path, size)
                    for path, size in differences.items()
                    if size > tolerance
                ),
                None,
            )
            loss, gradient, first = found[place]
            found[place] = (
                max(loss, relative(given_loss, wanted_loss)),
                max(gradient, *differences.values()),
                first or beyond,
            )
        state, sums = update(state, alone.put(batch))
        losses.append(_mean_loss(jax.device_get(sums)))
    return losses, found


def _mean_loss(sums: metrics.Sums) -> float:
    total, count = sums["loss"]
    return float(total) / max(float(count), 1e-9)


def _difference_text(difference: Difference | None) -> str:
    return (
        ""
        if difference is None
        else f"{difference.path} by {difference.size:.1e} at step {difference.step}"
    )
