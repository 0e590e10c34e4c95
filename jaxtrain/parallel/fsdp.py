"""FSDP all-gather: parameters that are split over the axis fsdp are gathered for the model, and
their gradients are split again.

Without this, the compiler sees a product whose gradient must be split over a dim of the model, and
splits activations the same way: on 8 H100 a small ViT then sent 8 times, and a small decoder 17
times, the bytes that its parameters need (compiled, jax 0.10.2). Two sharding constraints prevent
that: the model computes with whole parameters, and each gradient is split at once, so that a
reduce-scatter sums it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import block_loop, tree
from jaxtrain.adapters import Apply, Variables


def with_gathered_parameters(
    apply: Apply,
    axes: tree.PyTree,
    placed: tree.PyTree,
    mesh: Mesh | None,
    *,
    looped: Sequence[str] = (),
) -> Apply:
    """A model's `apply` that gathers its parameters first; unchanged where nothing is split over
    fsdp.

    `axes` and `placed` are the logical axes and the sharding of each parameter. Tensor sharding
    stays. Under rematerialisation the backward pass gathers again, because an all-gather is no
    product and ends no block, so its result is not saved. The parameters of `looped` blocks (see
    `block_loop`) stay split; the loop gathers those of one block at a time, and again for the
    backward pass.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return apply
    named, places = tree.axes_by_path(axes), tree.flatten(placed)

    def gathered(path: str, leaf: jax.Array) -> jax.Array:
        return _gathered(leaf, places[path], named.get(path))

    def first(path: Any, leaf: jax.Array) -> jax.Array:
        text = tree.path_text(path)
        return leaf if text.partition("/")[0] in looped else gathered(text, leaf)

    def gathered_apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        params = jax.tree_util.tree_map_with_path(first, variables["params"])
        if not looped:
            return apply(variables | {"params": params}, inputs, train=train, key=key)
        layout = block_loop.Layout(lambda path, stack: _stacked(stack, places[path]), gathered)
        with block_loop.told(layout=layout):
            return apply(variables | {"params": params}, inputs, train=train, key=key)

    return gathered_apply


def _stacked(stack: jax.Array, place: NamedSharding) -> jax.Array:
    """A stack, and so its gradient, split as each array in it is."""
    spec = PartitionSpec(None, *place.spec)
    return jax.lax.with_sharding_constraint(stack, NamedSharding(place.mesh, spec))


def _gathered(leaf: jax.Array, place: NamedSharding, axes: tree.Axes | None) -> jax.Array:
    whole = NamedSharding(
        place.mesh, PartitionSpec(*(_without_fsdp(entry) for entry in place.spec))
    )
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jax.lax.with_sharding_constraint(leaf, whole)  # counts and keys have no gradient
    # The gradient of an embedding lookup is a scatter. If that must be split on a mesh of data and
    # fsdp, the compiler first copies all activations to all devices ("involuntary full
    # rematerialization"). That of a head may be a sum over chunks of tokens, and would be sent once
    # a chunk if their loop split it.
    is_embedding = bool(axes) and "vocab" in axes

    @jax.custom_vjp
    def gather(array: jax.Array) -> jax.Array:
        # Without the first constraint the compiler gathers the array before its cast to a narrower
        # dtype, which is twice as large.
        return jax.lax.with_sharding_constraint(
            jax.lax.with_sharding_constraint(array, place), whole
        )

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        gradient = jax.lax.with_sharding_constraint(gradient, whole) if is_embedding else gradient
        return (jax.lax.with_sharding_constraint(gradient, place),)

    gather.defvjp(lambda array: (gather(array), None), backward)
    return gather(leaf)


def _without_fsdp(entry: Any) -> Any:
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(axis for axis in axes if axis != "fsdp") or None
