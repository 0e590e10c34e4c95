"""The random numbers of each example, and masks of boxes that are placed by them.

B batch, A spatial axes (H and W, or L), N numbers drawn an example.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

# Places in the row of uniform numbers that is drawn for each example: an effect owns its places, so
# switching one on moves no other.
FLIP, FLIP_VERTICAL, ERASE, AREA, ASPECT = 0, 1, 2, 3, 4
CROP, TRANSLATE, BOX, CENTER = slice(5, 7), slice(7, 9), slice(9, 11), slice(11, 13)
STRETCH, SCALE, SHEAR, WARP = 13, 14, 15, slice(16, 22)
NUM_DRAWS = 22


def uniform(keys_B: jax.Array) -> jax.Array:
    """All uniform numbers of each example in one go: one call of the generator costs far less than
    one an effect."""
    return jax.vmap(lambda key: jax.random.uniform(key, (NUM_DRAWS,)))(keys_B)


def normal(
    keys_B: jax.Array, name: Literal["erase", "noise", "smooth"], like: jax.Array
) -> jax.Array:
    """Gaussian noise shaped like a batch, from each example's own key."""
    stream = {"erase": 1, "noise": 2, "smooth": 3}[name]
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, stream), like.shape[1:], like.dtype)
    )(keys_B)


def random_integer(draw_B: jax.Array, limit: Any) -> jax.Array:
    """An integer of -limit to limit, all equally likely, as int32."""
    rounded = jnp.round(jnp.asarray(limit, jnp.float32))
    return jnp.minimum(jnp.floor(draw_B * (2 * rounded + 1)) - rounded, rounded).astype(jnp.int32)


def random_boxes(
    sides_A: Sequence[int], extents: Sequence[jax.Array], draws_BA: jax.Array
) -> jax.Array:
    """A mask (B, *A, 1) of boxes of the given extents, rounded and cut to the sides, that lie
    wholly inside."""
    lows, highs = [], []
    for axis, (side, extent_B) in enumerate(zip(sides_A, extents, strict=True)):
        length_B = jnp.clip(jnp.round(extent_B), 0, side)
        low_B = jnp.floor(draws_BA[:, axis] * (side - length_B + 1))
        lows.append(jnp.minimum(low_B, side - length_B))
        highs.append(lows[-1] + length_B)
    return box_mask(sides_A, lows, highs)


def box_mask(
    sides_A: Sequence[int], lows: Sequence[jax.Array], highs: Sequence[jax.Array]
) -> jax.Array:
    """A mask (B, *A, 1): true where every axis has low <= place < high.

    >>> box_mask([4], [jnp.array([1.0])], [jnp.array([3.0])])[0, :, 0].tolist()
    [False, True, True, False]
    """
    rank = len(sides_A) + 2
    mask = jnp.ones([1] * rank, bool)
    for axis, (side, low_B, high_B) in enumerate(zip(sides_A, lows, highs, strict=True)):
        places = jnp.arange(side, dtype=jnp.float32).reshape(
            [side if axis + 1 == other else 1 for other in range(rank)]
        )
        mask = mask & (places >= per_example(low_B, rank)) & (places < per_example(high_B, rank))
    return mask


def per_example(values_B: jax.Array, rank: int) -> jax.Array:
    """Gives a number an example the trailing axes that let it meet a batch.

    >>> per_example(jnp.ones(3), 4).shape
    (3, 1, 1, 1)
    """
    return values_B.reshape(-1, *([1] * (rank - 1)))


def is_off(strength: Any) -> bool:
    """Whether an effect is switched off for good; a traced strength never is, though its value may
    be 0.

    >>> is_off(0.0), is_off(jnp.float32(0))
    (True, False)
    """
    return isinstance(strength, int | float) and strength == 0
