"""What is compiled: how the programs of a run are executed, and the training program behind its
feed.

`Sharded` runs each program once over the whole mesh; `Reproducible` runs programs for one device
and adds their results in a fixed tree. A run chooses one of them, once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import metrics, tasks, tree
from jaxtrain.checkpoints import arrays
from jaxtrain.data.pipeline import BatchLoader
from jaxtrain.errors import UserError
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.train import evaluate, explain, feeds, reproducible, train_step
from jaxtrain.train.lowering import Programs
from jaxtrain.train.state import TrainState
from jaxtrain.tree import Batch

Source = Batch | BatchLoader
"""Where training batches come from: data in device memory, or a stream."""
EvaluateBatches = Callable[[TrainState, Iterator[Batch]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Training:
    """The compiled training program behind its feed, and what it needs."""

    feed: feeds.Feed
    per_call: int
    flops_per_step: float
    memory: dict[str, int]
    """Bytes on one device by what they are for."""
    copied: int = 0
    """Bytes of the state that the program does not take over but keeps twice; none, unless
    something is wrong."""


class Execution(Protocol):
    """How the programs of a run are executed."""

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        ...

    @property
    def parts_word(self) -> str:
        """What a batch is divided among, for messages."""
        ...

    @property
    def parts(self) -> int:
        """Among how many of them every batch must divide."""
        ...

    def check(self, batch_size: int) -> None:
        """`UserError` if the batch cannot be divided on this mesh."""
        ...

    def initialize(self, programs: Programs, seed: int) -> TrainState:
        """The state before the first step."""
        ...

    def training(
        self, programs: Programs, source: Source, *, per_call: int | None, most: int
    ) -> Training:
        """The compiled training program; `per_call` None lets the work of a step decide how many
        steps a dispatch runs, at most `most`."""
        ...

    def evaluation(self, programs: Programs) -> EvaluateBatches:
        """`(state, batches) -> means of the metrics`; one program for all splits."""
        ...


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Each program runs over the whole mesh at once; XLA divides it among the devices."""

    mesh: Mesh
    debug_nans: bool = False
    parts_word = "devices"

    @property
    def parts(self) -> int:
        """The devices that a batch is split over."""
        return meshes.batch_shards(self.mesh)

    def check(self, batch_size: int) -> None:
        """`UserError` if the batch cannot be split over the mesh."""
        meshes.check_batch("batch_size", batch_size, self.mesh)

    def initialize(self, programs: Programs, seed: int) -> TrainState:
        """The state before the first step, initialized where it lies."""
        return programs.initialize(seed)

    def training(
        self, programs: Programs, source: Source, *, per_call: int | None, most: int
    ) -> Training:
        """The training step, or several of them in a dispatch where the data lies on the device."""
        platform = self.mesh.devices.flat[0].platform
        # XLA counts the body of a loop once, and off the CPU the microbatches are a loop.
        repeats = 1 if platform == "cpu" else programs.recipe.microbatches
        if isinstance(source, BatchLoader):
            step, chosen, data = programs.train_step, 1, None
            with _said(programs):
                lowered = programs.lower_train_step()
            compiled = lowered.compile()
            feed: feeds.Feed = feeds.LoaderFeed(
                _checked(step) if self.debug_nans else compiled, source
            )
        else:
            steps, data = programs.train_steps, source
            count = feeds.device_count(1, data)
            with _said(programs):
                lowered = steps.single.lower(programs.state, data, count)
            chosen = per_call or feeds.steps_per_call(lowered, platform, most)
            chosen = 1 if self.debug_nans else chosen
            looped = steps.several.lower(programs.state, data, count) if chosen > 1 else lowered
            compiled = looped.compile()
            program = _checked(steps.single) if self.debug_nans else compiled
            feed = feeds.ResidentFeed(program, data)
        flops = repeats * feeds.flops_of(lowered)
        needs = _memory(programs.state, data, compiled)
        copied = 0 if self.debug_nans else _undonated_bytes(programs.state, compiled)
        return Training(feed, chosen, flops, needs, copied)

    def evaluation(self, programs: Programs) -> EvaluateBatches:
        """Evaluation by one program over the mesh."""
        compiled: set[evaluate.ShapeKey] = set()
        task: Any = programs.recipe.task
        measures = tasks.measures_whole_sets(task)

        def means(state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
            if measures:
                return evaluate.measure(
                    programs.measuring_step,
                    state,
                    batches,
                    whole=task.evaluate,
                    compiled=compiled,
                )
            return evaluate.evaluate(programs.eval_step, state, batches, compiled=compiled)

        return means


@dataclasses.dataclass(frozen=True)
class Reproducible:
    """Programs for one device, which round alike on every mesh; see `train/reproducible.py`."""

    mesh: Mesh
    parts: int
    parts_word = "logical shards"

    def check(self, batch_size: int) -> None:
        """`UserError` if the mesh or the batch cannot be cut into the logical shards."""
        reproducible.check(self.mesh, self.parts, batch_size)
        meshes.check_batch("batch_size", batch_size, self.mesh)

    def initialize(self, programs: Programs, seed: int) -> TrainState:
        """The state before the first step, by a program for one device, laid out afterwards."""
        whole = programs.initialize_alone(seed)
        return arrays.to_devices(arrays.to_host(whole), programs.state)

    def training(
        self, programs: Programs, source: Source, *, per_call: int | None, most: int
    ) -> Training:
        """Training by programs that are compiled at their first call."""
        recipe, resident = programs.recipe, not isinstance(source, BatchLoader)
        rows = programs.batch_size // self.parts
        part = {
            name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in programs.batch_with_ids().items()
        }
        whole = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), programs.state
        )
        lowered = jax.jit(lambda state, part: train_step.gradients(recipe, state, part)).lower(
            whole, part
        )
        platform = self.mesh.devices.flat[0].platform
        chosen = (per_call or feeds.steps_per_call(lowered, platform, most)) if resident else 1
        trainer = reproducible.Trainer(recipe, self.mesh, self.parts)
        each = self.parts // self.mesh.size
        data = None if isinstance(source, BatchLoader) else source
        return Training(
            feeds.ReproducibleFeed(trainer, source, programs.batch_size),
            chosen,
            self.parts * feeds.flops_of(lowered),
            _reproducible_memory(programs.state, data, self.mesh, each),
        )

    def evaluation(self, programs: Programs) -> EvaluateBatches:
        """Evaluation by logical shards."""
        trainer = reproducible.Trainer(programs.recipe, self.mesh, self.parts)
        compiled: set[evaluate.ShapeKey] = set()
        task: Any = programs.recipe.task
        measures = tasks.measures_whole_sets(task)

        def means(state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
            copies = trainer.copies(state)  # once a pass, and freed after it
            if measures:
                return evaluate.measure(
                    lambda _, batch: trainer.measure(copies, trainer.cut(batch)),
                    state,
                    batches,
                    whole=task.evaluate,
                    compiled=compiled,
                )

            def step(_: TrainState, batch: Batch) -> metrics.Sums:
                return trainer.evaluate(copies, trainer.cut(batch))

            return evaluate.evaluate(step, state, batches, compiled=compiled)

        return means


@contextlib.contextmanager
def _said(programs: Programs) -> Iterator[None]:
    """Makes one line of what a precision lacks and shapes alone do not show, such as
    `jnp.linalg.inv` of bfloat16: only lowering finds out."""
    try:
        yield
    except NotImplementedError as error:
        recipe = programs.recipe
        if recipe.precision == "fp32" or "dtype" not in str(error):
            raise
        where = f"model={explain.name_of(recipe.model)}"
        raise UserError(explain.needs_float32(recipe.precision, where, error)) from error


def _checked(jitted: Any) -> Any:
    """The step as --debug_nans needs it: one that made a NaN runs again, operation by operation, so
    that jax can say which one it was."""
    # takes over no state: there must be something to run again from
    kept = jax.jit(jitted.__wrapped__)

    def call(*arguments: Any) -> Any:
        result = kept(*arguments)
        numbers = [
            leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        if any(np.isnan(number).any() for number in jax.device_get(numbers)):
            jitted.__wrapped__(*arguments)  # raises FloatingPointError
        return result

    return call


def _memory(state: TrainState, data: Batch | None, compiled: Any) -> dict[str, int]:
    analysis = None if compiled is None else compiled.memory_analysis()
    parts: Mapping[str, tree.PyTree] = {
        "parameters": (state.params, state.collections),
        "optimizer state": state.opt_state,
        "averaged parameters": state.ema,
        "data": data,
    }
    sizes = {name: state_bytes(part) for name, part in parts.items()}
    sizes["gradients, activations, scratch"] = int(getattr(analysis, "temp_size_in_bytes", 0) or 0)
    return {name: size for name, size in sizes.items() if size}


def _reproducible_memory(
    state: TrainState, data: Batch | None, mesh: Mesh, each: int
) -> dict[str, int]:
    """What reproducible steps hold besides: a whole state where only a part is kept, and the
    gradients of each of a device's logical shards."""
    leaves = jax.tree.leaves(state)
    whole = sharding.bytes_per_device(leaves, [sharding.replicated(mesh)] * len(leaves))
    more = {
        "whole state while computing": whole if whole > state_bytes(state) else 0,
        f"gradients of {each} logical shard{'s' if each > 1 else ''} and their sum": (
            (each + 1) * 4 * tree.size(state.params)
        ),
    }
    return _memory(state, data, None) | {name: size for name, size in more.items() if size}


def _undonated_bytes(state: TrainState, compiled: Any) -> int:
    """Bytes of the donated state whose buffers the compiled program does not use again."""
    analysis = compiled.memory_analysis()
    taken = getattr(analysis, "alias_size_in_bytes", None)
    if taken is None:
        return 0
    # a GPU's program counts what lies in the host's memory apart
    taken += getattr(analysis, "host_alias_size_in_bytes", 0)
    return max(0, state_bytes(state) + state_bytes(state, host=True) - taken)


def state_bytes(state: tree.PyTree, *, host: bool = False) -> int:
    """How many bytes of a state, or of a part, each device holds; or its host does for it
    (--offload)."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(state)
        if hasattr(leaf, "sharding") and (leaf.sharding.memory_kind == "pinned_host") == host
    ]
    return sharding.bytes_per_device(leaves, [leaf.sharding for leaf in leaves])
