"""Augmentation of training batches on the device."""

from jaxtrain.augment.image import (
    NAMES as NAMES,
    Augment as Augment,
    ImageAugment as ImageAugment,
    NoAugment as NoAugment,
    SignalAugment as SignalAugment,
)

__all__ = [
    "Augment",
    "ImageAugment",
    "NAMES",
    "NoAugment",
    "SignalAugment",
    "mixup",
]
