"""The order of examples: a counter-based shuffle of each epoch, with no table of length N, and a
position of three numbers.

Example i of the stream is element i mod N of the permutation of epoch i div N, so batches straddle
epochs and every epoch holds every example exactly once. The permutation is a generalised Feistel
network on pairs (left, right) of Z_a x Z_b, in uint32 and without a table, so NumPy on the host and
a compiled program on a device compute the same bits.
"""

import dataclasses
import functools
import math
import zlib
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError

_ROUNDS = 8  # six already pass the tests of uniformity; two more cost nothing that can be measured


class Order(Protocol):
    """In which order examples come. A position is any pytree of arrays; only the order reads it,
    and a checkpoint holds it."""

    def start(self, seed: Any) -> Any:
        """The position before the first example."""
        ...

    def ids(self, position: Any, count: int, xp: ModuleType = np) -> Any:
        """The ids of the next `count` examples, int32 (count,)."""
        ...

    def advance(self, position: Any, count: int) -> Any:
        """The position after `count` further examples."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Position:
    """`offset` examples of epoch `epoch` are consumed, in the order that belongs to `seed`. uint32
    scalars, of NumPy or jax."""

    seed: Any
    epoch: Any
    offset: Any


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """Every epoch holds every example once, in an order of its own.

    >>> order = Shuffled(5)
    >>> position = order.start(0)
    >>> ids = order.ids(position, 10)
    >>> sorted(ids[:5].tolist()), int(order.advance(position, 7).offset)
    ([0, 1, 2, 3, 4], 2)

    Without a length, as where batches come from the caller's own code, `advance` counts on and
    there are no `ids`.
    """

    length: int | None = None
    """How many examples an epoch has."""

    def start(self, seed: Any) -> Position:
        """The position before the first example; `seed` may be traced."""
        if isinstance(seed, int | np.integer):
            return Position(np.uint32(seed), np.uint32(0), np.uint32(0))
        return Position(jnp.asarray(seed, jnp.uint32), jnp.uint32(0), jnp.uint32(0))

    def ids(self, position: Position, count: int, xp: ModuleType = np) -> Any:
        """The ids of the next `count` examples, int32 (count,)."""
        if self.length is None:
            raise UserError("order: Shuffled() has no length; give Shuffled(number of examples)")
        return example_ids(position.seed, position.epoch, position.offset, count, self.length, xp)

    def advance(self, position: Position, count: int) -> Position:
        """The position after `count` further examples."""
        if self.length is None:
            return dataclasses.replace(position, offset=position.offset + np.uint32(count))
        epoch, offset = advance(
            position.epoch, position.offset, np.uint32(count), np.uint32(self.length)
        )
        return dataclasses.replace(position, epoch=epoch, offset=offset)


def example_ids(
    seed: Any, epoch: Any, offset: Any, count: int, length: int, xp: ModuleType = np
) -> Any:
    """The ids of the next `count` examples when `offset` examples of epoch `epoch` are consumed.

    >>> ids = example_ids(0, 0, 0, 10, 5)
    >>> sorted(ids[:5].tolist()), sorted(ids[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])

    `count` and `length` are static; `seed`, `epoch` and `offset` (< `length`) may be traced. int32
    (count,).
    """
    position = _uint32(offset, xp) + xp.arange(count, dtype=xp.uint32)
    epochs = _uint32(epoch, xp) + position // xp.uint32(length)
    return permute(seed, epochs, position % xp.uint32(length), length, xp)


def advance(
    epoch: Any, offset: Any, count: int | np.uint32, length: int | np.uint32
) -> tuple[Any, Any]:
    """The position (epoch, offset) after `count` further examples.

    >>> advance(0, 4, 3, 5)
    (1, 2)
    """
    consumed = offset + count
    return epoch + consumed // length, consumed % length


def permute(seed: Any, epoch: Any, index: Any, length: int, xp: ModuleType = np) -> Any:
    """Element `index` of the permutation of 0..length-1 that belongs to `seed` and `epoch`.

    >>> sorted(permute(7, 0, np.arange(6), 6).tolist())
    [0, 1, 2, 3, 4, 5]

    Elementwise over `index` and `epoch`; `length` (at most 2**31 - 1) is static. int32, the same
    bits from NumPy and jax.numpy.
    """
    rows, columns = grid(length)
    seed, epoch, value = (_uint32(part, xp) for part in (seed, epoch, index))
    # NumPy warns when scalars wrap around, which is what they are meant to do
    with np.errstate(over="ignore"):
        key = _mix(
            _mix(seed, 0x9E3779B9, xp) ^ (epoch * xp.uint32(0x85EBCA6B) + xp.uint32(1)), 0, xp
        )
        value = _feistel(key, value, rows, columns, xp)
        # Cycle walking: what falls outside 0..length-1 goes through again. The grid has
        # rows*columns - length surplus cells, no walk meets one twice, so that many repeats always
        # suffice; `grid` keeps them few, which spares the program a loop.
        for _ in range(rows * columns - length):
            value = xp.where(value < length, value, _feistel(key, value, rows, columns, xp))
    return value.astype(xp.int32)


def subseed(seed: Any, name: str, xp: ModuleType = np) -> Any:
    """The seed of a stream of its own, by its name: another stream moves none. uint32.

    >>> int(subseed(0, "code")) != int(subseed(0, "books"))
    True
    """
    with np.errstate(over="ignore"):
        return _mix(_uint32(seed, xp) ^ xp.uint32(zlib.crc32(name.encode())), 0x2545F491, xp)


@functools.cache
def grid(length: int) -> tuple[int, int]:
    """Sides of the grid on which a set of `length` examples is shuffled: about square, with as few
    surplus cells as possible.

    >>> grid(60000), grid(1437)
    ((240, 250), (36, 40))
    """
    if not 1 <= length < 2**31:
        raise UserError(f"a table of {length} examples: must be 1..2147483647")
    if length <= 2:
        return 1, length
    root = math.isqrt(length - 1) + 1
    sides = ((rows, -(-length // rows)) for rows in range(max(2, root // 4), root + 1))
    return min(sides, key=lambda side: (side[0] * side[1] - length, side[1] - side[0]))


def _feistel(key: Any, value: Any, rows: int, columns: int, xp: ModuleType) -> Any:
    """One pass: each round shifts one coordinate by a hash of the other, which can be undone, so
    the whole is a bijection."""
    left, right = value // xp.uint32(columns), value % xp.uint32(columns)
    for number in range(_ROUNDS):
        salt = xp.uint32((number + 1) * 0x9E3779B9 & 0xFFFFFFFF)
        # The hash is halved so that the sum cannot wrap around, which would not be a bijection any
        # more.
        if number % 2:
            left = (left + (_mix(right ^ key, salt, xp) >> xp.uint32(1))) % xp.uint32(rows)
        else:
            right = (right + (_mix(left ^ key, salt, xp) >> xp.uint32(1))) % xp.uint32(columns)
    return left * xp.uint32(columns) + right


def _uint32(value: Any, xp: ModuleType) -> Any:
    # A seed past 2**31 must not pass through int32, which is what jax makes of a Python integer.
    return (
        xp.asarray(np.uint32(value))
        if isinstance(value, int | np.integer)
        else xp.asarray(value).astype(xp.uint32)
    )


def _mix(value: Any, salt: Any, xp: ModuleType) -> Any:
    """The finisher of MurmurHash3: every bit of the result hangs on every bit of `value`."""
    value = value + xp.uint32(salt)
    value = (value ^ (value >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    value = (value ^ (value >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return value ^ (value >> xp.uint32(16))
