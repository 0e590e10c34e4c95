"""Late logits: what a language model gives in place of its logits where these are too large to
exist at once.

At 50,000 tokens of vocabulary the logits of 32 sequences of 1,024 are 6.1 GiB in float32, more than
all else that a small model keeps. A task that gets the states before the head and the head's kernel
makes its loss of a few tokens at a time (`vocabulary_loss.py`).

Dims: B batch, T tokens of a sequence, N tokens of any sequences, D model width, V rows of the
vocabulary's table.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LateLogits:
    """The logits of a model, not yet computed: the head's product is left to who needs it.

    >>> late = LateLogits(jnp.ones((2, 3, 4)), jnp.ones((4, 8)), cap=None, vocabulary=7, chunk=1)
    >>> late.shape, late.logits().shape, float(late.logits()[0, 0, 0])
    ((2, 3, 7), (2, 3, 7), 4.0)

    It has the shape and dtype that its logits have, so whoever looks only at these need not know.
    """

    states_BTD: jax.Array
    "What the last norm gives."
    kernel_DV: jax.Array
    "Of the head; the transposed embedding where they are tied."
    cap: float | None = dataclasses.field(metadata={"static": True})
    "The soft cap c of logits, c tanh(x / c); none if None."
    vocabulary: int = dataclasses.field(metadata={"static": True})
    "How many tokens there are; columns of the kernel beyond are padding."
    chunk: int = dataclasses.field(metadata={"static": True})
    "How many tokens of each sequence have their logits at once in a loss."

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T, vocabulary), that of the logits."""
        return (*self.states_BTD.shape[:-1], self.vocabulary)

    @property
    def ndim(self) -> int:
        """The number of dims of the logits."""
        return self.states_BTD.ndim

    @property
    def dtype(self) -> Any:
        """float32, that of the logits."""
        return jnp.dtype(jnp.float32)

    def logits(self) -> jax.Array:
        """All logits (B, T, vocabulary) in float32, without the padding."""
        rows_ND = self.states_BTD.reshape(-1, self.states_BTD.shape[-1])
        logits_NV = logits_of(rows_ND, self.kernel_DV, self.cap)
        return logits_NV[:, : self.vocabulary].reshape(self.shape)


def whole(outputs: Any) -> Any:
    """The logits, where they are late ones; any other outputs as they are.

    >>> whole(jnp.ones((1, 2, 3))).shape
    (1, 2, 3)
    """
    return outputs.logits() if isinstance(outputs, LateLogits) else outputs


def logits_of(states_ND: jax.Array, kernel_DV: jax.Array, cap: float | None = None) -> jax.Array:
    """The head's product of rows (N, D), summed in float32, and its soft cap.

    >>> logits = logits_of(jnp.ones((1, 4), jnp.bfloat16), jnp.ones((4, 1), jnp.bfloat16), cap=2.0)
    >>> logits.dtype, round(float(logits[0, 0]), 3)
    (dtype('float32'), 1.928)
    """
    logits_NV = jnp.matmul(states_ND, kernel_DV, preferred_element_type=jnp.float32)
    return logits_NV if not cap else cap * jnp.tanh(logits_NV / cap)
