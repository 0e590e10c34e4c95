"""The mesh: the devices at hand, arranged along named axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtrain import wording

AXES = ("sweep", "pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""Every mesh has all of them, in this order; those not asked for have size 1."""
OFFERED = ("data", "fsdp", "tensor")
"""The axes that something is sharded along today."""
BATCH_AXES = ("data", "fsdp")
"""The axes that a batch is split over."""


def parse(text: str) -> dict[str, int]:
    """Reads `data:2,fsdp:-1` into sizes by axis; at most one size may be -1, for whatever devices are left.

    >>> parse("data:2,fsdp:4")
    {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, colon, number = part.strip().partition(":")
        if axis not in OFFERED:
            near = wording.did_you_mean(axis, OFFERED)
            raise ValueError(f"--mesh: unknown axis {axis!r}; axes used by this model: {', '.join(OFFERED)}{near}")
        if axis in sizes:
            raise ValueError(f"--mesh={text}: axis {axis!r} is given twice")
        if not colon or not number.lstrip("-").isdecimal() or not number.isascii() or (size := int(number)) == 0 or size < -1:
            raise ValueError(f"--mesh={text}: {part.strip()!r} needs a size >= 1, or -1 for all that is left, e.g. {axis}:2")
        sizes[axis] = size
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh={text}: only one size may be -1")
    return sizes


def make(text: str = "data:-1", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default), with Auto axes.

    >>> make("data:1").shape["data"]
    1

    A mesh smaller than the machine takes the first devices. `ValueError` if there are too few or -1 does not come out whole.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse(text)
    known = math.prod(size for size in sizes.values() if size > 0)
    if known > len(devices):
        count = f"there {'is' if len(devices) == 1 else 'are'} only {len(devices)}"
        raise ValueError(
            f"--mesh={text}: needs {known} devices, {count}; for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count={known}"
        )
    if -1 in sizes.values() and len(devices) % known:
        raise ValueError(f"--mesh={text}: {len(devices)} devices are not a multiple of {known}")
    full = [sizes.get(axis, 1) if sizes.get(axis, 1) > 0 else len(devices) // known for axis in AXES]
    grid = np.asarray(devices[: math.prod(full)], dtype=object).reshape(full)
    # Explicit axes are jax's default, and make ordinary indexing raise.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
    """The axes that are in use, as `--mesh` would say them.

    >>> describe(make("data:1"))
    'data:1'
    """
    used = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "data:1"


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """`ValueError` if a batch of `size` cannot be split evenly."""
    shards = batch_shards(mesh)
    if size % shards:
        raise ValueError(f"--{name}={size}: not divisible by {shards} devices; nearest: {wording.nearest_multiples(shards, size)}")
