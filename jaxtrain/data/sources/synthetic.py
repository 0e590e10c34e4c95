"""Synthetic examples: one random picture for each class under noise, for tests of speed and for
models with nowhere else to learn."""

import dataclasses
from typing import Annotated, Literal

import numpy as np

from jaxtrain.data.splits import Splits, choose, digest_of_tables
from jaxtrain.data.table import ArrayTable
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast, Count


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Classes that a small model can tell apart, of any shape, in memory.

    >>> splits = Synthetic(shape=(4, 4, 1), examples=6).open()
    >>> len(splits.train), splits.train.fields["image"].shape, splits.train.fields["image"].dtype
    (6, (4, 4, 1), dtype('uint8'))
    """

    shape: tuple[int, ...] = (32, 32, 3)
    """Shape of one input, e.g. 224,224,3 for an image or 40 for a signal"""
    num_classes: Count = 10
    """How many classes there are"""
    examples: Count = 2048
    """How many examples the train split has; they are held in memory"""
    test_examples: Count = 512
    """How many examples the test split has"""
    noise: Annotated[float, AtLeast(0)] = 0.5
    """Strength of the noise; the pictures of the classes have strength 1"""
    dtype: Literal["uint8", "float32"] = "uint8"
    """Type of the inputs"""
    seed: Annotated[int, AtLeast(0)] = 0
    """What is drawn; independent of --seed"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Draws the examples; `UserError` if the shape is none."""
        if not self.shape or min(self.shape) < 1:
            raise UserError(
                f"--data.shape={','.join(map(str, self.shape))}: every dim must be >= 1"
            )
        # Philox is NumPy's counter-based generator: its bits are the same on every machine and
        # version.
        random = np.random.Generator(np.random.Philox(self.seed))
        templates = random.standard_normal((self.num_classes, *self.shape), np.float32)
        sizes = {"train": self.examples, "test": self.test_examples}
        names = tuple(f"class {label}" for label in range(self.num_classes))
        tables = {
            split: ArrayTable(self._draw(random, templates, size), self.num_classes, names)
            for split, size in sizes.items()
        }
        fingerprint = digest_of_tables(tables)
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=fingerprint,
        )

    def _draw(
        self, random: np.random.Generator, templates: np.ndarray, size: int
    ) -> dict[str, np.ndarray]:
        labels_N = random.integers(0, self.num_classes, size, np.int32)
        images = np.empty((size, *self.shape), self.dtype)
        # one at a time: floats of a whole ImageNet-sized split would not fit
        for row, label in enumerate(labels_N):
            values = templates[label] + np.float32(self.noise) * random.standard_normal(
                self.shape, np.float32
            )
            images[row] = np.clip(128 + 48 * values, 0, 255) if self.dtype == "uint8" else values
        return {"image": images, "label": labels_N}
