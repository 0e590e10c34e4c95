"""What a decoder keeps of the tokens that it has seen: keys and values of each block.

A block that sees everything has a slot for each position; one that sees a window only has a ring of
as many slots as the window is wide, in which the newest token takes the place of the one that just
went out of sight.

Dims: B batch, T new tokens, S slots, M heads of keys and values, K head width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError


@runtime_checkable
class Decoder(Protocol):
    """A model that goes on beside a cache, and says how large one is; `Transformer` does.

    >>> from jaxtrain.models import Encoder, Transformer
    >>> isinstance(Transformer(), Decoder), isinstance(Encoder(), Decoder)
    (True, False)
    """

    vocabulary: int
    positions: Any
    max_length: int

    @property
    def kinds(self) -> Sequence[Any]:
        """The kind of each block."""
        ...

    def block_settings(self, kind: Any) -> Any:
        """The `key_heads`, `head_dim` and `window` of a block of this kind."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """Keys and values of one block, and the position of each slot, -1 where it is empty."""

    key_BSMK: jax.Array
    value_BSMK: jax.Array
    positions_BS: jax.Array
    ring: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether a position has the slot `position % slots`; otherwise it has the slot `position`."""
    ordered: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether a ring shows its keys in the order of their positions, for `inference.exact`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One `BlockCache` a block, and how many tokens each row has seen."""

    blocks: tuple[BlockCache, ...]
    length_B: jax.Array


def empty(
    model: Decoder,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    *,
    rings: bool = True,
    ordered: bool = False,
) -> Cache:
    """A cache for `batch` rows of at most `capacity` tokens, in the dtype of the model's stream.

    >>> from jaxtrain.models import Transformer
    >>> model = Transformer(width=8, depth=2, heads=2, pattern=("window", "full"), window=4)
    >>> [block.key_BSMK.shape for block in empty(model, batch=3, capacity=16).blocks]
    [(3, 4, 2, 4), (3, 16, 2, 4)]

    Without `rings` a window block keeps everything, too, each position in its own slot; `ordered`
    ones show their keys in the order of their positions, as `inference.exact` wants them.
    `UserError` if it has no place for a token, or more than the model has positions.
    """
    if batch < 1 or capacity < 1:
        raise UserError(f"a cache of {batch} rows of {capacity} tokens: must be at least 1 of each")
    if model.positions == "learned" and capacity > model.max_length:
        raise UserError(
            f"a cache of {capacity} tokens: the model has max_length={model.max_length} learned"
            " positions; ask for no more than that"
        )

    def block(kind: Any) -> BlockCache:
        settings = model.block_settings(kind)
        slots = min(settings.window, capacity) if settings.window and rings else capacity
        zeros = jnp.zeros((batch, slots, settings.key_heads, settings.head_dim), dtype)
        # no two parts of a cache may be one array, since a step that takes it over frees each
        return BlockCache(
            zeros,
            zeros.copy(),
            jnp.full((batch, slots), -1, jnp.int32),
            ring=slots < capacity,
            ordered=ordered and slots < capacity,
        )

    return Cache(tuple(map(block, model.kinds)), jnp.zeros(batch, jnp.int32))


def extended(
    held: BlockCache, key_BTMK: jax.Array, value_BTMK: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, BlockCache]:
    """Keys, values and positions to look at, and the block's cache with the new tokens.

    >>> held = BlockCache(*[jnp.zeros((1, 2, 1, 1))] * 2, jnp.full((1, 2), -1), ring=True)
    >>> new, positions = jnp.ones((1, 3, 1, 1)), jnp.array([[0, 1, 2]])
    >>> _, _, seen, held = extended(held, new, new, positions)
    >>> seen.tolist(), held.positions_BS.tolist()
    ([[-1, -1, 0, 1, 2]], [[2, 1]])

    Positions of a row ascend and go on from those held; padding has position -1 and is never
    written. A row with more tokens than slots, in a block that is no ring, becomes nan.
    """
    slots, rows = held.positions_BS.shape[1], jnp.arange(positions_BT.shape[0])[:, None]
    newest_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
    kept_BT = positions_BT >= 0
    if held.ring:
        kept_BT &= positions_BT > newest_B1 - slots
        places_BT = positions_BT % slots
    else:
        # what has no slot goes over the last one, as nan
        full = (newest_B1 >= slots)[:, :, None, None]
        value_BTMK = jnp.where(full, jnp.asarray(jnp.nan, value_BTMK.dtype), value_BTMK)
        places_BT = jnp.minimum(positions_BT, slots - 1)
    places_BT = jnp.where(kept_BT, places_BT, slots)
    after = dataclasses.replace(
        held,
        key_BSMK=held.key_BSMK.at[rows, places_BT].set(key_BTMK, mode="drop"),
        value_BSMK=held.value_BSMK.at[rows, places_BT].set(value_BTMK, mode="drop"),
        positions_BS=held.positions_BS.at[rows, places_BT].set(positions_BT, mode="drop"),
    )
    key_BSMK, value_BSMK, positions_BS = after.key_BSMK, after.value_BSMK, after.positions_BS
    if held.ring and positions_BT.shape[1] > 1:
        # a ring as wide as the window loses what some of several new tokens still see
        key_BSMK = jnp.concatenate([held.key_BSMK, key_BTMK], axis=1)
        value_BSMK = jnp.concatenate([held.value_BSMK, value_BTMK], axis=1)
        positions_BS = jnp.concatenate([held.positions_BS, positions_BT], axis=1)
    if held.ordered:
        order_BS = jnp.argsort(positions_BS, axis=1)
        key_BSMK = key_BSMK[rows, order_BS]
        value_BSMK = value_BSMK[rows, order_BS]
        positions_BS = positions_BS[rows, order_BS]
    return key_BSMK, value_BSMK, positions_BS, after
