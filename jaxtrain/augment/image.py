"""Augmentation of a batch on the device: flips, crops, shifts, erasing, warps and noise of each
example, and mixtures of two examples.

An augmentation is a frozen dataclass called as `augment(batch, keys_B, key)`. What happens to one
example depends on its own key only, so it is the same for any batch, shard or microbatch that it
comes in. Mixtures depend on the batch: their partner is the example at the mirrored place, and one
weight, from `key`, serves all; so augment the whole batch, then cut it into microbatches. Strengths
are traced; those at 0 leave no trace in the program. Parts: the public classes, random numbers,
masks, resampling; `mixtures.py` has mixup and cutmix.

B batch, H height, W width, L length of a signal, C channels, A spatial axes (H and W, or L), N
numbers drawn an example.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxtrain.augment import mixup as mixtures
from jaxtrain.errors import UserError
from jaxtrain.fields import Between, NonNegative, Probability, Traced

Batch = dict[str, jax.Array]
Fraction = Annotated[float, Between(0, 1), Traced()]

# Places in the row of uniform numbers that is drawn for each example: an effect owns its places, so
# switching one on moves no other.
_FLIP, _FLIP_VERTICAL, _ERASE, _AREA, _ASPECT = 0, 1, 2, 3, 4
_CROP, _TRANSLATE, _BOX, _CENTER = slice(5, 7), slice(7, 9), slice(9, 11), slice(11, 13)
_STRETCH, _SCALE, _SHEAR, _WARP = 13, 14, 15, slice(16, 22)
_DRAWS = 22
_WAVES = 3
_SMOOTH_STEPS = 2.0  # width of the Gaussian filter of smooth noise, in samples


class Augment(Protocol):
    """What the training step calls on every batch; evaluation never does."""

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """A changed batch, from one typed key an example and one for the whole batch."""
        ...


@dataclasses.dataclass(frozen=True)
class NoAugment:
    """Leaves every batch as it is.

    >>> NoAugment()(
    ...     {"label": jnp.arange(2)}, jax.random.split(jax.random.key(0), 2), jax.random.key(1)
    ... )["label"].tolist()
    [0, 1]
    """

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """The same batch."""
        return batch


@dataclasses.dataclass(frozen=True)
class ImageAugment:
    """Augments standardized float images of shape (B, H, W, C); 0 is the mean, so filling with
    zeros is filling with the mean.

    >>> augment = ImageAugment(flip=0.5, crop_padding=4, mixup=0.2)
    >>> batch = {"image": jnp.ones((8, 6, 6, 1)), "label": jnp.arange(8)}
    >>> sorted(augment(batch, jax.random.split(jax.random.key(0), 8), jax.random.key(1)))
    ['image', 'label', 'label_other', 'label_weight']

    `ValueError` if the images have another rank or are not floats, or if there are no labels to
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
        _check(
            image_BHWC,
            ranks=(4,),
            name="ImageAugment",
            expected="(B, H, W, C); for signals take --augment=signal",
        )
        draws_BN = _draws(keys_B)
        image_BHWC = self._move(image_BHWC, draws_BN)
        if not mixtures.off(self.erase):
            image_BHWC = self._erase(image_BHWC, draws_BN, keys_B)
        return mixtures.mix(
            {**batch, "image": image_BHWC}, self.mixup, self.cutmix, draws_BN[:, _CENTER], key
        )

    def _move(self, image_BHWC: jax.Array, draws_BN: jax.Array) -> jax.Array:
        # Every move says where a pixel comes from, so all of them together are one gather along
        # each axis.
        flips = ((self.flip_vertical, _FLIP_VERTICAL), (self.flip, _FLIP))
        if all(
            mixtures.off(strength)
            for strength in (self.flip, self.flip_vertical, self.crop_padding, self.translate)
        ):
            return image_BHWC
        sources, inside = [], []
        for axis, (flip, place) in enumerate(flips):
            size = image_BHWC.shape[1 + axis]
            source_BS = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (len(image_BHWC), size))
            inside_BS = jnp.ones(source_BS.shape, bool)
            if not mixtures.off(flip):
                source_BS = jnp.where(
                    (draws_BN[:, place] < flip)[:, None], size - 1 - source_BS, source_BS
                )
            if not mixtures.off(self.translate):
                source_BS = (
                    source_BS
                    + _whole(draws_BN[:, _TRANSLATE][:, axis], self.translate * size)[:, None]
                )
                inside_BS &= (source_BS >= 0) & (source_BS < size)
            if not mixtures.off(self.crop_padding):
                source_BS = (
                    source_BS + _whole(draws_BN[:, _CROP][:, axis], self.crop_padding)[:, None]
                )
                if self.padding == "zero":
                    inside_BS &= (source_BS >= 0) & (source_BS < size)
                source_BS = _reflect(source_BS, size)
            sources.append(jnp.clip(source_BS, 0, size - 1))
            inside.append(inside_BS)
        moved_BHWC = jax.vmap(lambda image_HWC, rows_H, columns_W: image_HWC[rows_H][:, columns_W])(
            image_BHWC, *sources
        )
        if mixtures.off(self.translate) and (
            mixtures.off(self.crop_padding) or self.padding == "reflect"
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
        area_B = (0.02 + draws_BN[:, _AREA] * jnp.maximum(self.erase_area - 0.02, 0.0)) * math.prod(
            sides_A
        )
        aspect_B = jnp.exp((2 * draws_BN[:, _ASPECT] - 1) * math.log(1 / 0.3))
        extents = [jnp.sqrt(area_B * aspect_B), jnp.sqrt(area_B / aspect_B)]
        inside_BHW1 = _spans(sides_A, extents, draws_BN[:, _BOX]) & mixtures.column(
            draws_BN[:, _ERASE] < self.erase, 4
        )
        fill_BHWC = (
            jnp.zeros_like(image_BHWC)
            if self.erase_fill == "zero"
            else _normal(keys_B, "erase", image_BHWC)
        )
        return jnp.where(inside_BHW1, fill_BHWC, image_BHWC)


@dataclasses.dataclass(frozen=True)
class SignalAugment:
    """Augments standardized float signals of shape (B, L) or (B, L, C): time is shifted, stretched
    and bent, then values are changed.

    >>> augment = SignalAugment(shift=0.1, noise=0.05)
    >>> augment(
    ...     {"image": jnp.ones((4, 40))}, jax.random.split(jax.random.key(0), 4), jax.random.key(1)
    ... )["image"].shape
    (4, 40)

    Values are linearly interpolated in time; a shift alone is by whole samples and so exact.
    `ValueError` as in `ImageAugment`.
    """

    shift: Probability = 0.0
    "Largest shift in time, as a fraction of the length, in whole samples"
    stretch: NonNegative = 0.0
    "Time is stretched about the middle by exp(-stretch) to exp(stretch)"
    warp: Annotated[float, Between(0, 0.09), Traced(off=0.0)] = 0.0
    """Largest displacement of a smooth random time warp, as a fraction of the length; up to 0.09
    time never runs backwards"""
    fill: Literal["circular", "edge", "zero"] = "circular"
    "What moves in from outside of the signal: its other end, its last value, or zeros"
    scale: NonNegative = 0.0
    "Values are multiplied by 1 - scale to 1 + scale"
    shear: NonNegative = 0.0
    "A line through the middle is added whose ends reach up to this much"
    noise: NonNegative = 0.0
    "Standard deviation of added Gaussian noise"
    smooth_noise: NonNegative = 0.0
    "Standard deviation of added noise that is correlated over a few neighbouring samples"
    erase: Probability = 0.0
    "Probability of setting a random span to zero"
    erase_length: Fraction = 0.25
    "Longest erased span, as a fraction of the length"
    mixup: NonNegative = 0.0
    "Alpha of mixup: signals are blended with a weight from Beta(alpha, alpha)"
    cutmix: NonNegative = 0.0
    """Alpha of cutmix: a span comes from another signal; with mixup also on, each batch takes one
    of both"""

    def __call__(self, batch: Batch, keys_B: jax.Array, key: jax.Array) -> Batch:
        """The batch with its signals changed; with mixtures also `label_other` (B,) and
        `label_weight` (B,), the weight of `label`."""
        signal = batch["image"]
        _check(
            signal,
            ranks=(2, 3),
            name="SignalAugment",
            expected="(B, L) or (B, L, C); for images take --augment=image",
        )
        draws_BN = _draws(keys_B)
        signal_BLC = signal.reshape(*signal.shape[:2], -1)
        signal_BLC = self._values(self._move(signal_BLC, draws_BN), draws_BN, keys_B)
        mixed = mixtures.mix(
            {**batch, "image": signal_BLC}, self.mixup, self.cutmix, draws_BN[:, _CENTER], key
        )
        return {**mixed, "image": mixed["image"].reshape(signal.shape)}

    def _move(self, signal_BLC: jax.Array, draws_BN: jax.Array) -> jax.Array:
        size = signal_BLC.shape[1]
        if mixtures.off(self.shift) and mixtures.off(self.stretch) and mixtures.off(self.warp):
            return signal_BLC
        time_BL = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32), signal_BLC.shape[:2])
        if not mixtures.off(self.stretch):
            middle = (size - 1) / 2
            time_BL = (
                middle
                + (time_BL - middle)
                * jnp.exp((2 * draws_BN[:, _STRETCH] - 1) * self.stretch)[:, None]
            )
        if not mixtures.off(self.warp):
            time_BL = time_BL + self.warp * size * _waves(draws_BN[:, _WARP], size)
        if not mixtures.off(self.shift):
            time_BL = time_BL + _whole(draws_BN[:, _TRANSLATE][:, 0], self.shift * size)[
                :, None
            ].astype(jnp.float32)
        return _resample(signal_BLC, time_BL, self.fill)

    def _values(self, signal_BLC: jax.Array, draws_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
        size, dtype = signal_BLC.shape[1], signal_BLC.dtype
        if not mixtures.off(self.scale):
            signal_BLC = signal_BLC * mixtures.column(
                1 + self.scale * (2 * draws_BN[:, _SCALE] - 1), 3
            ).astype(dtype)
        if not mixtures.off(self.shear):
            line_L = jnp.linspace(-1.0, 1.0, size)
            signal_BLC = signal_BLC + (
                self.shear * (2 * draws_BN[:, _SHEAR, None] - 1) * line_L[None]
            )[..., None].astype(dtype)
        if not mixtures.off(self.noise):
            signal_BLC = signal_BLC + jnp.asarray(self.noise, dtype) * _normal(
                keys_B, "noise", signal_BLC
            )
        if not mixtures.off(self.smooth_noise):
            signal_BLC = signal_BLC + jnp.asarray(self.smooth_noise, dtype) * _smooth_normal(
                keys_B, signal_BLC
            )
        if not mixtures.off(self.erase):
            extents = [draws_BN[:, _AREA] * self.erase_length * size]
            inside_BL1 = _spans((size,), extents, draws_BN[:, _BOX]) & mixtures.column(
                draws_BN[:, _ERASE] < self.erase, 3
            )
            signal_BLC = jnp.where(inside_BL1, jnp.zeros_like(signal_BLC), signal_BLC)
        return signal_BLC


NAMES: dict[str, Augment] = {
    "none": NoAugment(),
    "image": ImageAugment(),
    "signal": SignalAugment(),
    "flip_crop": ImageAugment(flip=0.5, crop_padding=4.0),
    "digit_shift": ImageAugment(crop_padding=1.0, padding="zero"),
}


def _check(image: jax.Array, *, ranks: Sequence[int], name: str, expected: str) -> None:
    if image.ndim not in ranks:
        raise UserError(f"{name}: image of shape {image.shape}; expected {expected}")
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise UserError(
            f"{name}: image of type {image.dtype}; expected standardized floats: standardize the"
            " batch first"
        )


def _draws(keys_B: jax.Array) -> jax.Array:
    """All uniform numbers of each example in one go: one call of the generator costs far less than
    one an effect."""
    return jax.vmap(lambda key: jax.random.uniform(key, (_DRAWS,)))(keys_B)


def _normal(
    keys_B: jax.Array, name: Literal["erase", "noise", "smooth"], like: jax.Array
) -> jax.Array:
    """Gaussian noise shaped like a batch, from each example's own key."""
    stream = {"erase": 1, "noise": 2, "smooth": 3}[name]
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, stream), like.shape[1:], like.dtype)
    )(keys_B)


def _smooth_normal(keys_B: jax.Array, like_BLC: jax.Array) -> jax.Array:
    """Unit noise after a Gaussian filter, by a sum of shifted copies: a convolution would be slow
    where the step is scanned on CPUs."""
    reach = math.ceil(3 * _SMOOTH_STEPS)
    weights = [math.exp(-0.5 * (tap / _SMOOTH_STEPS) ** 2) for tap in range(-reach, reach + 1)]
    norm = math.sqrt(sum(weight**2 for weight in weights))
    batch, size, channels = like_BLC.shape
    longer_BLC = _normal(
        keys_B, "smooth", jnp.broadcast_to(like_BLC[:, :1], (batch, size + 2 * reach, channels))
    )
    taps = ((weight / norm) * longer_BLC[:, tap : tap + size] for tap, weight in enumerate(weights))
    return jnp.asarray(sum(taps))


def _whole(draw_B: jax.Array, limit: Any) -> jax.Array:
    """A whole number of -limit to limit, all equally likely, as int32."""
    rounded = jnp.round(jnp.asarray(limit, jnp.float32))
    return jnp.minimum(jnp.floor(draw_B * (2 * rounded + 1)) - rounded, rounded).astype(jnp.int32)


def _reflect(index: jax.Array, size: int) -> jax.Array:
    """Folds any index into 0..size-1 as NumPy's `reflect` padding does: the edge itself is not
    repeated."""
    period = max(2 * (size - 1), 1)
    folded = jnp.mod(index, period)
    return jnp.minimum(folded, period - folded) if size > 1 else jnp.zeros_like(index)


def _spans(sides_A: Sequence[int], extents: Sequence[jax.Array], draws_BA: jax.Array) -> jax.Array:
    """A mask (B, *A, 1) of boxes of the given extents, rounded and cut to the sides, that lie
    wholly inside."""
    lows, highs = [], []
    for axis, (side, extent_B) in enumerate(zip(sides_A, extents, strict=True)):
        length_B = jnp.clip(jnp.round(extent_B), 0, side)
        low_B = jnp.floor(draws_BA[:, axis] * (side - length_B + 1))
        lows.append(jnp.minimum(low_B, side - length_B))
        highs.append(lows[-1] + length_B)
    return mixtures.box(sides_A, lows, highs)


def _waves(draws_BN: jax.Array, size: int) -> jax.Array:
    """A smooth random curve (B, L) within -1..1: a few slow sines, with the same value at both ends
    of time."""
    amplitudes_BN, phases_BN = 2 * draws_BN[:, :_WAVES] - 1, 2 * math.pi * draws_BN[:, _WAVES:]
    frequencies_N = jnp.arange(1, _WAVES + 1, dtype=jnp.float32)
    angles_L = 2 * math.pi / size * jnp.arange(size, dtype=jnp.float32)
    sines_BNL = jnp.sin(
        frequencies_N[None, :, None] * angles_L[None, None, :] + phases_BN[:, :, None]
    )
    return jnp.sum((amplitudes_BN / frequencies_N[None])[:, :, None] * sines_BNL, axis=1) / sum(
        1 / k for k in range(1, _WAVES + 1)
    )


def _resample(signal_BLC: jax.Array, time_BL: jax.Array, fill: str) -> jax.Array:
    """The signals at other times, linearly interpolated between samples."""
    size = signal_BLC.shape[1]
    floor_BL = jnp.floor(time_BL)
    part_BL1 = (time_BL - floor_BL)[..., None].astype(signal_BLC.dtype)
    left_BL = floor_BL.astype(jnp.int32)

    def values_at(index_BL: jax.Array) -> jax.Array:
        place_BL = (
            jnp.mod(index_BL, size) if fill == "circular" else jnp.clip(index_BL, 0, size - 1)
        )
        values_BLC = jax.vmap(lambda signal_LC, place_L: signal_LC[place_L])(signal_BLC, place_BL)
        return (
            jnp.where((place_BL == index_BL)[..., None], values_BLC, jnp.zeros_like(values_BLC))
            if fill == "zero"
            else values_BLC
        )

    return values_at(left_BL) * (1 - part_BL1) + values_at(left_BL + 1) * part_BL1
