"""Augmentation of training batches on the device.

An augmentation is a frozen dataclass called as `augment(batch, keys_B, key)`. What happens to one
example depends on its own key only, so it is the same for any batch, shard or microbatch that it
comes in. Mixtures depend on the batch: their partner is the example at the mirrored place, and one
weight, from `key`, serves all; so augment the whole batch, then cut it into microbatches. Strengths
are traced; those at 0 leave no trace in the program.
"""

from jaxtrain.augment import mixup as mixup
from jaxtrain.augment.image import ImageAugment as ImageAugment
from jaxtrain.augment.protocol import Augment as Augment
from jaxtrain.augment.protocol import NoAugment as NoAugment
from jaxtrain.augment.signal import SignalAugment as SignalAugment

NAMES: dict[str, Augment] = {
    "none": NoAugment(),
    "image": ImageAugment(),
    "signal": SignalAugment(),
    "flip_crop": ImageAugment(flip=0.5, crop_padding=4.0),
    "digit_shift": ImageAugment(crop_padding=1.0, padding="zero"),
}

__all__ = [
    "NAMES",
    "Augment",
    "ImageAugment",
    "NoAugment",
    "SignalAugment",
    "mixup",
]
