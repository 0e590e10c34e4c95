"""The transformer over tokens: a causal decoder, pre-norm, with learned or rotary positions and a
head that may be tied.

GPT-2's arrangement (Radford et al. 2019), laid out so that its relatives become further fields
rather than further files. It computes in the dtype of its parameters: tokens are integers, so the
embedding decides the stream. Norms, the softmax and rotations are float32 inside.

Dims: B batch, T tokens of a sequence, V vocabulary, D model width, N heads, K head width, R half of
K.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from jaxtrain.errors import UserError
from jaxtrain.fields import Count, DropRate
from jaxtrain.models import layers

SMALL_NORMAL = nn.initializers.normal(0.02)
ROTARY_BASE = 10000.0


class Transformer(nn.Module):
    """Tokens (B, T) in; for each place (B, T, V), the logits of the token that comes next.

    >>> model = Transformer(vocabulary=11, width=16, depth=1, heads=2)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> model.apply(variables, jnp.zeros((2, 8), jnp.int32)).shape
    (2, 8, 11)

    A place sees itself and what is before it. Any length will do with rotary positions, up to
    `max_length` with learned ones. `UserError` if the input is no (batch, length) of integers or
    too long, or `heads` do not fit. A token beyond the vocabulary makes its sequence nan.
    """

    vocabulary: Count = 64
    "how many tokens there are"
    width: Count = 128
    "width of the residual stream"
    depth: Count = 4
    "transformer blocks"
    heads: Count = 4
    "attention heads; they share the width"
    mlp_ratio: Count = 4
    "hidden width of each block's dense layers, as a multiple of the width"
    positions: Literal["learned", "rotary"] = "learned"
    """how places are told apart: a learned embedding of each, or queries and keys rotated by
    their place (no parameters)"""
    max_length: Count = 1024
    "how many places a learned embedding has; of no effect with rotary positions"
    tied: bool = True
    "the head's kernel is the token embedding; otherwise it has its own"
    dropout: DropRate = 0.0
    "share dropped in training after the embedding and in each branch"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        self._check(inputs)
        embed_VD = self.param(
            "embed", layers.boxed(SMALL_NORMAL, "vocab", "embed"), (self.vocabulary, self.width)
        )
        x_BTD = look_up(embed_VD, inputs)
        length, angles_TR = inputs.shape[1], None
        if self.positions == "learned":
            initializer = layers.boxed(SMALL_NORMAL, "position", "embed")
            positions_TD = self.param("positions", initializer, (self.max_length, self.width))[
                :length
            ]
            x_BTD = layers.add_bias(x_BTD, positions_TD)
        else:
            angles_TR = rotary_angles(length, self.width // self.heads)
        x_BTD = layers.Dropout(self.dropout)(x_BTD, train)
        for index in range(self.depth):
            block = Block(
                self.heads, self.mlp_ratio * self.width, self.dropout, name=f"block{index}"
            )
            x_BTD = layers.block_end(block(x_BTD, angles_TR, train))
        x_BTD = layers.layer_norm("embed", name="norm")(x_BTD)
        if self.tied:
            return jnp.einsum("btd,vd->btv", *promote_dtype(x_BTD, embed_VD))
        return layers.dense(
            self.vocabulary, ("embed", "vocab"), bias=False, initializer=SMALL_NORMAL, name="head"
        )(x_BTD)

    def _check(self, inputs: jax.Array) -> None:
        """What must fit, said by name before an index or a reshape says it in numbers."""
        if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise UserError(
                f"Transformer: input {inputs.dtype}{list(inputs.shape)} is not (batch, length) of"
                " integers; give it tokens"
            )
        length = inputs.shape[1]
        if self.positions == "learned" and length > self.max_length:
            raise UserError(
                f"Transformer.max_length={self.max_length}: the input has {length} tokens; make it"
                f" {length}, or choose positions=rotary"
            )
        if self.width % self.heads:
            raise UserError(
                f"Transformer.heads={self.heads}: does not divide width={self.width}; choose a"
                " divisor of it"
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise UserError(
                f"Transformer.heads={self.heads}: heads of {self.width // self.heads} are odd, and"
                f" positions=rotary rotates pairs; choose heads so that width={self.width} / heads"
                " is even"
            )


class Block(nn.Module):
    """Attention to what came before, then two dense layers, each on a normalised copy and added to
    the stream."""

    heads: int
    hidden: int
    dropout: DropRate = 0.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, angles_TR: jax.Array | None, train: bool) -> jax.Array:
        branch = Attention(self.heads, name="attention")(
            layers.layer_norm("embed", name="norm0")(x_BTD), angles_TR
        )
        x_BTD = x_BTD + layers.Dropout(self.dropout)(branch, train)
        branch = layers.layer_norm("embed", name="norm1")(x_BTD)
        branch = layers.dense(
            self.hidden, ("embed", "mlp"), initializer=layers.XAVIER, name="mlp_in"
        )(branch)
        branch = layers.dense(
            x_BTD.shape[-1], ("mlp", "embed"), initializer=layers.XAVIER, name="mlp_out"
        )(nn.gelu(branch))
        return x_BTD + layers.Dropout(self.dropout)(branch, train)


class Attention(nn.Module):
    """Every place looks at itself and those before it; queries and keys are rotated if there are
    angles."""

    heads: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, angles_TR: jax.Array | None) -> jax.Array:
        query, key, value = layers.query_key_value(x_BTD, self.heads)
        if angles_TR is not None:
            query, key = apply_rotary(query, angles_TR), apply_rotary(key, angles_TR)
        mixed_BTNK = layers.attention(query, key, value, causal=True)
        return layers.output_projection(x_BTD.shape[-1], name="out")(mixed_BTNK)


def look_up(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The row of each token, in the dtype of the table; nan for a token that has none.

    >>> look_up(jnp.eye(3), jnp.array([[2, 0]])).tolist()
    [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]

    A gather, whose gradient is a scatter: on two CPU cores 0.2 ms, there and back, where a one-hot
    product took 2.1 ms (64 x 64 tokens of 16, width 64; larger vocabularies are worse for the
    product). It is summed in float32: in bfloat16 4,096 equal numbers made a tenth of their sum.
    """
    wide = jnp.promote_types(embed_VD.dtype, jnp.float32)
    # -1 is a common padding, and to `take` the last row
    tokens_BT = jnp.where(tokens_BT < 0, embed_VD.shape[0], tokens_BT)
    return jnp.take(
        embed_VD.astype(wide), tokens_BT, axis=0, mode="fill", fill_value=jnp.nan
    ).astype(embed_VD.dtype)


def rotary_angles(length: int, head_dim: int) -> jax.Array:
    """The rotation of each pair of numbers at each place (T, R), in radians: from 1 down to
    nearly 1/10000 a place (Su et al. 2021).

    >>> rotary_angles(3, 4).tolist()[1]
    [1.0, 0.009999999776482582]
    """
    pairs = head_dim // 2
    rates_R = ROTARY_BASE ** -(jnp.arange(pairs, dtype=jnp.float32) / pairs)
    return jnp.arange(length, dtype=jnp.float32)[:, None] * rates_R[None]


def apply_rotary(x_BTNK: jax.Array, angles_TR: jax.Array) -> jax.Array:
    """Each pair (number i, number i + R) rotated by its angle, so that a product of two depends on
    the distance of their places only.

    >>> apply_rotary(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), jnp.array([[jnp.pi / 2]])).round(
    ...     3
    ... ).ravel().tolist()
    [-0.0, 1.0]

    Halves are paired, as in Llama's weights at Hugging Face; the paper pairs neighbours. Computed
    in float32: angles reach the length.
    """
    wide = jnp.promote_types(x_BTNK.dtype, jnp.float32)
    cos, sin = (wave(angles_TR).astype(wide)[None, :, None, :] for wave in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTNK.astype(wide), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x_BTNK.dtype)


NAMES: dict[str, nn.Module] = {
    "decoder_tiny": Transformer(width=64, depth=2, heads=4),
    "decoder_small": Transformer(width=128, depth=4, heads=4),
    "decoder_medium": Transformer(width=384, depth=6, heads=6),
}
