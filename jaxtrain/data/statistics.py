"""Mean and deviation of the images of a table, exact, kept on the disk where they take long to
measure, and the normalisation by them.

C: channels (one for signals without channels)
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtrain.data import checks
from jaxtrain.data.table import Table, is_image
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch

METHOD = 1
"""The version of `measure`: one more whenever its numbers change, so that none that was kept before
is taken for one of today."""
PROBED = 16
"""How many rows are read to see that the data is what it was."""


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
    are read instead of all. `UserError` if an image holds a value that is not finite.
    """
    rows = np.arange(len(table))
    if max_examples is not None and max_examples < len(rows):
        rows = rows[np.arange(max_examples) * len(rows) // max_examples]
    field = table.fields["image"]
    channels = field.shape[-1] if len(field.shape) >= 2 else 1
    gather = _histogram_statistics if field.dtype == np.uint8 else _float_statistics
    values = (
        values_NC
        for start in range(0, len(rows), chunk)
        if len(values_NC := _used_images(table, rows[start : start + chunk]).reshape(-1, channels))
    )
    mean_C, variance_C = gather(values, channels)
    if not all(map(math.isfinite, (*mean_C, *variance_C))):
        raise UserError("image: holds values that are not finite (nan or inf); mend the data")
    return Statistics(tuple(mean_C), tuple(math.sqrt(variance) or 1.0 for variance in variance_C))


def _used_images(table: Table, rows: np.ndarray) -> np.ndarray:
    """The images of some rows; of those with a weight of 0, which may hold anything, none."""
    read = table.read(rows)
    checks.check_rows(table, read, rows)
    weight = read.get("weight")
    return read["image"] if weight is None or weight.ndim != 1 else read["image"][weight != 0]


def measure_once(
    table: Table,
    max_examples: int | None = None,
    *,
    identity: Mapping[str, Any] | None,
    folder: Path | None = None,
) -> Statistics:
    """`measure`, but what was measured before is taken from a file of `folder`: ten thousand images
    take minutes to decode, at every start.

    `identity` is any JSON that says what data this is, and changes when it does; with None nothing
    is kept, nor for arrays in memory, which are measured as quickly as they are looked up. The file
    is believed only if identity, fields, lengths, method and the bytes of some rows, which are
    read, are those that it was made for, and its checksum is right; otherwise all is measured anew.
    """
    if identity is None or not _takes_long(table):
        return measure(table, max_examples)
    key = _key(table, max_examples, identity)
    folder = Path.home() / ".cache" / "jaxtrain" / "statistics" if folder is None else folder
    path = folder / f"{_digest(key)[:32]}.json"
    found = _read_kept(path, key)
    if found is None:
        found = measure(table, max_examples)
        _keep(path, key, found)
    return found


def _takes_long(table: Table) -> bool:
    """Whether a table is read from files: decoded, or mapped into memory."""
    return table.arrays is None or isinstance(table.arrays["image"], np.memmap)


def _key(table: Table, max_examples: int | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that the statistics depend on."""
    rows = np.unique(np.linspace(0, len(table) - 1, PROBED).astype(np.int64))
    field = table.fields["image"]
    probe = np.ascontiguousarray(table.read(rows)["image"]).tobytes()
    return {
        "method": METHOD,
        "identity": dict(identity),
        "examples": len(table),
        "most": max_examples,
        "shape": list(field.shape),
        "dtype": str(field.dtype),
        "probe": hashlib.sha256(probe).hexdigest(),
    }


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_kept(path: Path, key: Mapping[str, Any]) -> Statistics | None:
    """What a file holds; None if there is none, or if it is damaged or of another key."""
    try:
        kept = json.loads(path.read_bytes())
        checksum = kept.pop("checksum")
        if checksum != _digest(kept) or kept["key"] != json.loads(json.dumps(key)):
            return None
        return Statistics(tuple(kept["mean_C"]), tuple(kept["std_C"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(path: Path, key: Mapping[str, Any], found: Statistics) -> None:
    """Writes a file whole or not at all; a disk that takes none is not worth a run."""
    kept = {"key": dict(key), **dataclasses.asdict(found)}
    text = json.dumps(kept | {"checksum": _digest(kept)}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several runs may measure the same data at once.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


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
    return {**batch, "image": (images - scale * mean) * (1 / (scale * std))}


def scaled(batch: Batch) -> Batch:
    """The batch with its image as float32, bytes as 0..1: what is done where images are not
    standardized."""
    image = batch["image"]
    return dict(batch) | {
        "image": image.astype(jnp.float32) * np.float32(1 / 255 if image.dtype == jnp.uint8 else 1)
    }


def preparation(
    table: Table, measure: Callable[[], Statistics] | None
) -> Callable[[Batch], Batch] | None:
    """What every batch of a table goes through first: images standardized by what `measure` finds,
    or only scaled without it; None where there are no images, or where the field called `image`
    holds whole numbers."""
    if "image" not in table.fields or not is_image(table.fields["image"]):
        return None
    if measure is None:
        return scaled
    return functools.partial(standardize, statistics=measure())
