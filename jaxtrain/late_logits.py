"""Logits that are not there yet: the states and the kernel that make them, for a loss that goes
over a large vocabulary in parts.

Dims: B batch, T tokens, D width, V rows of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LateLogits:
    """What a model gives instead of logits (B, T, V)."""

    states_BTD: jax.Array
    kernel_DV: jax.Array
    cap: float | None = dataclasses.field(metadata={"static": True})
    vocabulary: int = dataclasses.field(metadata={"static": True})
    """How many of the kernel's columns are tokens; the rest is padding."""
    chunk: int = dataclasses.field(metadata={"static": True})
    """How many tokens' logits a loss may hold at once."""

    def logits(self) -> jax.Array:
        """All of them, float32."""
        logits = jnp.einsum(
            "btd,dv->btv", self.states_BTD, self.kernel_DV, preferred_element_type=jnp.float32
        )
        if self.cap is not None:
            logits = self.cap * jnp.tanh(logits / self.cap)
        return logits[..., : self.vocabulary]
