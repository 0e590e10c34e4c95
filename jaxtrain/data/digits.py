"""Handwritten digits: the 1797 images of 8 x 8 that scikit-learn ships, so that a first run needs no download."""

import dataclasses
from typing import Annotated

import numpy as np

from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.fields import AtLeast


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, cut 80/20 so that every digit has its share of the test part.

    >>> splits = Digits().open()
    >>> len(splits.train), len(splits.test), splits.train.fields["image"].shape
    (1437, 360, (8, 8, 1))

    `image` is uint8 (8, 8, 1) with values 0..16; the cut is that of `sklearn.model_selection.train_test_split`.
    """

    train: str = "train"
    """Split to train on; 1437 examples in shuffled order, so a slice is a random part"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""
    split_seed: Annotated[int, AtLeast(0)] = 0
    """Which 20% are held out; the same for every --seed"""

    def open(self) -> Splits:
        """Reads the files inside the scikit-learn package."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images_NHWC = digits.images.astype(np.uint8)[..., None]
        labels_N = digits.target.astype(np.int32)
        rows = train_test_split(np.arange(len(labels_N)), test_size=0.2, stratify=labels_N, random_state=self.split_seed)
        names = tuple(str(name) for name in digits.target_names)
        tables = {
            split: ArrayTable({"image": images_NHWC[part], "label": labels_N[part]}, num_classes=10, class_names=names)
            for split, part in zip(("train", "test"), rows, strict=True)
        }
        fingerprint = digest_of_tables(tables)
        return choose(tables, train=self.train, validation=self.validation, test=self.test, fingerprint=fingerprint)
