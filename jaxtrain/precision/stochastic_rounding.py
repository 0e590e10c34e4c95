"""Stochastic rounding: an optimizer's averages stored in bfloat16, right on average.

A moving average with decay 0.999 moves by a thousandth of its distance at each step. bfloat16 has 8
bits of precision, so rounding to nearest would undo that move, always, and the average would stand
still. Stochastic rounding goes up or down with the probability that makes the mean of what is
stored the number that was meant (Gupta et al. 2015, arXiv 1502.02551). The arithmetic stays
float32: states are widened before an update and rounded after it.

The random bits depend on the key, the leaf's place in the tree and the element's place in the leaf,
never on how the arrays are laid out on devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.tree import PyTree


def to_bf16(tree: PyTree, key: jax.Array) -> PyTree:
    """A tree whose float32 arrays of at least two numbers are bfloat16, rounded stochastically; all
    else is as it was.

    >>> state = {"count": jnp.int32(7), "mean": jnp.full(4, 1.0)}
    >>> {name: leaf.dtype.name for name, leaf in to_bf16(state, jax.random.key(0)).items()}
    {'count': 'int32', 'mean': 'bfloat16'}

    Scalars, counts, keys and arrays of one number stay: they take no memory, and some of them are
    rates. Numbers that bfloat16 holds are kept, so are infinities and NaN; what is finite stays
    finite.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [
            _rounded(leaf, jax.random.fold_in(key, place)) if _is_rounded(leaf) else leaf
            for place, leaf in enumerate(leaves)
        ]
    )


def to_fp32(tree: PyTree, like: PyTree) -> PyTree:
    """The tree in the dtypes of `like`, a tree of the same structure that may be abstract; exact,
    for every bfloat16 number is a float32 number.

    >>> like = {"mean": jax.ShapeDtypeStruct((2,), jnp.float32)}
    >>> to_fp32({"mean": jnp.ones(2, jnp.bfloat16)}, like)["mean"].dtype.name
    'float32'
    """
    return jax.tree.map(
        lambda leaf, spec: leaf if leaf.dtype == spec.dtype else leaf.astype(spec.dtype), tree, like
    )


def _is_rounded(leaf: jax.Array) -> bool:
    return leaf.dtype == jnp.float32 and leaf.ndim >= 1 and leaf.size >= 2


def _rounded(values: jax.Array, key: jax.Array) -> jax.Array:
    """One float32 array as bfloat16: 16 random bits are added to the lower half of the word, and
    the half is cut off.

    Words of finite floats are ordered as their magnitudes are, so a carry into the upper half is a
    step to the next bfloat16 away from zero, and its probability is the share of the lower half.
    """
    upper = np.uint32(0xFFFF0000)
    words = jax.lax.bitcast_convert_type(values, jnp.uint32)
    moved = (words + jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)) & upper
    # Above the largest bfloat16 the next word is infinity's: there the number is cut off instead.
    moved = jnp.where(
        (moved & np.uint32(0x7F800000)) == np.uint32(0x7F800000), words & upper, moved
    )
    rounded = jax.lax.bitcast_convert_type(
        (moved >> np.uint32(16)).astype(jnp.uint16), jnp.bfloat16
    )
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))
