"""Meshes from text, and which array goes where on them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxtrain import mesh, sharding


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data:-1", {"data": 8}), ("data:2,fsdp:-1", {"data": 2, "fsdp": 4}), ("tensor:2,data:2", {"data": 2, "tensor": 2}), ("fsdp:1", {})],
)
def test_sizes(text, sizes):
    made = mesh.make(text)
    assert {axis: size for axis, size in made.shape.items() if size > 1} == sizes
    assert tuple(made.axis_names) == mesh.AXES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:0", "'data:0' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:-2", "'data:-2' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:two", "'data:two' needs a size >= 1, or -1 for all that is left, e.g. data:2"),
        ("data:2,data:4", "axis 'data' is given twice"),
        ("data:-1,fsdp:-1", "only one size may be -1"),
        ("data:16", "needs 16 devices, there are only 8; for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count=16"),
        ("data:3,fsdp:-1", "8 devices are not a multiple of 3"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ValueError, match="^--mesh") as caught:
        mesh.make(text)
    assert str(caught.value) == f"--mesh={text}: {message}"


def test_batch_must_divide():
    grid = mesh.make("data:2,fsdp:4")
    mesh.check_batch("batch_size", 16, grid)
    with pytest.raises(ValueError, match=r"^--batch_size=10: not divisible by 8 devices; nearest: 8 or 16$"):
        mesh.check_batch("batch_size", 10, grid)
    with pytest.raises(ValueError, match=r"^--batch_size=3: not divisible by 8 devices; nearest: 8$"):
        mesh.check_batch("batch_size", 3, grid)


@pytest.mark.parametrize(
    ("text", "shape", "axes", "spec"),
    [
        ("fsdp:8", (12, 64), None, PartitionSpec(None, "fsdp")),
        ("fsdp:8", (12, 7), None, PartitionSpec()),
        ("fsdp:4,tensor:2", (64, 32), ("embed", "mlp"), PartitionSpec("fsdp", "tensor")),
        ("fsdp:4,tensor:2", (64, 32), ("mlp_in", "mlp"), PartitionSpec("fsdp", "tensor")),
        ("tensor:2", (64, 32), ("embed", "mlp"), PartitionSpec(None, "tensor")),
        ("fsdp:8", (3, 3, 1, 16), (None, None, "conv_in", "conv_out"), PartitionSpec(None, None, None, "fsdp")),
        ("data:8", (64, 32), ("embed", "mlp"), PartitionSpec()),
    ],
)
def test_specs(text, shape, axes, spec):
    assert sharding.parameter("dense/kernel", shape, axes, mesh.make(text)) == spec


def test_a_logical_dim_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="^params") as caught:
        sharding.parameter("params/mlp/kernel", (64, 1000), ("embed", "mlp"), mesh.Mesh(_devices(16), mesh.AXES))
    assert str(caught.value) == "params/mlp/kernel dim 1 (=1000, 'mlp') not divisible by axis tensor=16; change --mesh or make it 992 or 1008"


def _devices(tensor: int):
    import numpy as np

    return np.asarray([jax.devices()[0]] * tensor, dtype=object).reshape((1,) * 6 + (tensor,))


def test_bytes_by_hand():
    grid = mesh.make("fsdp:8")
    shapes = {"a": jax.ShapeDtypeStruct((16, 64), jnp.float32), "b": jax.ShapeDtypeStruct((7,), jnp.float32)}
    placed = sharding.parameters(shapes, {"a": None, "b": None}, grid)
    assert sharding.bytes_per_device(shapes, placed) == 16 * 64 * 4 // 8 + 7 * 4
