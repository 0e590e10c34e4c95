"""Augmentation of images on the device: flips, crops, shifts, erasing, and mixtures of two images.

B batch, H height, W width, C channels, S places along one side, N numbers drawn an example.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtrain.augment import draws, mixup
from jaxtrain.augment.protocol import Fraction, check
from jaxtrain.fields import NonNegative, Probability
from jaxtrain.tree import Batch


@dataclasses.dataclass(frozen=True)
class ImageAugment:
    """Augments standardized float images of shape (B, H, W, C); 0 is the mean, so filling with
    zeros is filling with the mean.

    >>> augment = ImageAugment(flip=0.5, crop_padding=4, mixup=0.2)
    >>> batch = {"image": jnp.ones((8, 6, 6, 1)), "label": jnp.arange(8)}
    >>> sorted(augment(batch, jax.random.split(jax.random.key(0), 8), jax.random.key(1)))
    ['image', 'label', 'label_other', 'label_weight']

    `UserError` if the images have another rank or are not floats, or if there are no labels to
    mix.
    """

    flip: Probability = 0.0
    "Probability of mirroring an image left to right"
    flip_vertical: Probability = 0.0
    "Probability of mirroring an image top to bottom"
    crop_padding: NonNegative = 0.0
    """Pixels added on every side before a crop of the image's own size is taken at random (4 is
    usual for 32 x 32)"""
    padding: Literal["reflect", "zero"] = "reflect"
    "What the padding of a crop shows: the image mirrored at its edge, or zeros"
    translate: Probability = 0.0
    "Largest shift in each direction as a fraction of the side, in whole pixels; zeros move in"
    erase: Probability = 0.0
    "Probability of erasing a random rectangle (Zhong et al., 2017)"
    erase_area: Fraction = 0.4
    "Largest erased part of the image; the smallest is 0.02"
    erase_fill: Literal["zero", "noise"] = "zero"
    """What stands in an erased rectangle: zeros, or Gaussian noise, which is a little better in the
    paper but slow to draw on CPUs"""
    mixup: NonNegative = 0.0
    """Alpha of mixup: images are blended with a weight from Beta(alpha, alpha) (Zhang et al., 2017;
    0.2 for ImageNet, 1 for CIFAR)"""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix: a rectangle comes from another image (Yun et al., 2019; usually 1); with
    mixup also on, each batch takes one of both"""

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """The batch with its images changed; with mixtures also `label_other` (B,) and
        `label_weight` (B,), the weight of `label`."""
        image_BHWC = batch["image"]
        check(
            image_BHWC,
            ranks=(4,),
            name="ImageAugment",
            expected="(B, H, W, C); for signals take SignalAugment (--augment=signal, if it is"
            " offered)",
        )
        draws_BN = draws.uniform(keys_B)
        image_BHWC = self._move(image_BHWC, draws_BN)
        if not draws.is_off(self.erase):
            image_BHWC = self._erase(image_BHWC, draws_BN, keys_B)
        return mixup.mix(
            {**batch, "image": image_BHWC}, self.mixup, self.cutmix, draws_BN[:, draws.CENTER], key
        )

    def _move(self, image_BHWC: jax.Array, draws_BN: jax.Array) -> jax.Array:
        # Every move says where a pixel comes from, so all of them together are one gather along
        # each axis.
        flips = ((self.flip_vertical, draws.FLIP_VERTICAL), (self.flip, draws.FLIP))
        if all(
            draws.is_off(strength)
            for strength in (self.flip, self.flip_vertical, self.crop_padding, self.translate)
        ):
            return image_BHWC
        sources, inside = [], []
        for axis, (flip, place) in enumerate(flips):
            size = image_BHWC.shape[1 + axis]
            source_BS = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(image_BHWC), size))
            inside_BS = jnp.ones(source_BS.shape, bool)
            if not draws.is_off(flip):
                source_BS = jnp.where(
                    (draws_BN[:, place] < flip)[:, None], size - 1 - source_BS, source_BS
                )
            if not draws.is_off(self.translate):
                source_BS = (
                    source_BS
                    + draws.random_integer(
                        draws_BN[:, draws.TRANSLATE][:, axis], self.translate * size
                    )[:, None]
                )
                inside_BS &= (source_BS >= 0) & (source_BS < size)
            if not draws.is_off(self.crop_padding):
                source_BS = (
                    source_BS
                    + draws.random_integer(draws_BN[:, draws.CROP][:, axis], self.crop_padding)[
                        :, None
                    ]
                )
                if self.padding == "zero":
                    inside_BS &= (source_BS >= 0) & (source_BS < size)
                source_BS = _reflect(source_BS, size)
            sources.append(jnp.clip(source_BS, 0, size - 1))
            inside.append(inside_BS)
        moved_BHWC = jax.vmap(lambda image_HWC, rows_H, columns_W: image_HWC[rows_H][:, columns_W])(
            image_BHWC, *sources
        )
        if draws.is_off(self.translate) and (
            draws.is_off(self.crop_padding) or self.padding == "reflect"
        ):
            return moved_BHWC
        return jnp.where(
            (inside[0][:, :, None] & inside[1][:, None, :])[..., None],
            moved_BHWC,
            jnp.zeros_like(moved_BHWC),
        )

    def _erase(self, image_BHWC: jax.Array, draws_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
        # The paper redraws a rectangle that does not fit; that would be a loop, so ours is cut to
        # the image's sides instead.
        sides_A = image_BHWC.shape[1:3]
        area_B = (
            0.02 + draws_BN[:, draws.AREA] * jnp.maximum(self.erase_area - 0.02, 0.0)
        ) * math.prod(sides_A)
        aspect_B = jnp.exp((2 * draws_BN[:, draws.ASPECT] - 1) * math.log(1 / 0.3))
        extents = [jnp.sqrt(area_B * aspect_B), jnp.sqrt(area_B / aspect_B)]
        inside_BHW1 = draws.random_boxes(
            sides_A, extents, draws_BN[:, draws.BOX]
        ) & draws.per_example(draws_BN[:, draws.ERASE] < self.erase, 4)
        fill_BHWC = (
            jnp.zeros_like(image_BHWC)
            if self.erase_fill == "zero"
            else draws.normal(keys_B, "erase", image_BHWC)
        )
        return jnp.where(inside_BHW1, fill_BHWC, image_BHWC)


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Folds any index into 0..size-1 as NumPy's `reflect` padding does: the edge itself is not
    repeated."""
    period = max(2 * (size - 1), 1)
    folded = jnp.mod(index, period)
    return jnp.minimum(folded, period - folded) if size > 1 else jnp.zeros_like(index)
