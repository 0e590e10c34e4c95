"""The vision transformer (Dosovitskiy et al. 2021; the sizes Ti, S, B, L of that paper and of
DeiT), pre-norm throughout.

Dims: B batch, H height, W width, C channels, L places (patches, and the class token if there is
one), D model width, N heads, K head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.fields import Count, DropRate
from jaxtrain.models import layers
from jaxtrain.models.attention import attention


class ViT(nn.Module):
    """Patches as tokens, transformer blocks, and a head on the class token or on the mean.

    >>> model = ViT(patch=4, width=16, depth=1, heads=2)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)

    Inputs are images (B, H, W, C). `UserError` if a side is no multiple of `patch`, or `width`
    none of `heads`.
    """

    num_classes: Count = 10
    "outputs of the network"
    patch: Count = 4
    "pixels a side of one patch"
    width: Count = 192
    "width of the residual stream"
    depth: Count = 12
    "transformer blocks"
    heads: Count = 3
    "attention heads; they share the width"
    mlp_ratio: Count = 4
    "hidden width of each block's dense layers, as a multiple of the width"
    pool: Literal["token", "mean"] = "token"
    "what the head reads: a learned class token, or the mean over patches"
    positions: Literal["learned", "sincos"] = "learned"
    "position embedding; sincos is fixed and has no parameters"
    dropout: DropRate = 0.0
    "share dropped in training after the embedding and in each branch"
    activation: layers.Activation = "gelu"
    """between a block's dense layers; gelu is the approximation by tanh, timm's weights want
    gelu_exact"""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        self._check(inputs)
        patches_BHWD = layers.space_to_depth(layers.as_float(inputs), self.patch)
        batch, rows, columns, _ = patches_BHWD.shape
        x_BLD = layers.dense(self.width, ("patch", "embed"), name="embed")(
            patches_BHWD.reshape(batch, rows * columns, -1)
        )
        if self.positions == "sincos":
            x_BLD = x_BLD + sincos_positions(rows, columns, self.width)[None].astype(x_BLD.dtype)
        if self.pool == "token":
            token_11D = self.param(
                "token", layers.boxed(layers.ZEROS, None, None, "embed"), (1, 1, self.width)
            )
            x_BLD = jnp.concatenate(
                [jnp.broadcast_to(token_11D, (batch, 1, self.width)).astype(x_BLD.dtype), x_BLD],
                axis=1,
            )
        if self.positions == "learned":
            initializer = layers.boxed(nn.initializers.normal(0.02), None, "position", "embed")
            x_BLD = x_BLD + self.param(
                "positions", initializer, (1, x_BLD.shape[1], self.width)
            ).astype(x_BLD.dtype)
        x_BLD = layers.Dropout(self.dropout)(x_BLD, train)
        for index in range(self.depth):
            x_BLD = Block(
                self.heads,
                self.mlp_ratio * self.width,
                self.dropout,
                self.activation,
                name=f"block{index}",
            )(x_BLD, train)
        x_BLD = layers.layer_norm("embed", name="norm")(x_BLD)
        x_BD = x_BLD[:, 0] if self.pool == "token" else x_BLD.mean(axis=1)
        return layers.head(self.num_classes, "embed", initializer=layers.ZEROS)(x_BD)

    def _check(self, inputs: jax.Array) -> None:
        """The shapes that must fit, said by name before a reshape says it in numbers."""
        layers.check_image(inputs, "ViT")
        height, width = inputs.shape[1:3]
        if height % self.patch or width % self.patch:
            known = [
                side
                for side in (2, 4, 7, 8, 14, 16, 32)
                if height % side == 0 and width % side == 0 and side < max(height, width)
            ]
            remedy = (
                f"choose patch {' or '.join(map(str, known))}"
                if known
                else "crop or resize the images"
            )
            raise UserError(
                f"ViT.patch={self.patch}: images of {height}x{width} cannot be cut into"
                f" {self.patch}x{self.patch} patches; {remedy}"
            )
        layers.check_heads("ViT", self.heads, self.width)
        if self.positions == "sincos" and self.width % 4:
            raise UserError(
                f"ViT.width={self.width}: positions=sincos needs a multiple of 4; nearest:"
                f" {4 * round(self.width / 4) or 4}"
            )


class Block(nn.Module):
    """Attention, then two dense layers, each on a normalised copy and added to the stream."""

    heads: int
    hidden: int
    dropout: DropRate = 0.0
    activation: layers.Activation = "gelu"

    @nn.compact
    def __call__(self, x_BLD: jax.Array, train: bool) -> jax.Array:
        branch = Attention(self.heads, name="attention")(
            layers.layer_norm("embed", name="norm0")(x_BLD)
        )
        x_BLD = x_BLD + layers.Dropout(self.dropout)(branch, train)
        branch = layers.layer_norm("embed", name="norm1")(x_BLD)
        branch = layers.dense(
            self.hidden, ("embed", "mlp"), initializer=layers.XAVIER, name="mlp_in"
        )(branch)
        branch = layers.dense(
            x_BLD.shape[-1], ("mlp", "embed"), initializer=layers.XAVIER, name="mlp_out"
        )(layers.ACTIVATIONS[self.activation](branch))
        return layers.block_end(x_BLD + layers.Dropout(self.dropout)(branch, train))


class Attention(nn.Module):
    """Every place looks at every place."""

    heads: int

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        query, key, value = layers.query_key_value(x_BLD, self.heads)
        mixed_BLNK = attention(query, key, value)
        return layers.output_projection(x_BLD.shape[-1], name="out")(mixed_BLNK)


def sincos_positions(rows: int, columns: int, width: int) -> jax.Array:
    """Fixed position embeddings (rows * columns, width): sines and cosines of the row in one half,
    of the column in the other.

    >>> sincos_positions(2, 3, 8).shape
    (6, 8)
    """
    rates = 1.0 / 10000.0 ** (jnp.arange(width // 4) / max(width // 4 - 1, 1))
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * rates[None] for place in (row, column)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)


def sized(width: int, depth: int, heads: int, patch: int, num_classes: int) -> ViT:
    """A ViT by the numbers of the papers' tables."""
    return ViT(num_classes=num_classes, patch=patch, width=width, depth=depth, heads=heads)


NAMES: dict[str, nn.Module] = {
    "vit_ti16": sized(192, 12, 3, patch=16, num_classes=1000),
    "vit_s16": sized(384, 12, 6, patch=16, num_classes=1000),
    "vit_b16": sized(768, 12, 12, patch=16, num_classes=1000),
    "vit_b32": sized(768, 12, 12, patch=32, num_classes=1000),
    "vit_l16": sized(1024, 24, 16, patch=16, num_classes=1000),
    "vit_ti2": sized(192, 12, 3, patch=2, num_classes=10),
    "vit_ti4": sized(192, 12, 3, patch=4, num_classes=10),
    "vit_s4": sized(384, 12, 6, patch=4, num_classes=10),
}
