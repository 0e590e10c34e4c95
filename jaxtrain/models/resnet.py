"""Residual networks: for small images (He et al. 2016, section 4.2; wide ones by Zagoruyko and
Komodakis) and for ImageNet.

One class, one dial per choice: which block, how many in each stage, how the first layer looks at
the image, and how a shortcut crosses a change of shape. ImageNet's bottleneck strides in its 3x3
convolution ("v1.5"), and norms that end a branch start at zero there.

Dims: B batch, H height, W width, C channels.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.errors import UserError
from jaxtrain.fields import Count, DropRate
from jaxtrain.models import layers

EXPANSION = {"basic": 1, "bottleneck": 4, "preactivation": 1}


class ResNet(nn.Module):
    """Stages of residual blocks, the mean over places, and one dense layer.

    >>> model = ResNet(stages=(1, 1), width=4, stem_width=4)
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    >>> model.apply(variables, jnp.zeros((2, 8, 8, 3))).shape
    (2, 10)

    Inputs are images (B, H, W, C) of any size; each stage after the first halves the places and
    doubles the channels.
    """

    num_classes: Count = 10
    "outputs of the network"
    stages: tuple[int, ...] = (3, 3, 3)
    "blocks in each stage"
    width: Count = 16
    "channels of the first stage (of its 3x3 convolutions, in a bottleneck)"
    block: Literal["basic", "bottleneck", "preactivation"] = "basic"
    "the residual block; preactivation is the wide ResNets'"
    stem: Literal["small", "imagenet"] = "small"
    "first layer: small is 3x3 at full size, imagenet is 7x7 at stride 2 and a max-pool at stride 2"
    stem_width: Count = 16
    "channels of the first layer"
    shortcut: Literal["pad", "project"] = "pad"
    """across a change of shape: every second place and zero channels (He's option A), or a 1x1
    convolution (B)"""
    zero_init: bool = False
    "start the norm that ends each branch at zero, so that every block starts as the identity"
    dropout: DropRate = 0.0
    """share of features dropped in training: inside each block if preactivation, else before the
    last layer"""

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        layers.check_image(inputs, "ResNet")
        layers.check_counts(self.stages, "ResNet.stages", example="3,3,3")
        preactivation = self.block == "preactivation"
        x_BHWC = self._stem(layers.as_float(inputs), train, norm=not preactivation)
        for stage, blocks in enumerate(self.stages):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                block = self._block(
                    self.width * 2**stage, stride, name=f"stage{stage}_block{index}"
                )
                x_BHWC = layers.block_end(block(x_BHWC, train))
        if preactivation:
            x_BHWC = nn.relu(layers.batch_norm(train, name="norm")(x_BHWC))
        x_BC = layers.global_average_pool(x_BHWC)
        x_BC = x_BC if preactivation else layers.Dropout(self.dropout)(x_BC, train)
        return layers.head(self.num_classes, "conv_in")(x_BC)

    def _stem(self, x_BHWC: jax.Array, train: bool, *, norm: bool) -> jax.Array:
        side, stride = (3, 1) if self.stem == "small" else (7, 2)
        x_BHWC = layers.conv(self.stem_width, (side, side), stride=stride, name="stem_conv")(x_BHWC)
        if norm:
            x_BHWC = nn.relu(layers.batch_norm(train, name="stem_norm")(x_BHWC))
        if self.stem == "imagenet":
            # Windows of 3 at stride 2 overlap, so no reshape can do this one.
            # Flax takes pairs as well as a word, though its annotation says a word.
            padding = cast(Any, ((1, 1), (1, 1)))
            x_BHWC = nn.max_pool(x_BHWC, (3, 3), strides=(2, 2), padding=padding)
        return x_BHWC

    def _block(self, width: int, stride: int, *, name: str) -> nn.Module:
        if self.block == "preactivation":
            return PreactivationBlock(width, stride, dropout=self.dropout, name=name)
        kind = BasicBlock if self.block == "basic" else BottleneckBlock
        return kind(width, stride, shortcut=self.shortcut, zero_init=self.zero_init, name=name)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the shortcut."""

    width: int
    stride: int = 1
    shortcut: str = "pad"
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        branch = layers.conv(self.width, (3, 3), stride=self.stride, name="conv0")(x_BHWC)
        branch = nn.relu(layers.batch_norm(train, name="norm0")(branch))
        branch = layers.conv(self.width, (3, 3), name="conv1")(branch)
        branch = layers.batch_norm(
            train, scale=layers.ZEROS if self.zero_init else layers.ONES, name="norm1"
        )(branch)
        return nn.relu(branch + shortcut(self, x_BHWC, branch.shape[-1], train))


class BottleneckBlock(nn.Module):
    """A 1x1, a 3x3 (which strides) and a 1x1 convolution to four times the width, beside the
    shortcut."""

    width: int
    stride: int = 1
    shortcut: str = "project"
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        branch = layers.conv(self.width, (1, 1), name="conv0")(x_BHWC)
        branch = nn.relu(layers.batch_norm(train, name="norm0")(branch))
        branch = layers.conv(self.width, (3, 3), stride=self.stride, name="conv1")(branch)
        branch = nn.relu(layers.batch_norm(train, name="norm1")(branch))
        branch = layers.conv(self.width * EXPANSION["bottleneck"], (1, 1), name="conv2")(branch)
        branch = layers.batch_norm(
            train, scale=layers.ZEROS if self.zero_init else layers.ONES, name="norm2"
        )(branch)
        return nn.relu(branch + shortcut(self, x_BHWC, branch.shape[-1], train))


class PreactivationBlock(nn.Module):
    """Norm and activation before each of two 3x3 convolutions; a change of shape is projected from
    the first activation."""

    width: int
    stride: int = 1
    dropout: DropRate = 0.0

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        active = nn.relu(layers.batch_norm(train, name="norm0")(x_BHWC))
        branch = layers.conv(self.width, (3, 3), stride=self.stride, name="conv0")(active)
        branch = nn.relu(layers.batch_norm(train, name="norm1")(branch))
        branch = layers.Dropout(self.dropout)(branch, train)
        branch = layers.conv(self.width, (3, 3), name="conv1")(branch)
        if x_BHWC.shape == branch.shape:
            return x_BHWC + branch
        return branch + layers.conv(self.width, (1, 1), stride=self.stride, name="shortcut_conv")(
            active
        )


def shortcut(
    block: BasicBlock | BottleneckBlock, x_BHWC: jax.Array, channels: int, train: bool
) -> jax.Array:
    """The shortcut of a block: the identity where shapes agree, else zero channels added or a
    projection."""
    if block.stride == 1 and x_BHWC.shape[-1] == channels:
        return x_BHWC
    if block.shortcut == "project":
        projected = layers.conv(channels, (1, 1), stride=block.stride, name="shortcut_conv")(x_BHWC)
        return layers.batch_norm(train, name="shortcut_norm")(projected)
    extra = channels - x_BHWC.shape[-1]
    if extra < 0:
        raise UserError(
            f"ResNet.shortcut=pad: cannot pad {x_BHWC.shape[-1]} channels to {channels}; set"
            " stem_width <= width, or shortcut=project"
        )
    kept = x_BHWC[:, :: block.stride, :: block.stride]
    return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


def imagenet(stages: tuple[int, ...], block: Literal["basic", "bottleneck"]) -> ResNet:
    """A ResNet for ImageNet with this many blocks a stage."""
    return ResNet(
        num_classes=1000,
        stages=stages,
        width=64,
        block=block,
        stem="imagenet",
        stem_width=64,
        shortcut="project",
        zero_init=True,
    )


NAMES: dict[str, nn.Module] = {
    "resnet20": ResNet(stages=(3, 3, 3)),
    "resnet32": ResNet(stages=(5, 5, 5)),
    "resnet56": ResNet(stages=(9, 9, 9)),
    "resnet110": ResNet(stages=(18, 18, 18)),
    "wrn_28_10": ResNet(stages=(4, 4, 4), width=160, block="preactivation"),
    "resnet18": imagenet((2, 2, 2, 2), "basic"),
    "resnet34": imagenet((3, 4, 6, 3), "basic"),
    "resnet50": imagenet((3, 4, 6, 3), "bottleneck"),
    "resnet101": imagenet((3, 4, 23, 3), "bottleneck"),
}
