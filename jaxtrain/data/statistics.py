"""Mean and deviation of the images of a table, exact, and the normalisation by them.

C: channels (one for signals without channels)
"""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jaxtrain.data.pipeline import Batch
from jaxtrain.data.table import Table
from jaxtrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, of images on the scale that `standardize` reads
    them on (uint8 as 0..1)."""

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]


def measure(table: Table, max_examples: int | None = None, chunk: int = 4096) -> Statistics:
    """The statistics of a table's `image` field, each channel (last dim) on its own, computed in
    float64 or exact integers.

    >>> from jaxtrain.data.table import ArrayTable
    >>> measure(ArrayTable({"image": np.array([[[0, 255]], [[255, 255]]], np.uint8)}))
    Statistics(mean_C=(0.5, 1.0), std_C=(0.5, 1.0))

    A channel that never changes gets deviation 1. With `max_examples`, that many evenly spaced rows
    are read instead of all. `ValueError` if an image holds a value that is not finite.
    """
    rows = np.arange(len(table))
    if max_examples is not None and max_examples < len(rows):
        rows = rows[np.arange(max_examples) * len(rows) // max_examples]
    field = table.fields["image"]
    channels = field.shape[-1] if len(field.shape) >= 2 else 1
    gather = _histogram_statistics if field.dtype == np.uint8 else _float_statistics
    values = (
        table.read(rows[start : start + chunk])["image"].reshape(-1, channels)
        for start in range(0, len(rows), chunk)
    )
    mean_C, variance_C = gather(values, channels)
    if not all(map(math.isfinite, (*mean_C, *variance_C))):
        raise UserError("image: holds values that are not finite (nan or inf); mend the data")
    return Statistics(tuple(mean_C), tuple(math.sqrt(variance) or 1.0 for variance in variance_C))


def _histogram_statistics(
    chunks: Iterable[np.ndarray], channels: int
) -> tuple[list[float], list[float]]:
    """Exact: counts of the 256 values, then integers of any size."""
    counts = np.zeros((channels, 256), np.int64)
    for values_NC in chunks:
        for channel in range(channels):
            counts[channel] += np.bincount(values_NC[:, channel], minlength=256)
    means, variances = [], []
    for row in counts.tolist():
        total = sum(row)
        first = sum(value * count for value, count in enumerate(row))
        second = sum(value * value * count for value, count in enumerate(row))
        means.append(first / (255 * total))
        variances.append((total * second - first * first) / (255 * total) ** 2)
    return means, variances


def _float_statistics(
    chunks: Iterable[np.ndarray], channels: int
) -> tuple[list[float], list[float]]:
    """Chunks merged by the rule of Chan, Golub and LeVeque, which loses no digits however far the
    mean is from zero."""
    total, mean_C, squares_C = 0, np.zeros(channels), np.zeros(channels)
    for values_NC in chunks:
        values_NC = values_NC.astype(np.float64)
        count, here_C = len(values_NC), values_NC.mean(0)
        delta_C = here_C - mean_C
        squares_C += np.square(values_NC - here_C).sum(0) + np.square(delta_C) * (
            total * count / (total + count)
        )
        total += count
        mean_C = mean_C + delta_C * (count / total)
    return mean_C.tolist(), (squares_C / total).tolist()


def standardize(batch: Batch, statistics: Statistics) -> Batch:
    """The batch with its `image` as float32 of mean 0 and deviation 1 over the measured set.

    >>> batch = {"image": jnp.array([[[0], [255]]], jnp.uint8)}
    >>> standardize(batch, Statistics((0.5,), (0.5,)))["image"].tolist()
    [[[-1.0], [1.0]]]
    """
    images = batch["image"]
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    dims = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (
        jnp.asarray(np.asarray(values, np.float32).reshape(dims))
        for values in (statistics.mean_C, statistics.std_C)
    )
    images = images.astype(jnp.float32)
    return batch | {"image": (images - scale * mean) * (1 / (scale * std))}
