"""The collections of a model (batch statistics, counters, keys) over the parts of a batch: sums,
and what the mean of the parts is.

Each part starts from the same collections. Numbers with fractions are added as they are; of whole
numbers what a part added to them, for sums of large ones, such as a table's, would overflow.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import tree

Collections = dict[str, tree.PyTree]


def added(after_part: Collections, before: Collections) -> Collections:
    """The collections after one part, their whole numbers as what the part added.

    >>> now, before = {"count": jnp.int32(5)}, {"count": jnp.int32(3)}
    >>> int(added(now, before)["count"])
    2
    """
    return _with_whole_numbers(jnp.subtract, after_part, before)


def after(mean_of_parts: Collections, before: Collections) -> Collections:
    """The collections after the step: the inverse of `added`."""
    return _with_whole_numbers(jnp.add, mean_of_parts, before)


def add(one: jax.Array, other: jax.Array) -> jax.Array:
    """The sum of one array of two parts; keys have none, so the last is taken."""
    return other if tree.is_key(one) else one + other


def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """What a sum of such arrays starts from."""
    if tree.is_key(leaf):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape).astype(leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def mean(collections: Collections, count: int) -> Collections:
    """The mean of summed collections, in their own dtypes.

    Parts count alike, so that the mean of a counter is the counter. Of flags there is no mean: a
    sum of them is whether any is set.
    """

    def of(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return (leaf / count).astype(leaf.dtype)
        if not _is_whole(leaf):
            return leaf
        # What an unsigned number lost is a large one.
        signed = leaf.astype(f"int{8 * leaf.dtype.itemsize}")
        return (signed // count).astype(leaf.dtype)

    return jax.tree.map(of, collections)


def _with_whole_numbers(
    combine: Callable[..., jax.Array], collections: Collections, others: Collections
) -> Collections:
    return jax.tree.map(
        lambda one, other: combine(one, other) if _is_whole(one) else one, collections, others
    )


def _is_whole(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer)
