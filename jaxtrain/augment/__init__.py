"""Augmentation of training batches on the device."""

from jaxtrain.augment.image import (
    NAMES as NAMES,
)
from jaxtrain.augment.image import (
    Augment as Augment,
)
from jaxtrain.augment.image import (
    ImageAugment as ImageAugment,
)
from jaxtrain.augment.image import (
    NoAugment as NoAugment,
)
from jaxtrain.augment.image import (
    SignalAugment as SignalAugment,
)

__all__ = [
    "NAMES",
    "Augment",
    "ImageAugment",
    "NoAugment",
    "SignalAugment",
    "mixup",
]
