"""Sharding: one table from the models' logical axes to mesh axes, and from it a sharding for each array of the state."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import tree, wording
from jaxtrain.mesh import BATCH_AXES

LOGICAL = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
"""Which mesh axis a logical axis is split over; dims with other names, or none, are left to the automatic rule."""


def batch(mesh: Mesh) -> NamedSharding:
    """How a batch lies: split over the data and fsdp axes along its first dim."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter(path: str, shape: Sequence[int], axes: Sequence[str | None] | None, mesh: Mesh) -> PartitionSpec:
    """The spec of one parameter: first by its logical axes; then, if `fsdp` is not among them, over it goes the largest dim left that divides.

    `ValueError` if a dim whose logical axis is in the table does not divide.
    """
    entries: list[str | None] = [None] * len(shape)
    for dim, (length, name) in enumerate(zip(shape, axes or entries, strict=True)):
        axis = LOGICAL.get(name) if name else None
        size = mesh.shape[axis] if axis else 1
        if axis is None or size == 1 or axis in entries:
            continue
        if length % size:
            near = wording.nearest_multiples(size, length)
            raise ValueError(f"{path} dim {dim} (={length}, {name!r}) not divisible by axis {axis}={size}; change --mesh or make it {near}")
        entries[dim] = axis
    size = mesh.shape["fsdp"]
    free = [(length, -dim) for dim, length in enumerate(shape) if entries[dim] is None and length % size == 0 and length > 0]
    if size > 1 and "fsdp" not in entries and free:
        entries[-max(free)[1]] = "fsdp"
    while entries and entries[-1] is None:
        entries.pop()  # jax drops them too, and a spec that differs in writing alone would compile a second program
    return PartitionSpec(*entries)


def parameters(shapes: tree.PyTree, axes: tree.PyTree, mesh: Mesh) -> tree.PyTree:
    """A `NamedSharding` for each parameter; `axes` has the same structure, with a tuple of names or None for each."""
    flat_axes = {tree.path_text(path): names for path, names in _flatten_axes(axes)}

    def place(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        text = tree.path_text(path)
        return NamedSharding(mesh, parameter(f"params/{text}", leaf.shape, flat_axes.get(text), mesh))

    return jax.tree_util.tree_map_with_path(place, shapes)


def like_parameters(shapes: tree.PyTree, params: tree.PyTree, placed: tree.PyTree, mesh: Mesh) -> tree.PyTree:
    """Shardings for a tree that holds copies of parameters (optimizer state, EMA): those of the parameter with the same ending of path and shape.

    What belongs to no parameter (counts, scalars) is replicated.
    """
    known = {path: (leaf.shape, place) for (path, leaf), place in zip(tree.flatten(params).items(), jax.tree.leaves(placed), strict=True)}

    def place(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = tree.path_text(path).split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape and sharding is not None:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, shapes)


def bytes_per_device(shapes: tree.PyTree, shardings: tree.PyTree) -> int:
    """How many bytes of a tree each device holds."""
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * _itemsize(leaf)
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def _itemsize(leaf: Any) -> int:
    # A typed key has no itemsize of its own: threefry's is two 32-bit words.
    return 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def _flatten_axes(axes: tree.PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda leaf: leaf is None or isinstance(leaf, tuple))[0]
