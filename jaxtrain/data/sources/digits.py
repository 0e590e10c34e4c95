"""Handwritten digits: the 1797 images of 8 x 8 that scikit-learn ships, so that a first run needs
no download."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated

import numpy as np

from jaxtrain import extras
from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.fields import AtLeast


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, cut 80/20 so that every digit has its share of the test part.

    >>> splits = Digits().open()
    >>> len(splits.train), len(splits.test), splits.train.fields["image"].shape
    (1437, 360, (8, 8, 1))

    `image` is uint8 (8, 8, 1) with values 0..16; the cut is that of
    `sklearn.model_selection.train_test_split`.
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
        images_NHWC, labels_N = _read()
        rows = stratified_rows(labels_N, self.split_seed)
        names = tuple(map(str, range(10)))
        tables = {
            split: ArrayTable(
                {"image": images_NHWC[part], "label": labels_N[part]},
                num_classes=10,
                class_names=names,
            )
            for split, part in zip(("train", "test"), rows, strict=True)
        }
        fingerprint = digest_of_tables(tables)
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=fingerprint,
        )


def stratified_rows(labels_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that scikit-learn's `train_test_split(test_size=0.2, stratify=labels_N,
    random_state=seed)` gives to train and to test.

    >>> train, test = stratified_rows(np.repeat([0, 1], 10), seed=0)
    >>> len(train), len(test), int((test >= 10).sum())
    (16, 4, 2)

    Its random numbers are drawn in its order, hence `RandomState`; importing it would take longer
    than all else up to the first step.
    """
    random = np.random.RandomState(seed)
    counts = np.bincount(labels_N)
    num_test = -(-len(labels_N) // 5)
    num_train = _shares(counts, len(labels_N) - num_test, random)
    num_both = num_train + _shares(counts - num_train, num_test, random)
    shuffled = [
        np.flatnonzero(labels_N == label)[random.permutation(count)]
        for label, count in enumerate(counts)
    ]
    train = [rows[:first] for rows, first in zip(shuffled, num_train, strict=True)]
    test = [
        rows[first:last] for rows, first, last in zip(shuffled, num_train, num_both, strict=True)
    ]
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(test))


def _shares(counts: np.ndarray, total: int, random: np.random.RandomState) -> np.ndarray:
    """`total` in proportion to `counts`; what rounding down leaves goes to the largest remainders,
    and among equals by lot."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact).astype(int)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        missing = total - shares.sum()
        if missing == 0:
            break
        equals = np.flatnonzero(remainders == remainder)
        shares[random.choice(equals, size=min(len(equals), missing), replace=False)] += 1
    return shares


def _read() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, from the file inside the scikit-learn package, found without importing
    it."""
    extras.require("--data=digits", "sklearn")
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table_ND = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table_ND[:, :-1].reshape(-1, 8, 8, 1), table_ND[:, -1].astype(np.int32)
