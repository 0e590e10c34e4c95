"""Reproducible steps: the same bits on any number of devices and processes.

A compiler rounds one way inside one program and another way inside another, so no program here
knows how many devices there are. The global batch is cut into logical shards. One program, for one
device, takes the total of one shard; another, for one device, turns the total of all into the next
state. Between the two stands a fixed binary tree of additions, and an addition of two numbers
rounds alike everywhere. Whatever else depends on the layout moves numbers without changing them.

So every device computes with a whole copy of the state, also where it keeps only its part of it
between two calls (the axis fsdp).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain import adapters, metrics, optimizers, tree
from jaxtrain.data import pipeline
from jaxtrain.data.order import Shuffled
from jaxtrain.errors import UserError
from jaxtrain.parallel import mesh as meshes
from jaxtrain.parallel import sharding
from jaxtrain.processes import group
from jaxtrain.tasks import Task
from jaxtrain.train import collection_sums, train_step
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState, parameter_axes
from jaxtrain.tree import Batch

COMPILER: dict[str, dict[str, Any]] = {
    # Eigen cuts long sums by the number of threads, which follows the number of devices and of
    # cores.
    "cpu": {"xla_cpu_multi_thread_eigen": False},
    # Atomic additions come in any order, and autotuning may choose another kernel on another card.
    "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}
"""What every program that rounds is compiled with."""
AXIS = "shards"
NAMED_AXES = (
    "--reproducible: the model has collectives over the axis {axis!r}, and its logical shards are"
    " programs of their own; build it without (axis_name=None: batch statistics of each shard), or"
    " leave --reproducible out"
)
"""Said of models whose numbers would be those of a shard, not of the batch."""

Packed = dict[str, jax.Array]
"""A tree as one vector (1, N) for each dtype."""


def check(mesh: Mesh, shards: int, batch_size: int) -> None:
    """`UserError` if the mesh or the batch cannot be cut into this many logical shards.

    >>> check(meshes.make("data:1"), 8, 12)
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: --logical_shards=8: must divide --batch_size=12; use another of both
    """
    others = [
        axis for axis, size in mesh.shape.items() if size > 1 and axis not in meshes.BATCH_AXES
    ]
    if others:
        raise UserError(
            f"--reproducible: the mesh axis {others[0]} splits single sums, whose bits then depend"
            " on it; use data and fsdp"
        )
    if shards % mesh.size:
        raise UserError(
            f"--logical_shards={shards}: must be a multiple of the {mesh.size} devices; use"
            f" --logical_shards={mesh.size} or fewer devices"
        )
    if batch_size % shards:
        raise UserError(
            f"--logical_shards={shards}: must divide --batch_size={batch_size}; use another of both"
        )


def make_train_step(
    model: Any,
    task: Task,
    optimizer: optimizers.Given,
    *,
    mesh: Mesh,
    shards: int = 8,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, metrics.Sums]]:
    """`(state, batch) -> (state, sums)` as `steps.make_train_step` makes it, with the same bits on
    any mesh of the axes data and fsdp.

    >>> from jaxtrain.models import MLP
    >>> from jaxtrain.optimizers import SGD
    >>> from jaxtrain.train.state import init_state
    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.ones((8, 4)), "label": jnp.zeros(8, jnp.int32)}
    >>> parts, mesh = (
    ...     (MLP(num_classes=3, widths=()), Classification(), SGD()),
    ...     meshes.make("data:1"),
    ... )
    >>> state, sums = make_train_step(*parts, mesh=mesh)(
    ...     init_state(*parts, batch, mesh=mesh), batch
    ... )
    >>> int(state.step), float(sums["loss"][1])
    (1, 8.0)

    Batch statistics are those of each shard, and the running averages the mean of theirs (ghost
    batch norm, Hoffer et al. 2017, arXiv 1705.08741); mixtures take partners and weights within a
    shard. The state is taken over (donated).
    """
    trainer = Trainer(Recipe(model, task, optimizers.of(optimizer), **options), mesh, shards)

    def one(state: TrainState, batch: Batch) -> tuple[TrainState, metrics.Sums]:
        copies, sums = trainer.step(trainer.copies(state), trainer.cut(batch))
        return trainer.joined(copies, state), sums

    return one


def make_eval_step(
    model: Any,
    task: Task,
    optimizer: optimizers.Given,
    *,
    mesh: Mesh,
    shards: int = 8,
    **options: Any,
) -> Callable[[TrainState, Batch], metrics.Sums]:
    """`(state, batch) -> sums` as `steps.make_eval_step` makes it, with the same bits on any
    mesh."""
    trainer = Trainer(Recipe(model, task, optimizers.of(optimizer), **options), mesh, shards)
    return lambda state, batch: trainer.evaluate(trainer.copies(state), trainer.cut(batch))


class Trainer:
    """The programs of one recipe on one mesh; `copies` of a state are whole, one for each device of
    this process."""

    def __init__(self, recipe: Recipe, mesh: Mesh, shards: int) -> None:
        check(mesh, shards, shards)
        # Named axes are over the batch, which no program here sees.
        recipe = dataclasses.replace(
            recipe, model=adapters.without_named_axes(recipe.model, NAMED_AXES)
        )
        self._recipe, self._mesh, self._shards = recipe, mesh, shards
        devices = list(mesh.devices.flat)
        self._shard_mesh = Mesh(
            np.asarray(devices, dtype=object), (AXIS,), axis_types=(AxisType.Auto,)
        )
        mine = jax.process_index()
        self.devices = [device for device in devices if device.process_index == mine]
        self._shards_per_device = shards // len(devices)
        """Logical shards of one device."""
        self._first = [self._shards_per_device * devices.index(device) for device in self.devices]
        # Numbers of the shards, on their devices beforehand: inside the loop no transfer is
        # allowed.
        self._index = [
            [
                jax.device_put(np.uint32(first + place), device)
                for place in range(self._shards_per_device)
            ]
            for first, device in zip(self._first, self.devices, strict=True)
        ]
        options = COMPILER.get(devices[0].platform, COMPILER["gpu"])
        self._total = jax.jit(self._packed_total, compiler_options=options)
        self._update = jax.jit(
            self._next_state, compiler_options=options, donate_argnums=0, static_argnums=2
        )
        self._sums = jax.jit(
            lambda state, batch: pack(dict(train_step.evaluation_step(recipe, state, batch))),
            compiler_options=options,
        )
        self._unpack_sums: Any = None
        self._measured = jax.jit(self._packed_measures, compiler_options=options)
        self._end_to_end = jax.jit(
            lambda parts: jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)
        )
        self._everywhere = jax.jit(
            lambda rows: rows, out_shardings=NamedSharding(self._shard_mesh, PartitionSpec())
        )
        self._cut = jax.jit(self._rows)
        self._draw = jax.jit(self._drawn, static_argnums=3)
        self._add = jax.jit(self._added)
        self._whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
        self._lay_out: dict[Any, Any] = {}
        """What lays a whole state out, by its shardings."""

    def copies(self, state: TrainState) -> list[TrainState]:
        """A whole copy of the state on each device."""
        whole = (
            state
            if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
            else self._whole(state)
        )
        leaves, structure = jax.tree.flatten(whole)
        local = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
        return [
            jax.tree.unflatten(structure, [shards[device] for shards in local])
            for device in self.devices
        ]

    def joined(self, copies: Sequence[TrainState], like: TrainState) -> TrainState:
        """The copies as one state again, laid out as `like` is."""
        structure = jax.tree.structure(copies[0])
        places = [leaf.sharding for leaf in jax.tree.leaves(like)]
        rows = [jax.tree.leaves(copy) for copy in copies]
        whole = [
            jax.make_array_from_single_device_arrays(
                parts[0].shape, sharding.replicated(self._mesh), list(parts)
            )
            for parts in zip(*rows, strict=True)
        ]
        if all(place.is_fully_replicated for place in places):
            return jax.tree.unflatten(structure, whole)
        lay = self._lay_out.setdefault(
            tuple(places), jax.jit(lambda leaves: leaves, out_shardings=places)
        )
        return jax.tree.unflatten(structure, lay(whole))

    def cut(self, batch: Batch) -> list[list[Batch]]:
        """A global batch as the logical shards of each device."""
        check(self._mesh, self._shards, len(next(iter(batch.values()))))
        place = sharding.batch(self._mesh)
        laid = {
            name: (
                array
                if isinstance(array, jax.Array) and array.sharding == place
                else group.place(np.asarray(array), place)
            )
            for name, array in batch.items()
        }
        local = {
            name: {shard.device: shard.data for shard in array.addressable_shards}
            for name, array in laid.items()
        }
        return [
            self._cut({name: shards[device] for name, shards in local.items()})
            for device in self.devices
        ]

    def draw(self, copies: Sequence[TrainState], data: Batch, batch_size: int) -> list[list[Batch]]:
        """The next logical shards of each device, gathered from resident data by the state's
        position."""
        local = {
            name: {shard.device: shard.data for shard in array.addressable_shards}
            for name, array in data.items()
        }
        return [
            self._draw(
                copy.position,
                {name: shards[device] for name, shards in local.items()},
                index[0],
                batch_size,
            )
            for copy, device, index in zip(copies, self.devices, self._index, strict=True)
        ]

    def step(
        self, copies: Sequence[TrainState], parts: Sequence[Sequence[Batch]]
    ) -> tuple[list[TrainState], metrics.Sums]:
        """One update of all copies (which are donated), by the logical shards of each device."""
        packed = [
            [self._total(copy, part, place) for part, place in zip(shards, index, strict=True)]
            for copy, shards, index in zip(copies, parts, self._index, strict=True)
        ]
        shapes = tuple((name, spec.shape, str(spec.dtype)) for name, spec in parts[0][0].items())
        results = [
            self._update(copy, total, shapes)
            for copy, total in zip(copies, self._tree(packed), strict=True)
        ]
        return [state for state, _ in results], results[0][1]

    def evaluate(
        self, copies: Sequence[TrainState], parts: Sequence[Sequence[Batch]]
    ) -> metrics.Sums:
        """The sums of an evaluation batch."""
        packed = [
            [self._sums(copy, part) for part in shards]
            for copy, shards in zip(copies, parts, strict=True)
        ]
        return self._summed(copies, parts, packed)

    def _summed(
        self,
        copies: Sequence[TrainState],
        parts: Sequence[Sequence[Batch]],
        packed: Sequence[Sequence[Packed]],
    ) -> metrics.Sums:
        if self._unpack_sums is None:
            shapes = jax.eval_shape(
                lambda state, batch: dict(train_step.evaluation_step(self._recipe, state, batch)),
                copies[0],
                parts[0][0],
            )
            self._unpack_sums = jax.jit(lambda packed: unpack(packed, shapes))
        return self._unpack_sums(self._tree(packed)[0])

    def measure(
        self, copies: Sequence[TrainState], parts: Sequence[Sequence[Batch]]
    ) -> tuple[metrics.Sums, dict[str, jax.Array]]:
        """The sums of an evaluation batch, and what the task's `examine` says of its examples."""
        both = [
            [self._measured(copy, part) for part in shards]
            for copy, shards in zip(copies, parts, strict=True)
        ]
        sums = self._summed(copies, parts, [[packed for packed, _ in each] for each in both])
        local = [self._end_to_end([rows for _, rows in each]) for each in both]
        place = NamedSharding(self._shard_mesh, PartitionSpec(AXIS))
        whole = {
            name: jax.make_array_from_single_device_arrays(
                (rows.shape[0] * self._shard_mesh.size, *rows.shape[1:]),
                place,
                [device[name] for device in local],
            )
            for name, rows in local[0].items()
        }
        # Every process can read an array only if it holds the whole of it.
        return sums, self._everywhere(whole)

    def _tree(self, packed: Sequence[Sequence[Packed]]) -> list[Packed]:
        """The sum of all logical shards, on each device."""
        place = NamedSharding(self._shard_mesh, PartitionSpec(AXIS))
        layers = []
        for layer in range(self._shards_per_device):
            names = packed[0][layer]
            layers.append(
                {
                    name: jax.make_array_from_single_device_arrays(
                        (self._shard_mesh.size, names[name].shape[1]),
                        place,
                        [shards[layer][name] for shards in packed],
                    )
                    for name in names
                }
            )
        total = self._add(layers)
        local = {
            name: {shard.device: shard.data for shard in array.addressable_shards}
            for name, array in total.items()
        }
        return [{name: shards[device] for name, shards in local.items()} for device in self.devices]

    def _added(self, layers: list[Packed]) -> Packed:
        """The fixed tree: first within a device, then between devices. Nothing but additions and
        moves may stand here."""
        size = self._shard_mesh.size

        def local(layers: list[Packed]) -> Packed:
            if size & (size - 1) or self._shards_per_device & (self._shards_per_device - 1):
                # The subtrees of a device are not whole: every device gets all shards and adds the
                # same tree.
                gathered = [
                    jax.tree.map(
                        lambda row: jax.lax.all_gather(row, AXIS, axis=0, tiled=True), layer
                    )
                    for layer in layers
                ]
                ordered = [
                    jax.tree.map(lambda rows, device=device: rows[device : device + 1], layer)
                    for device in range(size)
                    for layer in gathered
                ]
                return tree_sum(ordered)
            total = tree_sum(layers)
            distance = 1
            while distance < size:
                # Addition commutes, so both partners get the same bits.
                pairs = [(device, device ^ distance) for device in range(size)]
                total = jax.tree.map(
                    lambda row, pairs=pairs: row + jax.lax.ppermute(row, AXIS, pairs), total
                )
                distance *= 2
            return total

        spec = PartitionSpec(AXIS)
        return jax.shard_map(
            local, mesh=self._shard_mesh, in_specs=spec, out_specs=spec, check_vma=False
        )(layers)

    def _packed_total(self, state: TrainState, batch: Batch, index: jax.Array) -> Packed:
        total = train_step.gradients(self._recipe, state, batch, shard=index)
        # Keys have no sum: those of the first shard are taken.
        first = jax.tree.map(
            lambda leaf: _only_if(index == 0, leaf) if tree.is_key(leaf) else leaf,
            total.collections,
        )
        return pack(dataclasses.replace(total, collections=first))

    def _packed_measures(
        self, state: TrainState, batch: Batch
    ) -> tuple[Packed, dict[str, jax.Array]]:
        sums, examined = train_step.measuring_step(self._recipe, state, batch)
        return pack(dict(sums)), examined

    def _next_state(
        self, state: TrainState, packed: Packed, shapes: Any
    ) -> tuple[TrainState, metrics.Sums]:
        part = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
        like = jax.eval_shape(
            lambda state, batch: train_step.gradients(
                self._recipe, state, batch, shard=jnp.uint32(0)
            ),
            state,
            part,
        )
        total = unpack(packed, like)
        total = dataclasses.replace(
            total, collections=collection_sums.mean(total.collections, self._shards)
        )
        rows = self._shards * jax.tree.leaves(part)[0].shape[0]
        axes = parameter_axes(self._recipe, part)
        return train_step.update(self._recipe, state, total, batch_size=rows, axes=axes)

    def _rows(self, local: Batch) -> list[Batch]:
        rows = len(next(iter(local.values()))) // self._shards_per_device
        return [
            {name: array[rows * place : rows * (place + 1)] for name, array in local.items()}
            for place in range(self._shards_per_device)
        ]

    def _drawn(self, position: Any, data: Batch, first: jax.Array, batch_size: int) -> list[Batch]:
        rows = batch_size // self._shards
        order = self._recipe.order
        order = Shuffled(len(next(iter(data.values())))) if order == Shuffled() else order
        ids_B = order.ids(position, batch_size, jnp)
        mine = jax.lax.dynamic_slice_in_dim(
            ids_B, first.astype(jnp.int32) * rows, rows * self._shards_per_device
        )
        return self._rows(pipeline.gather(data, mine))


def tree_sum(parts: Sequence[tree.PyTree]) -> tree.PyTree:
    """The sum by pairs of neighbours, and of those again; an odd one out waits for the next round.

    >>> float(tree_sum([jnp.float32(1), jnp.float32(2), jnp.float32(4)]))
    7.0
    """
    parts = list(parts)
    while len(parts) > 1:
        pairs = [
            jax.tree.map(jnp.add, one, other)
            for one, other in zip(parts[::2], parts[1::2], strict=False)
        ]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def pack(values: tree.PyTree) -> Packed:
    """All leaves of a tree as one vector (1, N) for each dtype, so that moving it is one
    collective; floats are float32 at least."""
    groups: dict[str, list[jax.Array]] = {}
    for leaf in map(_words, jax.tree.leaves(values)):
        dtype = _summed_in(leaf.dtype)
        groups.setdefault(str(dtype), []).append(leaf.astype(dtype).reshape(1, -1))
    return {name: jnp.concatenate(leaves, axis=1) for name, leaves in groups.items()}


def _words(leaf: Any) -> jax.Array:
    """An array as numbers: of keys, what they are made of."""
    return jax.random.key_data(leaf) if tree.is_key(leaf) else jnp.asarray(leaf)


def _only_if(chosen: jax.Array, keys: jax.Array) -> jax.Array:
    words = jax.random.key_data(keys)
    kept = jnp.where(chosen, words, jnp.zeros_like(words))
    return jax.random.wrap_key_data(kept, impl=jax.random.key_impl(keys))


def _summed_in(dtype: Any) -> Any:
    # Between additions of 16 bits in one program the compiler may leave the rounding out, and
    # between devices it cannot.
    return (
        jnp.promote_types(dtype, jnp.float32)
        if jnp.issubdtype(dtype, jnp.floating)
        else jnp.dtype(dtype)
    )


def unpack(packed: Mapping[str, jax.Array], like: tree.PyTree) -> tree.PyTree:
    """The tree that `pack` was given, by the shapes and dtypes of `like`.

    >>> unpack(
    ...     pack({"a": jnp.ones((2, 2)), "b": jnp.zeros(3)}),
    ...     {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)},
    ... )["a"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    used = dict.fromkeys(packed, 0)
    leaves, structure = jax.tree.flatten(like)
    found = []
    for leaf in leaves:
        words = jax.eval_shape(_words, leaf)
        name, size = str(_summed_in(words.dtype)), int(np.prod(words.shape))
        part = packed[name][0, used[name] : used[name] + size].reshape(words.shape)
        found.append(
            jax.random.wrap_key_data(part, impl=jax.random.key_impl(jnp.empty(0, leaf.dtype)))
            if tree.is_key(leaf)
            else part.astype(leaf.dtype)
        )
        used[name] += size
    return jax.tree.unflatten(structure, found)
