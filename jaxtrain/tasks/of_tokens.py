"""Metrics of tokens, which tasks of language share: losses by source, perplexity, bits per byte.

Dims: B batch, T tokens that are asked for.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums, weighted

MOST_NATS = 700.0
"""The loss beyond which a perplexity is infinite in float64."""
Named = TypeVar("Named")


def named_by(task: Named, table: Any) -> Named:
    """The task with the names that a table has for its sources, unless it has some already."""
    names = tuple(getattr(table, "source_names", ()))
    found: Any = task
    return task if found.sources or not names else dataclasses.replace(found, sources=names)


def by_source(
    names: tuple[str, ...], loss_BT: jax.Array, weights_BT: jax.Array | None, source_B: jax.Array
) -> Sums:
    """The loss of each source of a mixture, as loss_NAME, by the number of each sequence's source.

    >>> sums = by_source(("books", "code"), jnp.ones((2, 3)), None, jnp.array([1, 1]))
    >>> [[float(part) for part in pair] for pair in sums.values()]
    [[0.0, 0.0], [6.0, 6.0]]
    """
    if weights_BT is None:
        weights_BT = jnp.ones_like(loss_BT)
    total_B = jnp.sum(jnp.where(weights_BT > 0, loss_BT, 0.0) * weights_BT, axis=1)
    count_B = jnp.sum(weights_BT, axis=1)

    def of(place: int, values_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(source_B == place, values_B, 0.0))

    return {
        f"loss_{name}": (of(place, total_B), of(place, count_B)) for place, name in enumerate(names)
    }


def bits_per_byte(
    loss_BT: jax.Array, weights_BT: jax.Array | None, bytes_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Bits of all tokens, and bytes of the sequences that count.

    >>> bits, size = bits_per_byte(jnp.full((1, 4), math.log(2)), None, jnp.array([8]))
    >>> float(bits / size)
    0.5
    """
    total, _ = weighted(loss_BT, weights_BT)
    bytes_B = bytes_B.astype(jnp.float32)
    if weights_BT is not None:
        bytes_B = bytes_B * jnp.max(weights_BT, axis=1)
    return total / math.log(2), jnp.sum(bytes_B)


def perplexity(nats: float) -> float:
    """e to the power of the mean loss of a whole set.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    return math.inf if nats > MOST_NATS else math.exp(nats)


def check_segments(segments: jax.Array, shape: tuple[int, ...]) -> None:
    """`UserError` unless there is a number for each token."""
    if segments.shape != shape:
        raise UserError(
            f"segments has shape {segments.shape}; the task wants {shape}, a number for each token"
        )
