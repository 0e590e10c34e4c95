"""Rotary positions: queries and keys are turned by their place, so that their product knows how far
apart they are (Su et al. 2021, arXiv 2104.09864).

Dims: B batch, T tokens, N heads, K head width, R pairs that are turned.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Scaling = Literal["none", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast each pair turns, and how that is slowed down for texts longer than those of the
    first training.

    >>> Rates(base=10000.0).per_place(4).tolist()
    [1.0, 0.009999999776482582]

    `linear` divides all by the factor (Chen et al. 2023). `llama3` leaves pairs that turn more than
    `high` times within `length` as they are, divides those that turn less than `low` times, and
    goes smoothly between. `yarn` (Peng et al. 2023, arXiv 2309.00071) does so by pair between the
    turns `low` and `high`, and multiplies queries and keys by `gain`.
    """

    base: float = 10000.0
    scaling: Scaling = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    length: int = 0
    """The length that the model was first trained on."""

    def per_place(self, dims: int) -> np.ndarray:
        """Radians a place for each pair of `dims` numbers: float32 (dims / 2,), computed in
        float64, since an error grows with the place."""
        pairs = dims // 2
        rates_R = self.base ** -(np.arange(pairs, dtype=np.float64) / pairs)
        if self.scaling == "linear":
            rates_R = rates_R / self.factor
        elif self.scaling == "llama3":
            turns_R = self.length * rates_R / (2 * math.pi)
            kept_R = np.clip((turns_R - self.low) / (self.high - self.low), 0, 1)
            rates_R = kept_R * rates_R + (1 - kept_R) * rates_R / self.factor
        elif self.scaling == "yarn":
            first, last = (
                pairs * math.log(self.length / (turns * 2 * math.pi)) / math.log(self.base)
                for turns in (self.high, self.low)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), dims - 1)
            divided_R = np.clip((np.arange(pairs) - first) / max(last - first, 1e-3), 0, 1)
            rates_R = (1 - divided_R) * rates_R + divided_R * rates_R / self.factor
        return rates_R.astype(np.float32)

    @property
    def gain(self) -> float:
        """What YaRN multiplies queries and keys by; 1 for the others."""
        longer = self.scaling == "yarn" and self.factor > 1
        return 0.1 * math.log(self.factor) + 1 if longer else 1.0


def waves(positions: jax.Array, rates: Rates, dims: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each pair at each position, float32 (..., dims / 2).

    >>> [wave.shape for wave in waves(jnp.arange(3), Rates(), 4)]
    [(3, 2), (3, 2)]
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rates.per_place(dims)).reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles) * rates.gain, jnp.sin(angles) * rates.gain


def rotated(x_BTNK: jax.Array, waves: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each pair (number i, number i + R) turned by its angle; numbers beyond the pairs stay.

    >>> quarter = (jnp.zeros((1, 1)), jnp.ones((1, 1)))
    >>> rotated(jnp.array([1.0, 0.0, 5.0]).reshape(1, 1, 1, 3), quarter).ravel().tolist()
    [0.0, 1.0, 5.0]

    `waves` are (T, R), or (B, T, R) where rows have positions of their own. Halves are paired, as
    in Llama's weights at Hugging Face; the paper pairs neighbours. Computed in float32: angles
    reach the length.
    """
    wide = jnp.promote_types(x_BTNK.dtype, jnp.float32)
    cos, sin = (
        (wave[None] if wave.ndim == 2 else wave)[:, :, None, :].astype(wide) for wave in waves
    )
    pairs = cos.shape[-1]
    x = x_BTNK.astype(wide)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        parts.append(rest)
    return jnp.concatenate(parts, axis=-1).astype(x_BTNK.dtype)
