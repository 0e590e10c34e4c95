"""A small convolutional network for images and for 1-D signals.

Each stage is a few convolutions with batch normalisation; between stages the places are halved.
Pooling comes right after a convolution, before its norm and activation: with an increasing
activation that is nearly the same function, and the elementwise work shrinks fourfold, which on CPU
is a good part of a step.

Dims: B batch, C channels, `spatial` all between (H and W of an image, L of a signal).
"""

from typing import Literal

import jax
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.fields import Count, DropRate
from jaxtrain.models import layers


class ConvNet(nn.Module):
    """Convolutions in stages, then the mean over places and one dense layer.

    >>> import jax.numpy as jnp
    >>> model = ConvNet(widths=(8, 16))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> model.apply(variables, jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)

    Inputs are images (B, H, W, C) or signals (B, L, C) or (B, L).
    """

    num_classes: Count = 10
    "outputs of the network"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    """channels of each stage; the places are halved between stages, so late stages are cheap and
    hold most parameters"""
    depth: Count = 1
    "convolutions a stage"
    kernel: Count = 3
    "places a side that a convolution sees"
    block: Count = 1
    """fold blocks of this many pixels a side into channels first: 2 makes a step cheaper, and cost
    1% on Fashion-MNIST"""
    norm: Literal["batch", "none"] = "batch"
    "normalisation after each convolution"
    activation: layers.Activation = "relu"
    "the nonlinearity"
    pool: Literal["max", "mean"] = "max"
    "how places are halved"
    padding: Literal["zero", "circular"] = "zero"
    "what lies beyond the border; circular for inputs that wrap around"
    dropout: DropRate = 0.0
    "share of the features dropped before the last layer in training"

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        layers.check_counts(self.widths, "ConvNet.widths", example="16,32,64")
        x = layers.as_float(inputs)
        x = x[..., None] if x.ndim == 2 else x
        if x.ndim not in (3, 4):
            raise UserError(
                f"ConvNet: input shape {inputs.shape} is neither (batch, length[, channels]) nor"
                " (batch, height, width, channels)"
            )
        x = layers.space_to_depth(x, self.block) if self.block > 1 else x
        for stage, width in enumerate(self.widths):
            for index in range(self.depth):
                last = index == self.depth - 1 and stage < len(self.widths) - 1
                x = self._conv_block(
                    x, width, halve=last, train=train, name=f"stage{stage}_{index}"
                )
            x = layers.block_end(x)
        x = layers.global_average_pool(x)
        x = layers.Dropout(self.dropout)(x, train)
        return layers.head(self.num_classes, "conv_out")(x)

    def _conv_block(
        self, x: jax.Array, width: int, *, halve: bool, train: bool, name: str
    ) -> jax.Array:
        """One convolution with its pooling, norm and activation."""
        kernel = (self.kernel,) * (x.ndim - 2)
        circular, bias = self.padding == "circular", self.norm == "none"
        x = layers.conv(
            width,
            kernel,
            bias=bias,
            circular=circular,
            initializer=layers.HE_FAN_IN,
            name=f"{name}_conv",
        )(x)
        x = layers.halve(x, self.pool) if halve else x
        x = layers.batch_norm(train, name=f"{name}_norm")(x) if self.norm == "batch" else x
        return layers.ACTIVATIONS[self.activation](x)


NAMES: dict[str, nn.Module] = {
    "convnet": ConvNet(),
    "convnet1d": ConvNet(widths=(32, 64, 128), kernel=5),
}
