"""What an augmentation is, the one that does nothing, and what a batch must hold to be augmented.

B batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError
from jaxtrain.fields import Between, Traced
from jaxtrain.tree import Batch

Fraction = Annotated[float, Between(0, 1), Traced()]


class Augment(Protocol):
    """What the training step calls on every batch; evaluation never does."""

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """A changed batch, from one typed key an example and one for the whole batch."""
        ...
        ...


@dataclasses.dataclass(frozen=True)
class NoAugment:
    """Leaves every batch as it is.

    >>> NoAugment()(
    ...     {"label": jnp.arange(2)}, jax.random.split(jax.random.key(0), 2), jax.random.key(1)
    ... )["label"].tolist()
    [0, 1]
    """

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """The same batch."""
        return batch


def check(image: jax.Array, *, ranks: Sequence[int], name: str, expected: str) -> None:
    """`UserError` unless images or signals have one of these ranks and are floats."""
    if image.ndim not in ranks:
        raise UserError(f"{name}: image of shape {image.shape}; expected {expected}")
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise UserError(
            f"{name}: image of type {image.dtype}; expected standardized floats: standardize the"
            " batch first"
        )
