"""The mesh: the devices at hand, arranged along named axes."""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxtrain import messages
from jaxtrain.errors import UserError

# jax exports this class as a variable, which a checker does not accept as a type.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]
AXES = ("sweep", "pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""Every mesh has all of them, in this order; those not asked for have size 1. The last ones talk
most, so they get the nearest devices."""
OFFERED = ("data", "fsdp", "tensor")
"""The axes that something is sharded along today."""
BATCH_AXES = ("data", "fsdp")
"""The axes that a batch is split over."""


def parse(text: str, *, flag: str = "--mesh") -> dict[str, int]:
    """Reads `data:2,fsdp:-1` into sizes by axis; at most one size may be -1, for whatever devices
    are left.

    >>> parse("data:2,fsdp:4"), parse("fsdp:4xtensor:2")
    ({'data': 2, 'fsdp': 4}, {'fsdp': 4, 'tensor': 2})

    Where commas stand between meshes, `x` stands between axes. `flag` is how messages call the
    text.
    """
    sizes: dict[str, int] = {}
    for part in re.split(r",|(?<=\d)x", text):
        axis, colon, number = part.strip().partition(":")
        if axis not in OFFERED:
            near = messages.did_you_mean(axis, OFFERED)
            raise UserError(
                f"{flag}: unknown axis {axis!r}; axes used by this model:"
                f" {', '.join(OFFERED)}{near}"
            )
        if axis in sizes:
            raise UserError(f"{flag}={text}: axis {axis!r} is given twice")
        if (
            not colon
            or not number.lstrip("-").isdecimal()
            or not number.isascii()
            or (size := int(number)) == 0
            or size < -1
        ):
            raise UserError(
                f"{flag}={text}: {part.strip()!r} needs a size >= 1, or -1 for all that is left,"
                f" e.g. {axis}:2"
            )
        sizes[axis] = size
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{flag}={text}: only one size may be -1")
    return sizes


def make(
    text: str = "data:-1", devices: Sequence[Device] | None = None, *, flag: str = "--mesh"
) -> Mesh:
    """A mesh over `devices` (all of them by default), with Auto axes.

    >>> make("data:1").shape["data"]
    1

    A mesh smaller than the machine takes the first devices, and as many of each process.
    `UserError` if there are too few, if -1 does not come out whole, or if a process would have no
    part.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse(text, flag=flag)
    known = math.prod(size for size in sizes.values() if size > 0)
    if known > len(devices):
        count = f"there {'is' if len(devices) == 1 else 'are'} only {len(devices)}"
        dry = f"for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count={known}"
        raise UserError(
            f"{flag}={text}: needs {known} devices, {count}{_nearest(sizes, len(devices))}; {dry}"
        )
    if -1 in sizes.values() and len(devices) % known:
        raise UserError(
            f"{flag}={text}: {len(devices)} devices are not a multiple of"
            f" {known}{_nearest(sizes, len(devices))}"
        )
    full = [
        sizes.get(axis, 1) if sizes.get(axis, 1) > 0 else len(devices) // known for axis in AXES
    ]
    grid = arranged(_shared(devices, math.prod(full), f"{flag}={text}"), full)
    # Explicit axes are jax's default, and make ordinary indexing raise.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(devices: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices as a grid in which the last axes stay within a host as far as sizes allow, and the
    first ones cross hosts.

    >>> arranged(jax.devices()[:1], (1, 1)).shape
    (1, 1)

    A host is what jax calls a slice (one fast network: the cards of a machine, or a rack joined by
    NVLink), where devices say so, and otherwise a process. Within it the order is `mesh_utils`',
    which knows the machine. Source: `mesh_utils.create_hybrid_device_mesh`.
    """
    by_slice = len({getattr(device, "slice_index", 0) for device in devices}) > 1
    key = "slice_index" if by_slice else "process_index"
    hosts = _groups(devices, key)
    counts = {len(host) for host in hosts}
    if len(hosts) == 1 or len(counts) > 1:
        return mesh_utils.create_device_mesh(
            sizes, [device for host in hosts for device in host], allow_split_physical_axes=True
        )
    outer, left = [], len(hosts)
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    inner = [size // across for size, across in zip(sizes, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=not by_slice, allow_split_physical_axes=True
    )


def describe(mesh: Mesh) -> str:
    """The axes that are in use, as `--mesh` would say them.

    >>> describe(make("data:1"))
    'data:1'
    """
    return _text({axis: size for axis, size in mesh.shape.items() if size > 1}) or "data:1"


def batch_shards(mesh: Mesh) -> int:
    """Over how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """`UserError` if a batch of `size` cannot be split evenly."""
    shards = batch_shards(mesh)
    if size % shards:
        what = f"{shards} devices" if shards == mesh.size else f"data x fsdp = {shards}"
        raise UserError(
            f"--{name}={size}: not divisible by {what}; nearest:"
            f" {messages.nearest_multiples(shards, size)}"
        )


def _shared(devices: list[Any], count: int, said: str) -> list[Any]:
    """The devices that a mesh of `count` uses: the first ones, and as many of each process, for
    each must have its part of every array."""
    processes = _groups(devices, "process_index")
    if count == len(devices) or len(processes) == 1:
        return devices[:count]
    share, rest = divmod(count, len(processes))
    fewest = min(len(process) for process in processes)
    if rest or share > fewest:
        near = " or ".join(
            str(each * len(processes)) for each in (share, share + 1) if 0 < each <= fewest
        )
        near = f"; nearest: {near}" if near else f"; use all {len(devices)}"
        raise UserError(
            f"{said}: {count} device{'s' * (count > 1)} cannot be shared evenly by {len(processes)}"
            f" processes{near}"
        )
    return [device for process in processes for device in process[:share]]


def _groups(devices: Sequence[Any], key: str) -> list[list[Any]]:
    """Devices by host or process, both in order."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, key), []).append(device)
    return [groups[index] for index in sorted(groups)]


def _nearest(sizes: dict[str, int], count: int) -> str:
    """The end of a message about sizes that do not fit `count` devices: the nearest meshes that do,
    with one axis smaller or larger."""
    found = []
    for axis, size in sizes.items():
        others = math.prod(other for name, other in sizes.items() if name != axis and other > 0)
        fits = [
            number
            for number in range(1, count // others + 1)
            if -1 not in sizes.values() or count % (number * others) == 0
        ]
        below = max((number for number in fits if number < size), default=None)
        above = min((number for number in fits if number > size), default=None)
        found += [
            _text(sizes | {axis: number})
            for number in (below, above)
            if number is not None and size > 1
        ]
    return f"; nearest: {' or '.join(found)}" if found else ""


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items())
