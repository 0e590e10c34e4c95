"""Augmentation of signals on the device: time is shifted, stretched and bent, values are scaled,
sheared, made noisy and erased, and two signals are mixed.

B batch, L length, C channels, N numbers drawn an example.
"""

import dataclasses
import math
from typing import Annotated, Literal, cast

import jax
import jax.numpy as jnp

from jaxtrain.augment import draws, mixup
from jaxtrain.augment.protocol import Fraction, check
from jaxtrain.fields import Between, NonNegative, Probability, Traced
from jaxtrain.tree import Batch

_WAVES = 3
_SMOOTH_STEPS = 2.0  # width of the Gaussian filter of smooth noise, in samples


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
    `UserError` as in `ImageAugment`.
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
        check(
            signal,
            ranks=(2, 3),
            name="SignalAugment",
            expected="(B, L) or (B, L, C); for images take --augment=image",
        )
        draws_BN = draws.uniform(keys_B)
        signal_BLC = signal.reshape(*signal.shape[:2], -1)
        signal_BLC = self._values(self._move(signal_BLC, draws_BN), draws_BN, keys_B)
        mixed = mixup.mix(
            {**batch, "image": signal_BLC}, self.mixup, self.cutmix, draws_BN[:, draws.CENTER], key
        )
        return {**mixed, "image": mixed["image"].reshape(signal.shape)}

    def _move(self, signal_BLC: jax.Array, draws_BN: jax.Array) -> jax.Array:
        size = signal_BLC.shape[1]
        if draws.is_off(self.shift) and draws.is_off(self.stretch) and draws.is_off(self.warp):
            return signal_BLC
        time_BL = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32), signal_BLC.shape[:2])
        if not draws.is_off(self.stretch):
            middle = (size - 1) / 2
            time_BL = (
                middle
                + (time_BL - middle)
                * jnp.exp((2 * draws_BN[:, draws.STRETCH] - 1) * self.stretch)[:, None]
            )
        if not draws.is_off(self.warp):
            time_BL = time_BL + self.warp * size * _waves(draws_BN[:, draws.WARP], size)
        if not draws.is_off(self.shift):
            time_BL = time_BL + draws.random_integer(
                draws_BN[:, draws.TRANSLATE][:, 0], self.shift * size
            )[:, None].astype(jnp.float32)
        return _resample(signal_BLC, time_BL, self.fill)

    def _values(self, signal_BLC: jax.Array, draws_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
        size, dtype = signal_BLC.shape[1], signal_BLC.dtype
        if not draws.is_off(self.scale):
            signal_BLC = signal_BLC * draws.per_example(
                1 + self.scale * (2 * draws_BN[:, draws.SCALE] - 1), 3
            ).astype(dtype)
        if not draws.is_off(self.shear):
            line_L = jnp.linspace(-1.0, 1.0, size)
            signal_BLC = signal_BLC + (
                self.shear * (2 * draws_BN[:, draws.SHEAR, None] - 1) * line_L[None]
            )[..., None].astype(dtype)
        if not draws.is_off(self.noise):
            signal_BLC = signal_BLC + jnp.asarray(self.noise, dtype) * draws.normal(
                keys_B, "noise", signal_BLC
            )
        if not draws.is_off(self.smooth_noise):
            signal_BLC = signal_BLC + jnp.asarray(self.smooth_noise, dtype) * _smooth_normal(
                keys_B, signal_BLC
            )
        if not draws.is_off(self.erase):
            extents = [draws_BN[:, draws.AREA] * self.erase_length * size]
            inside_BL1 = draws.random_boxes(
                (size,), extents, draws_BN[:, draws.BOX]
            ) & draws.per_example(draws_BN[:, draws.ERASE] < self.erase, 3)
            signal_BLC = jnp.where(inside_BL1, jnp.zeros_like(signal_BLC), signal_BLC)
        return signal_BLC


def _smooth_normal(keys_B: jax.Array, like_BLC: jax.Array) -> jax.Array:
    """Unit noise after a Gaussian filter, by a sum of shifted copies: a convolution would be slow
    where the step is scanned on CPUs."""
    reach = math.ceil(3 * _SMOOTH_STEPS)
    weights = [math.exp(-0.5 * (tap / _SMOOTH_STEPS) ** 2) for tap in range(-reach, reach + 1)]
    norm = math.sqrt(sum(weight**2 for weight in weights))
    batch, size, channels = like_BLC.shape
    longer_BLC = draws.normal(
        keys_B, "smooth", jnp.broadcast_to(like_BLC[:, :1], (batch, size + 2 * reach, channels))
    )
    return cast(
        jax.Array,
        sum(
            (weight / norm) * longer_BLC[:, tap : tap + size] for tap, weight in enumerate(weights)
        ),
    )


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
