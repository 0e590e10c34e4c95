"""The stateless order of examples: a counter-based shuffle of each epoch, with no table of length N
and no state to save.

Example i of the stream is element i mod N of the permutation of epoch i div N, so batches straddle
epochs and every epoch holds every example exactly once. The permutation is a generalised Feistel
network on pairs (left, right) of Z_a x Z_b, in uint32 and without a table, so NumPy on the host and
a compiled program on a device compute the same bits.
"""

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np

from jaxtrain.errors import UserError

_ROUNDS = 8  # six already pass the tests of uniformity; two more cost nothing that can be measured


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


def advance(epoch: Any, offset: Any, count: int, length: int) -> tuple[Any, Any]:
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
