"""Two examples of a batch made into one: mixup and cutmix.

B batch, A spatial axes (height and width, or time).
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxtrain.augment import draws
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch


def mix(batch: Batch, mixup: Any, cutmix: Any, draws_BA: jax.Array, key: jax.Array) -> Batch:
    """Mixes each example with the one at the mirrored place of the batch; one weight serves all, as
    in both papers.

    >>> batch = {"image": jnp.array([[[0.0]], [[1.0]]]), "label": jnp.array([3, 4])}
    >>> mixed = mix(batch, 1.0, 0.0, jnp.zeros((2, 1)), jax.random.key(0))
    >>> mixed["label_other"].tolist(), bool(jnp.allclose(mixed["image"].sum(), 1))
    ([4, 3], True)

    `draws_BA` are uniform numbers that place the boxes of cutmix. `UserError` if there are no
    labels to mix.
    """
    if draws.is_off(mixup) and draws.is_off(cutmix):
        return batch
    if "label" not in batch:
        raise UserError(
            "--augment.mixup, --augment.cutmix: the batch has no label to mix (it has"
            f" {', '.join(batch)}); set both to 0"
        )
    blend_key, cut_key, choice_key = jax.random.split(key, 3)
    image = batch["image"]
    partner, other_B = image[::-1], batch["label"][::-1]
    if "weight" in batch:
        # Padding is nobody's partner: an example beside it is mixed with itself.
        counts_B = batch["weight"][::-1] > 0
        partner, other_B = (
            jnp.where(counts_B.reshape(-1, *(1,) * (own.ndim - 1)), other, own)
            for own, other in ((image, partner), (batch["label"], other_B))
        )
    blended = cut = (image, jnp.ones(len(image)))
    if not draws.is_off(mixup):
        weight = _weight(blend_key, mixup)
        share = weight.astype(image.dtype)
        blended = (share * image + (1 - share) * partner, jnp.broadcast_to(weight, (len(image),)))
    if not draws.is_off(cutmix):
        inside, weight_B = _cut(image.shape[1:-1], _weight(cut_key, cutmix), draws_BA)
        cut = (jnp.where(inside, partner, image), weight_B)
    if draws.is_off(cutmix) or draws.is_off(mixup):
        mixed, weight_B = cut if draws.is_off(mixup) else blended
    else:
        chosen = jax.random.bernoulli(choice_key)
        mixed, weight_B = (
            jnp.where(chosen, one, other) for one, other in zip(blended, cut, strict=True)
        )
    return {**batch, "image": mixed, "label_other": other_B, "label_weight": weight_B}


def _weight(key: jax.Array, alpha: Any) -> jax.Array:
    """A weight from Beta(alpha, alpha); 1, so nothing mixed, where a traced alpha is 0."""
    safe = jnp.maximum(jnp.asarray(alpha, jnp.float32), 1e-3)
    return jnp.where(jnp.asarray(alpha) > 0, jax.random.beta(key, safe, safe), 1.0)


def _cut(
    sides_A: Sequence[int], weight: jax.Array, draws_BA: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Boxes about random centres that take 1 - weight of the image, cut at its edge; and what then
    remains, exactly, as (B,)."""
    lows, highs = [], []
    for axis, side in enumerate(sides_A):
        half = jnp.floor(jnp.floor(side * (1 - weight) ** (1 / len(sides_A))) / 2)
        center_B = jnp.floor(draws_BA[:, axis] * side)
        lows.append(jnp.clip(center_B - half, 0, side))
        highs.append(jnp.clip(center_B + half, 0, side))
    lengths = (high_B - low_B for low_B, high_B in zip(lows, highs, strict=True))
    area_B = cast(jax.Array, math.prod(lengths))
    return draws.box_mask(sides_A, lows, highs), 1 - area_B / math.prod(sides_A)
