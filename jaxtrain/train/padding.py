"""Rows that do not count (`weight` 0) and hold no numbers: what stands in for them.

A loss of weight 0 is no protection: the gradient of a row with nan is zero times nan. So such a row
is replaced before the model sees it. Rows that do not count but hold finite numbers stay, for a
task may have a use for them.

B is the batch dim.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.tree import Batch, PyTree

NO_CONTENT = ("weight", "id")
"""Fields that say something of a row rather than being part of it."""


def replaced(batch: Batch, dtype: Any = jnp.float32, *, by_row: bool = True) -> Batch:
    """The batch, with each row of weight 0 that holds nan or infinity replaced by the first row
    that counts; without `weight` it is left alone.

    >>> rows = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, 5.0]])
    >>> batch = {"image": rows, "weight": jnp.array([1.0, 0.0, 0.0])}
    >>> replaced(batch)["image"].tolist()
    [[1.0, 2.0], [1.0, 2.0], [4.0, 5.0]]

    `dtype` is what the model computes in: a number that it cannot hold is infinite, and so is one
    whose square is (memory that nobody filled holds such). Weights may
    have more dims than the batch (one a token, say): what lies at a place of weight 0 and is no
    number becomes 0. So does it everywhere with `by_row` off, which needs no row of another device
    and is enough where no gradient is taken.
    """
    if "weight" not in batch:
        return batch
    return _without_unseen(batch, batch["weight"], NO_CONTENT, dtype, by_row=by_row)


def ignored_replaced(batch: Batch, task: Any, dtype: Any = jnp.float32) -> Batch:
    """The batch, with each row that the task's `ignore` leaves out whole and that holds nan or
    infinity replaced likewise, but for its label, which goes on saying so.

    >>> from jaxtrain.tasks import Classification
    >>> batch = {"image": jnp.array([[1.0], [jnp.nan]]), "label": jnp.array([3, -1])}
    >>> cleaned = ignored_replaced(batch, Classification(ignore=-1))
    >>> cleaned["image"].tolist(), cleaned["label"].tolist()
    ([[1.0], [1.0]], [3, -1])
    """
    ignore, target = getattr(task, "ignore", None), getattr(task, "target", "")
    if ignore is None or target not in batch:
        return batch
    label = batch[target]
    counts = jnp.any((label != ignore).reshape(label.shape[0], -1), axis=1)
    apart = (*NO_CONTENT, target)
    return _without_unseen(batch, counts.astype(jnp.float32), apart, dtype, by_row=True)


def _without_unseen(
    batch: Batch, weight: jax.Array, apart: tuple[str, ...], dtype: Any, *, by_row: bool
) -> Batch:
    content = {name: value for name, value in batch.items() if name not in apart}
    unseen_B = jnp.all((weight == 0).reshape(weight.shape[0], -1), axis=1)
    if by_row:
        content = _rows_replaced(content, unseen_B, dtype)

    def cleaned(leaf: jax.Array) -> jax.Array:
        if not _is_float(leaf) or leaf.shape[:1] != unseen_B.shape:
            return leaf
        fits = leaf.shape[: weight.ndim] == weight.shape
        unseen = weight == 0 if fits else unseen_B
        return jnp.where(_over(unseen, leaf) & ~_finite(leaf, dtype), jnp.zeros_like(leaf), leaf)

    if not by_row or weight.ndim > 1:
        content = jax.tree.map(cleaned, content)
    return {name: content.get(name, value) for name, value in batch.items()}


def _rows_replaced(content: PyTree, unseen_B: jax.Array, dtype: Any) -> PyTree:
    rows = [leaf for leaf in jax.tree.leaves(content) if leaf.shape[:1] == unseen_B.shape]
    bad_B = jnp.zeros_like(unseen_B)
    for leaf in filter(_is_float, rows):
        bad_B |= ~jnp.all(_finite(leaf, dtype).reshape(leaf.shape[0], -1), axis=1)
    bad_B &= unseen_B
    first_B = jnp.arange(len(unseen_B)) == jnp.argmax(~unseen_B)

    def choose(leaf: jax.Array) -> jax.Array:
        if leaf.shape[:1] != unseen_B.shape or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        # A sum of one row and zeros, which a mesh adds up; an index would gather the whole batch.
        sound = leaf if not _is_float(leaf) else jnp.where(_finite(leaf, dtype), leaf, 0)
        row = jnp.sum(
            jnp.where(_over(first_B, leaf), sound, jnp.zeros_like(leaf)), axis=0, keepdims=True
        ).astype(leaf.dtype)
        return jnp.where(_over(bad_B, leaf), jnp.broadcast_to(row, leaf.shape), leaf)

    return jax.tree.map(choose, content)


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _finite(leaf: jax.Array, dtype: Any) -> jax.Array:
    held = leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.isfinite(held) & jnp.isfinite(jnp.square(jnp.abs(leaf.astype(wide))))


def _over(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """A mask of the leading dims, with a dim of 1 for each further one."""
    return mask.reshape(*mask.shape, *(1,) * (leaf.ndim - mask.ndim))
