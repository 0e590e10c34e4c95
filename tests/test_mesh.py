"""Meshes from text: their sizes, which devices they take, and in which order."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain.parallel import mesh, sharding


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data:-1", {"data": 8}),
        ("data:2,fsdp:-1", {"data": 2, "fsdp": 4}),
        ("tensor:2,data:2", {"data": 2, "tensor": 2}),
        ("fsdp:4xtensor:2", {"fsdp": 4, "tensor": 2}),
        ("fsdp:1", {}),
    ],
)
def test_sizes(text, sizes):
    made = mesh.make(text)
    assert {axis: size for axis, size in made.shape.items() if size > 1} == sizes
    assert tuple(made.axis_names) == mesh.AXES


TWELVE = "data:2,fsdp:3 or data:4,fsdp:2"
DRY_RUN = "for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count="


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:0", "'data:0' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:-2", "'data:-2' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:two", "'data:two' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:2,data:4", "axis 'data' is given twice"),
        ("data:-1,fsdp:-1", "only one size may be -1"),
        ("data:16", f"needs 16 devices, there are only 8; nearest: data:8; {DRY_RUN}16"),
        (
            "data:4,fsdp:3",
            f"needs 12 devices, there are only 8; nearest: {TWELVE}; {DRY_RUN}12",
        ),
        (
            "data:16,fsdp:-1",
            f"needs 16 devices, there are only 8; nearest: data:8,fsdp:-1; {DRY_RUN}16",
        ),
        ("data:9,fsdp:9", f"needs 81 devices, there are only 8; {DRY_RUN}81"),
        (
            "data:3,fsdp:-1",
            "8 devices are not a multiple of 3; nearest: data:2,fsdp:-1 or data:4,fsdp:-1",
        ),
        (
            "data:5,fsdp:-1",
            "8 devices are not a multiple of 5; nearest: data:4,fsdp:-1 or data:8,fsdp:-1",
        ),
        (
            "data:3,tensor:2,fsdp:-1",
            (
                "8 devices are not a multiple of 6; nearest: data:2,tensor:2,fsdp:-1 or"
                " data:4,tensor:2,fsdp:-1"
            ),
        ),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match="^--mesh") as caught:
        mesh.make(text)
    assert str(caught.value) == f"--mesh={text}: {message}"


def test_an_unknown_axis():
    with pytest.raises(
        ValueError,
        match=(
            r"^--compare_meshes: unknown axis 'dat'; axes .*: data, fsdp, tensor; did you mean"
            r" 'data'\?$"
        ),
    ):
        mesh.make("dat:2", flag="--compare_meshes")


def test_batch_must_divide():
    grid = mesh.make("data:2,fsdp:4")
    mesh.check_batch("batch_size", 16, grid)
    with pytest.raises(
        ValueError, match=r"^--batch_size=10: not divisible by 8 devices; nearest: 8 or 16$"
    ):
        mesh.check_batch("batch_size", 10, grid)
    with pytest.raises(
        ValueError, match=r"^--batch_size=7: not divisible by data x fsdp = 2; nearest: 6 or 8$"
    ):
        mesh.check_batch("batch_size", 7, mesh.make("data:2,tensor:4"))
    with pytest.raises(
        ValueError, match=r"^--batch_size=3: not divisible by 8 devices; nearest: 8$"
    ):
        mesh.check_batch("batch_size", 3, grid)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the order of devices looks at."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "toy"


def machine(hosts: int, local: int) -> list[Device]:
    """A process a host."""
    return [Device(host * local + place, host) for host in range(hosts) for place in range(local)]


def ids(text: str, devices: list[Device]) -> np.ndarray:
    """The mesh as device ids, with dims for data, fsdp and tensor."""
    made = mesh.make(text, devices)
    return np.vectorize(lambda device: device.id)(made.devices).reshape(
        *(made.shape[axis] for axis in mesh.OFFERED)
    )


@pytest.mark.parametrize(
    ("text", "hosts", "local", "inner"),
    [
        ("data:2,fsdp:4", 2, 4, ("fsdp", "tensor")),
        ("data:4,fsdp:2,tensor:2", 2, 8, ("fsdp", "tensor")),
        ("data:4,fsdp:2,tensor:2", 4, 4, ("fsdp", "tensor")),
        ("data:6,tensor:2", 3, 4, ("tensor",)),
        ("fsdp:4,tensor:4", 4, 4, ("tensor",)),
        ("data:2,fsdp:4,tensor:2", 4, 4, ("tensor",)),
    ],
)
def test_the_last_axes_stay_within_a_host(text, hosts, local, inner):
    grid = ids(text, machine(hosts, local))
    assert sorted(grid.ravel()) == list(range(hosts * local))
    outer = tuple(place for place, axis in enumerate(mesh.OFFERED) if axis not in inner)
    rows = np.moveaxis(grid, outer, range(len(outer))).reshape(
        *(grid.shape[place] for place in outer), -1
    )
    assert all(len(set(row // local)) == 1 for row in rows.reshape(-1, rows.shape[-1]))


def test_devices_listed_in_any_order_make_the_same_mesh():
    devices = machine(2, 4)
    np.testing.assert_array_equal(
        ids("data:2,fsdp:4", devices[::-1]), ids("data:2,fsdp:4", devices)
    )


def test_a_process_a_device_still_knows_its_machine():
    """Two machines of four cards, each card with a process, numbered across machines: fsdp stays
    within one."""
    devices = [Device(number, number, slice_index=number % 2) for number in range(8)]
    np.testing.assert_array_equal(
        ids("data:2,fsdp:4", devices)[:, :, 0], [[0, 2, 4, 6], [1, 3, 5, 7]]
    )


def test_hosts_of_unequal_size_still_make_a_mesh():
    devices = [*machine(1, 2), *(Device(2 + place, 1) for place in range(4))]
    assert sorted(ids("data:3,fsdp:2", devices).ravel()) == list(range(6))


def test_a_smaller_mesh_takes_as_many_of_each_process():
    assert ids("data:2,tensor:2", machine(2, 4)).ravel().tolist() == [0, 1, 4, 5]
    assert mesh.make("data:3", jax.devices()).devices.ravel().tolist() == jax.devices()[:3]


@pytest.mark.parametrize(
    ("text", "hosts", "local", "message"),
    [
        ("data:1", 2, 4, "1 device cannot be shared evenly by 2 processes; nearest: 2"),
        ("data:3", 2, 4, "3 devices cannot be shared evenly by 2 processes; nearest: 2 or 4"),
        ("data:2", 4, 1, "2 devices cannot be shared evenly by 4 processes; nearest: 4"),
    ],
)
def test_every_process_has_its_part(text, hosts, local, message):
    with pytest.raises(ValueError, match="^--mesh") as caught:
        mesh.make(text, machine(hosts, local))
    assert str(caught.value) == f"--mesh={text}: {message}"


def test_something_is_split_over_every_axis_that_is_offered() -> None:
    """Over another one devices would do the same work twice, and nobody would be told."""
    used = {*mesh.BATCH_AXES, *sharding.LOGICAL_TO_MESH.values()}
    assert set(mesh.OFFERED) <= used
