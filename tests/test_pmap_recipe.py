"""The recipe of docs/sharding.md for users of pmap: their per-device step, the same under
shard_map, one global jit, and jaxtrain's step.

Dims: B batch, C classes, D features, H hidden.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxtrain import losses
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh, sharding
from jaxtrain.tasks import Classification
from jaxtrain.train import steps
from jaxtrain.train.state import init_state

B, C, D, H = 32, 4, 10, 16
RATE, MOMENTUM, STEPS = 0.2, 0.9, 8
DEVICES = 8


def init(key: jax.Array, images_BD: jax.Array) -> dict[str, jax.Array]:
    first, last = jax.random.split(key)
    kernel_DH = jax.random.normal(first, (images_BD.shape[1], H)) / 3
    return {"kernel": kernel_DH, "bias": jnp.zeros(H), "head": jax.random.normal(last, (H, C)) / 4}


def apply(params: dict[str, jax.Array], images_BD: jax.Array) -> jax.Array:
    return jnp.tanh(images_BD @ params["kernel"] + params["bias"][None]) @ params["head"]


def batches() -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(C, D))
    for _ in range(STEPS):
        labels_B = generator.integers(0, C, B).astype(np.int32)
        yield {
            "image": (centres[labels_B] + generator.normal(size=(B, D))).astype(np.float32),
            "label": labels_B,
        }


def start() -> tuple[Any, Any]:
    """The parameters that jaxtrain would begin with, and a velocity of zero."""
    state = init_state((init, apply), Classification(), SGD(learning_rate=RATE), next(batches()))
    return state.params, jax.tree.map(jnp.zeros_like, state.params)


def mean_loss(params: Any, batch: Any) -> jax.Array:
    return losses.cross_entropy(apply(params, batch["image"]), batch["label"]).mean()


def updated(params: Any, velocity: Any, gradients: Any) -> tuple[Any, Any]:
    velocity = jax.tree.map(lambda old, gradient: MOMENTUM * old + gradient, velocity, gradients)
    return jax.tree.map(lambda param, speed: param - RATE * speed, params, velocity), velocity


def per_device(axis: str) -> Callable[..., Any]:
    """The step as written for pmap: it sees the examples of one device, and averages what it finds
    over the axis."""

    def update(params: Any, velocity: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        gradients = jax.lax.pmean(gradients, axis)
        return *updated(params, velocity, gradients), jax.lax.pmean(loss, axis)

    return update


def by_pmap() -> list[float]:
    """State with a copy for each device, batches with a leading dim of devices."""
    update = jax.pmap(per_device("batch"), axis_name="batch")
    params, velocity = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), start())
    found = []
    for batch in batches():
        parts = {
            name: array.reshape(DEVICES, B // DEVICES, *array.shape[1:])
            for name, array in batch.items()
        }
        params, velocity, loss = update(params, velocity, parts)
        found.append(float(loss[0]))
    return found


def by_shard_map(check_vma: bool = False) -> list[float]:
    """The gradual way: the same function over a mesh axis; state and batch are whole arrays."""
    grid, whole, split = mesh.make(f"data:{DEVICES}"), PartitionSpec(), PartitionSpec("data")
    shards = jax.shard_map(
        per_device("data"),
        mesh=grid,
        in_specs=(whole, whole, split),
        out_specs=whole,
        check_vma=check_vma,
    )
    update = jax.jit(shards)
    params, velocity = jax.device_put(start(), sharding.replicated(grid))
    found = []
    for batch in batches():
        params, velocity, loss = update(
            params, velocity, jax.device_put(batch, sharding.batch(grid))
        )
        found.append(float(loss))
    return found


def by_jit() -> list[float]:
    """The direct way: no axis, no pmean; the mean over the batch is the mean over the whole
    batch."""
    grid = mesh.make(f"data:{DEVICES}")

    @jax.jit
    def update(params: Any, velocity: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
        return *updated(params, velocity, gradients), loss

    params, velocity = jax.device_put(start(), sharding.replicated(grid))
    found = []
    for batch in batches():
        params, velocity, loss = update(
            params, velocity, jax.device_put(batch, sharding.batch(grid))
        )
        found.append(float(loss))
    return found


def by_jaxtrain(text: str) -> list[float]:
    """Model, task and optimizer; the mesh is a word."""
    grid, parts = (
        mesh.make(text),
        (
            (init, apply),
            Classification(),
            SGD(learning_rate=RATE, momentum=MOMENTUM),
        ),
    )
    state = init_state(*parts, next(batches()), mesh=grid)
    update = steps.make_train_step(*parts, mesh=grid)
    found = []
    for batch in batches():
        state, sums = update(state, jax.device_put(batch, sharding.batch(grid)))
        found.append(float(sums["loss"][0] / sums["loss"][1]))
    return found


@pytest.fixture(scope="module")
def original() -> list[float]:
    return by_pmap()


def test_the_original_learns(original: list[float]) -> None:
    assert original[-1] < 0.7 * original[0]


def test_shard_map_keeps_the_function(original: list[float]) -> None:
    np.testing.assert_allclose(by_shard_map(), original, rtol=1e-6)


def test_one_global_batch_needs_no_pmean(original: list[float]) -> None:
    np.testing.assert_allclose(by_jit(), original, rtol=1e-6)


@pytest.mark.parametrize("text", ["data:8", "fsdp:4,tensor:2"])
def test_our_step_gives_the_same_losses(original: list[float], text: str) -> None:
    np.testing.assert_allclose(by_jaxtrain(text), original, rtol=1e-6)


def test_the_trap_that_the_guide_warns_of(original: list[float]) -> None:
    """With its checks on, shard_map adds gradients of whole arrays up by itself, so that pmean no
    longer divides: the rate is eight times as high."""
    assert by_shard_map(check_vma=True)[0] == pytest.approx(original[0], rel=1e-6)
    assert abs(by_shard_map(check_vma=True)[1] - original[1]) > 0.01
