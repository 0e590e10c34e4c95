"""What a decoder keeps of the tokens that it has seen: keys and values of each block.

Dims: B batch, T new tokens, S slots, M heads of keys and values, K head width.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """Keys and values of one block, and the position of each slot, -1 where it is empty."""

    key_BSMK: jax.Array
    value_BSMK: jax.Array
    positions_BS: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One `BlockCache` a block, and how many tokens each row has seen."""

    blocks: tuple[BlockCache, ...]
    length_B: jax.Array


def extended(
    held: BlockCache, key_BTMK: jax.Array, value_BTMK: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, BlockCache]:
    """Keys, values and positions to look at, and the block's cache with the new tokens."""
    slots, rows = held.positions_BS.shape[1], jnp.arange(positions_BT.shape[0])[:, None]
    newest = jnp.max(positions_BT, axis=1, keepdims=True)
    kept = (positions_BT >= 0) & (positions_BT > newest - slots)
    places_BT = jnp.where(kept, positions_BT % slots, slots)
    after = BlockCache(
        held.key_BSMK.at[rows, places_BT].set(key_BTMK, mode="drop"),
        held.value_BSMK.at[rows, places_BT].set(value_BTMK, mode="drop"),
        held.positions_BS.at[rows, places_BT].set(positions_BT, mode="drop"),
    )
    return (
        jnp.concatenate([held.key_BSMK, key_BTMK], axis=1),
        jnp.concatenate([held.value_BSMK, value_BTMK], axis=1),
        jnp.concatenate([held.positions_BS, positions_BT], axis=1),
        after,
    )
