"""How the next token is drawn from logits: greedily, or from what temperature, top-k, top-p and
min-p leave of them.

Dims: B batch, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.errors import UserError

UNKNOWN = -2
"""What is drawn from logits that are nan."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The settings; they apply in the order of the fields, as in `transformers`.

    >>> Drawing(temperature=-1.0)
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: temperature=-1.0: must be >= 0 (0 takes the likeliest token)
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens that together have this probability (Holtzman et al. 2019,
    arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature={self.temperature}: must be >= 0 (0 takes the likeliest token)"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be >= 0 (0 for all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1 (1 for all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: must be from 0 (all tokens) to 1")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at all."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def numbers(self) -> dict[str, Any]:
        """The settings as a program takes them, so that other values are no other program."""
        return {
            "temperature": jnp.float32(self.temperature or 1),
            "top_k": jnp.int32(self.top_k),
            "top_p": jnp.float32(self.top_p),
            "min_p": jnp.float32(self.min_p),
        }


def drawn(
    logits_BV: jax.Array, keys_B: jax.Array, numbers: Any, *, greedy: bool, filtered: bool
) -> jax.Array:
    """A token for each row, int32 (B,); `UNKNOWN` where logits are nan.

    >>> logits_BV, keys_B = jnp.array([[0.0, 3.0, 1.0]]), jax.random.split(jax.random.key(0), 1)
    >>> drawn(logits_BV, keys_B, {}, greedy=True, filtered=False).tolist()
    [1]
    """
    logits_BV = logits_BV.astype(jnp.float32)
    unknown_B = jnp.isnan(logits_BV).any(axis=-1)
    if not greedy:
        top_B1 = logits_BV.max(axis=-1, keepdims=True)
        # the largest stays 0, however small the temperature is: nothing overflows upwards
        logits_BV = jnp.where(
            logits_BV == top_B1, 0.0, (logits_BV - top_B1) / numbers["temperature"]
        )
        if filtered:
            logits_BV = likely(logits_BV, numbers["top_k"], numbers["top_p"], numbers["min_p"])
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))
        logits_BV = logits_BV + noise(keys_B)  # the largest is a draw from their softmax
    tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jnp.where(unknown_B, UNKNOWN, tokens_B)


def likely(
    logits_BV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float, min_p: jax.Array | float
) -> jax.Array:
    """The logits, -inf for tokens that the settings leave out; of equal ones all stay.

    >>> likely(jnp.array([[3.0, 1.0, 2.0]]), top_k=2, top_p=1.0, min_p=0.0).tolist()
    [[3.0, -inf, 2.0]]
    """
    vocabulary = logits_BV.shape[-1]
    falling_BV = -jnp.sort(-logits_BV, axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    falling_BV = jnp.where(jnp.arange(vocabulary)[None] < count, falling_BV, -jnp.inf)
    shares_BV = jax.nn.softmax(falling_BV, axis=-1)
    # a token stays if those before it have not reached top_p yet; the first always does
    before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
    stays_BV = (before_BV < top_p) & (shares_BV >= min_p * shares_BV[:, :1])
    stays_BV &= falling_BV > -jnp.inf
    least_B1 = jnp.min(jnp.where(stays_BV, falling_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
