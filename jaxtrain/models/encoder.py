"""The encoder over tokens: BERT (Devlin et al. 2018, arXiv 1810.04805) and what is built like it,
such as MiniLM. Every place sees every other of its segment.

It is made of the transformer's blocks, with norms on the sums. What comes out is `head`'s to say:
logits of the token at each place, the states, one state of the whole, or classes.

Dims: B batch, T tokens of a sequence, V vocabulary, D model width, C classes.
"""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from jaxtrain.errors import UserError
from jaxtrain.fields import Above, AtLeast, Count, DropRate
from jaxtrain.models import layers, token_inputs
from jaxtrain.models.token_inputs import look_up
from jaxtrain.models.transformer import (
    SMALL_NORMAL,
    Block,
    BlockSettings,
    Surroundings,
)


class Encoder(nn.Module):
    """Tokens (B, T) in; logits of the token at each place (B, T, V) out, or what `head` says.

    >>> model = Encoder(vocabulary=11, width=16, depth=1, heads=2, max_length=8)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> model.apply(variables, jnp.zeros((2, 8), jnp.int32)).shape
    (2, 8, 11)

    With `segments` (B, T) a place sees only what has its number, and 0 is padding; `token_types`
    (B, T) say which part of a pair a token is of, 0 unless they are given. `positions` are as
    `Transformer` has them. `UserError` if the input
    is no (batch, length) of integers or too long, or `heads` do not fit. A token beyond the
    vocabulary makes its sequence nan.
    """

    vocabulary: Count = 64
    "how many tokens there are"
    width: Count = 128
    "width of the residual stream"
    depth: Count = 4
    "transformer blocks"
    heads: Count = 4
    "attention heads; they share the width"
    hidden: Annotated[int, AtLeast(0)] = 0
    "hidden width of each block's dense layers; 0 for 4 times the width"
    activation: layers.Activation = "gelu_exact"
    "between a block's dense layers; gelu is the approximation by tanh"
    norm_epsilon: Annotated[float, Above(0)] = 1e-12
    "added to the variance in every norm"
    max_length: Count = 512
    "how many places have an embedding"
    token_types: Count = 2
    "how many parts of an input are told apart"
    pooler: bool = False
    "a dense layer and tanh on the first token's state; it enters the head of classes"
    head: Literal["tokens", "states", "pooled", "classes"] = "tokens"
    """what comes out: logits of the token at each place, the state of each place, the pooler's
    state, or logits of classes from the pooler's state (from the first token's, without one)"""
    num_classes: Count = 2
    "outputs of the head of classes"
    pool: Literal["first", "mean"] = "first"
    """what the head of classes sees: the first token's state, or the mean of all that are no
    padding, as sentence encoders are trained"""
    dropout: DropRate = 0.0
    "share dropped in training after the embedding, in each branch, and before the classes"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        train: bool = False,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        self._check(tokens, segments=segments, positions=positions, token_types=token_types)
        embed_VD = self._table("embed", "vocab", self.vocabulary)
        places = token_inputs.places_of(tokens, segments, positions)
        # a row of places for all: ranks are the tokens'
        places_BT = jnp.broadcast_to(places, tokens.shape)
        types_BT = jnp.zeros_like(tokens) if token_types is None else token_types
        x_BTD = look_up(embed_VD, tokens)
        x_BTD = token_inputs.nan_where_placeless(x_BTD, segments, positions)
        x_BTD += look_up(self._table("token_types", "position", self.token_types), types_BT)
        x_BTD += look_up(self._table("positions", "position", self.max_length), places_BT)
        x_BTD = layers.layer_norm("embed", epsilon=self.norm_epsilon, name="norm")(x_BTD)
        x_BTD = layers.Dropout(self.dropout)(x_BTD, train)
        around = Surroundings(segments, places_BT)
        for index in range(self.depth):
            block = Block(self.block_settings(), name=f"block{index}")
            x_BTD, _ = block(x_BTD, around, None, None, train)
            x_BTD = layers.block_end(x_BTD)
        return self._head(x_BTD, embed_VD, segments, train)

    def _table(self, name: str, axis: str | None, rows: int) -> jax.Array:
        return self.param(name, layers.boxed(SMALL_NORMAL, axis, "embed"), (rows, self.width))

    @nn.nowrap
    def block_settings(self) -> BlockSettings:
        """What each block is."""
        return BlockSettings(
            heads=self.heads,
            key_heads=self.heads,
            head_dim=self.width // self.heads,
            hidden=self.hidden or 4 * self.width,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            arrangement="post",
            causal=False,
            dropout=self.dropout,
        )

    def _head(
        self, x_BTD: jax.Array, embed_VD: jax.Array, segments: jax.Array | None, train: bool
    ) -> jax.Array:
        pooled_BD = _mean(x_BTD, segments) if self.pool == "mean" else _first(x_BTD, segments)
        if self.pooler:
            # made whatever comes out, so that a file's pooler has its place
            pooler = layers.dense(self.width, ("embed", "mlp"), name="pooler")
            pooled_BD = jnp.tanh(pooler(pooled_BD))
        if self.head == "states":
            return x_BTD
        if self.head == "pooled":
            return pooled_BD
        if self.head == "classes":
            pooled_BD = layers.Dropout(self.dropout)(pooled_BD, train)
            return layers.head(self.num_classes, "embed", initializer=SMALL_NORMAL)(pooled_BD)
        x_BTD = layers.dense(self.width, ("embed", "mlp"), name="head_in")(x_BTD)
        x_BTD = layers.ACTIVATIONS[self.activation](x_BTD)
        x_BTD = layers.layer_norm("embed", epsilon=self.norm_epsilon, name="head_norm")(x_BTD)
        logits_BTV = jnp.einsum("btd,vd->btv", *promote_dtype(x_BTD, embed_VD))
        bias_V = self.param("head_bias", layers.boxed(layers.ZEROS, "vocab"), (self.vocabulary,))
        return layers.add_bias(logits_BTV, bias_V)

    def _check(self, tokens: jax.Array, **marks: jax.Array | None) -> None:
        """What must fit, said by name before an index or a reshape says it in numbers."""
        token_inputs.check("Encoder", tokens, **marks)
        if tokens.shape[1] > self.max_length:
            raise UserError(
                f"Encoder.max_length={self.max_length}: the input has {tokens.shape[1]} tokens;"
                " give it shorter ones, or raise max_length in a model of your own"
            )
        layers.check_heads("Encoder", self.heads, self.width)
        if self.pool == "mean" and self.pooler:
            raise UserError(
                "Encoder.pool=mean: a pooler sees the first token's state only; set pooler=False,"
                " or pool=first"
            )
        if self.head == "pooled" and not self.pooler:
            raise UserError("Encoder.head=pooled: there is no pooler; set pooler=True")


def _first(x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """The state of the first token (B, D) that is no padding."""
    if segments_BT is None:
        return x_BTD[:, 0]
    first_B = jnp.argmax(segments_BT > 0, axis=1)
    return jnp.take_along_axis(x_BTD, first_B[:, None, None], axis=1)[:, 0]


def _mean(x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """The mean state of the tokens (B, D) that are no padding; in float32, for long sums."""
    if segments_BT is None:
        return x_BTD.mean(axis=1, dtype=jnp.float32).astype(x_BTD.dtype)
    real_BT1 = (segments_BT > 0)[..., None]
    # not times 0: what stands at padding means nothing
    states_BTD = jnp.where(real_BT1, x_BTD.astype(jnp.float32), 0.0)
    count_B1 = jnp.maximum(real_BT1.sum(axis=1), 1).astype(jnp.float32)
    return (states_BTD.sum(axis=1) / count_B1).astype(x_BTD.dtype)


def sentence_embeddings(
    states_BTD: jax.Array, real_BT: jax.Array, pool: Literal["mean", "first"] = "mean"
) -> jax.Array:
    """One vector of length 1 for each sentence (B, D): the mean of the states of its real tokens,
    normalised, as the sentence encoder MiniLM is trained, or the state of the first (BGE).

    >>> states = jnp.array([[[3.0, 4.0], [0.0, 0.0]]])
    >>> sentence_embeddings(states, jnp.array([[1, 0]])).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929]]

    `real_BT` is 0 at padding, as segments are. In float32.
    """
    pooled_BD = (_mean if pool == "mean" else _first)(states_BTD.astype(jnp.float32), real_BT)
    squares_B = jnp.sum(jnp.square(pooled_BD), axis=-1, keepdims=True)
    return pooled_BD * jax.lax.rsqrt(jnp.maximum(squares_B, 1e-24))
