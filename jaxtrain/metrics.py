"""Metrics as (sum, count) pairs, so that microbatches, masks, ragged batches and hosts add up
exactly.

B is the batch dim.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError

Sums = Mapping[str, tuple[jax.Array, jax.Array]]


def weighted(values_B: jax.Array, weights_B: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of one number an example, and the sum of the weights (all 1 if None).

    >>> import jax.numpy as jnp
    >>> [float(part) for part in weighted(jnp.array([1.0, 5.0]), jnp.array([1.0, 0.0]))]
    [1.0, 1.0]

    Values may have further dims, such as the tokens of a sequence: then each counts by itself.
    `UserError` if the weights have another shape: they would be broadcast.
    """
    if weights_B is None:
        return jnp.sum(values_B), jnp.float32(values_B.size)
    if weights_B.shape != values_B.shape:
        raise UserError(
            f"weights have shape {weights_B.shape}, values {values_B.shape}; they must be equal,"
            " one weight for each value"
        )
    # A padded example may hold anything, even nan: it is dropped, not multiplied by zero, and
    # before the product, so that its gradient is zero too.
    return jnp.sum(jnp.where(weights_B > 0, values_B, 0.0) * weights_B), jnp.sum(weights_B)


def ratio(
    totals_B: jax.Array, counts_B: jax.Array, weights_B: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sums of what each example adds to a total and to its count, both by the example's
    weight: a mean in which examples count differently.

    >>> import jax.numpy as jnp
    >>> [float(part) for part in ratio(jnp.array([6.0, 1.0]), jnp.array([3.0, 1.0]), None)]
    [7.0, 4.0]
    """
    if weights_B is None:
        return jnp.sum(totals_B), jnp.sum(counts_B)
    total, _ = weighted(totals_B, weights_B)
    count, _ = weighted(counts_B, weights_B)
    return total, count


def add(first: Sums, second: Sums) -> Sums:
    """The sums of both."""
    return jax.tree.map(jnp.add, first, second)


class Totals:
    """Sums on the host, in float64, over as many batches as wanted.

    >>> totals = Totals()
    >>> totals.add({"loss": (6.0, 4.0)})
    >>> totals.add({"loss": (3.0, 2.0)})
    >>> totals.means()
    {'loss': 1.5}
    """

    def __init__(self, record: Mapping[str, list[float | str]] | None = None) -> None:
        self._pairs = {
            name: (float(pair[0]), float(pair[1])) for name, pair in (record or {}).items()
        }

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Adds host numbers (read them from the device first)."""
        for name, (total, count) in sums.items():
            old_total, old_count = self._pairs.get(name, (0.0, 0.0))
            self._pairs[name] = (old_total + float(total), old_count + float(count))

    def means(self) -> dict[str, float]:
        """Sum over count, by name; a name with count 0 is left out."""
        return {name: total / count for name, (total, count) in self._pairs.items() if count}

    def record(self) -> dict[str, list[float | str]]:
        """What a checkpoint stores, so that a resumed interval ends with the same numbers; JSON
        holds those that are not finite as text."""
        return {
            name: [part if math.isfinite(part) else str(part) for part in pair]
            for name, pair in self._pairs.items()
        }
