"""Rows of weight 0: whatever they hold, nothing of it reaches a gradient or a metric."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain import metrics
from jaxtrain.augment import ImageAugment, mixup
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD
from jaxtrain.parallel import mesh
from jaxtrain.schedules import Constant
from jaxtrain.tasks import Classification, NextToken, Regression
from jaxtrain.train import padding, reproducible, steps
from jaxtrain.train.state import init_state


def rows(count: int = 8, bad: tuple[int, ...] = (), value: float = np.nan) -> dict[str, Any]:
    """Examples, of which some are padding that holds no numbers, in the inputs and the targets."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(count, 6)).astype(np.float32),
        "target": rng.normal(size=(count, 2)).astype(np.float32),
        "weight": np.ones(count, np.float32),
    }
    batch["weight"][list(bad)] = 0.0
    batch["image"][list(bad), 1:] = value
    batch["target"][list(bad)] = value
    return {name: jnp.asarray(array) for name, array in batch.items()}


def init(key: jax.Array, x: jax.Array) -> dict[str, Any]:
    return {"w": jax.random.normal(key, (x.shape[-1], 2)), "b": jnp.ones(2)}


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
    # A row of zeros would divide by zero here: a stand-in has to be a row like the others.
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.tanh(x @ params["w"]) + params["b"][None]


@pytest.mark.parametrize(
    ("value", "bad", "options"),
    [
        (np.nan, (2, 3), {}),
        (np.inf, (0, 2, 4, 6), {"microbatches": 2}),  # one of the parts is padding only
        (-np.inf, (0,), {"precision": "fp16"}),
        (np.nan, (0, 5), {"remat": "dots"}),
        (1e30, (1, 7), {}),  # its square is infinite
    ],
    ids=str,
)
def test_padding_without_numbers_is_as_if_it_were_not_there(
    value: float, bad: tuple[int, ...], options: dict[str, Any]
) -> None:
    parts = (init, apply), Regression(), SGD(0.1)
    batch = rows(bad=bad, value=value)
    state = init_state(*parts, batch, **options)
    gradients, sums = steps.make_gradients(*parts, **options)(state, batch)
    kept = np.delete(np.arange(8), bad)
    plain = {name: np.asarray(batch[name])[kept] for name in ("image", "target")}

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(apply(params, plain["image"]) - plain["target"]))

    wanted_loss, wanted = jax.value_and_grad(loss)(state.params)
    tolerance = 2e-2 if "precision" in options else 1e-5
    assert float(sums["loss"][1]) == len(kept)
    np.testing.assert_allclose(sums["loss"][0] / len(kept), wanted_loss, rtol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        gradients,
        wanted,
    )
    evaluated = steps.make_eval_step(*parts, **options)(state, batch)
    np.testing.assert_allclose(evaluated["loss"][0] / len(kept), wanted_loss, rtol=tolerance)


@pytest.mark.parametrize("text", [pytest.param("data:8", marks=pytest.mark.slow), "data:2,fsdp:4"])
def test_meshes_and_logical_shards_of_padding_only(text: str) -> None:
    where = mesh.make(text)
    parts = (init, apply), Regression(), SGD(0.1)
    batch = rows(16, bad=(0, 1, 6))  # the first of eight shards holds nothing else
    results = []
    for make in (
        steps.make_train_step(*parts),
        steps.make_train_step(*parts, mesh=where),
        reproducible.make_train_step(*parts, mesh=where),
    ):
        given = None if not results else where
        state, sums = make(init_state(*parts, batch, mesh=given), batch)
        results.append((state.params, sums["loss"], sums["grad_norm"]))
    for result in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, results[0]
        )
    assert np.isfinite(results[0][2][0])


def test_finite_rows_of_weight_zero_stay_as_they_are() -> None:
    # A task may have a use for them, such as a loss without labels.
    batch = rows(bad=(3,), value=7.0)
    for by_row in (True, False):
        found = padding.replaced(batch, by_row=by_row)
        jax.tree.map(np.testing.assert_array_equal, found, batch)
    without = {name: array for name, array in batch.items() if name != "weight"}
    assert padding.replaced(without) is without


def test_whole_numbers_beside_nan_are_replaced_with_their_row() -> None:
    batch = rows(bad=(0, 2)) | {"label": jnp.array([99, 1, -1, 3, 4, 5, 6, 7])}
    found = padding.replaced(batch | {"id": jnp.arange(8)})
    assert found["label"].tolist() == [1, 1, 1, 3, 4, 5, 6, 7]
    assert found["id"].tolist() == list(range(8))
    np.testing.assert_array_equal(found["image"][0], batch["image"][1])


def test_weights_of_tokens() -> None:
    features = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    features[0, 2] = np.nan  # a place that does not count, and a row that does not
    features[1] = np.inf
    batch = {"image": jnp.asarray(features), "weight": jnp.array([[1.0, 2, 0], [0, 0, 0]])}
    found = np.asarray(padding.replaced(batch)["image"])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0, :2], features[0, :2])


def test_a_number_that_float16_cannot_hold_is_no_number() -> None:
    batch = {"image": jnp.array([[1e5], [2.0]]), "weight": jnp.array([0.0, 1.0])}
    assert padding.replaced(batch, jnp.float16)["image"].tolist() == [[2.0], [2.0]]
    assert padding.replaced(batch)["image"].tolist() == [[1e5], [2.0]]


def test_the_gradient_of_a_weighted_sum_is_zero_where_the_weight_is() -> None:
    value, pullback = jax.vjp(
        lambda values: metrics.weighted(values, jnp.array([2.0, 0.0]))[0], jnp.array([3.0, jnp.nan])
    )
    assert (float(value), pullback(jnp.float32(1))[0].tolist()) == (6.0, [2.0, 0.0])


def test_mixup_takes_no_partner_from_padding() -> None:
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
    images[[1, 2]] = np.nan
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.arange(8) % 3,
        "weight": jnp.asarray([1.0, 0, 0, 1, 1, 1, 1, 1]),
    }
    parts = MLP(num_classes=3, widths=(4,)), Classification(), SGD(0.1)
    augment = ImageAugment(mixup=1.0, cutmix=1.0)
    state = init_state(*parts, batch)
    gradients, sums = steps.make_gradients(*parts, augment=augment)(state, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.isfinite(sums["loss"][0])
    mixed = mixup.mix(
        batch | {"image": jnp.where(jnp.isnan(batch["image"]), 9.0, batch["image"])},
        1.0,
        0.0,
        jnp.zeros((8, 2)),
        jax.random.key(0),
    )
    # 6 lies opposite 1, which is padding: it stays itself; 7 lies opposite 0
    np.testing.assert_allclose(mixed["image"][6], images[6], rtol=1e-5)
    assert (int(mixed["label_other"][6]), int(mixed["label_other"][7])) == (0, 0)


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return nn.Dense(5)(nn.Embed(5, 4)(tokens_BT))


def test_tokens_have_no_floats_to_look_at() -> None:
    batch = {"tokens": jnp.arange(12).reshape(4, 3) % 5, "weight": jnp.array([1.0, 0, 1, 1])}
    parts = Embedded(), NextToken(), SGD(0.1)
    state = init_state(*parts, batch)
    gradients, sums = steps.make_gradients(*parts)(state, batch)
    fewer = {"tokens": batch["tokens"][jnp.array([0, 2, 3])]}
    wanted, _ = steps.make_gradients(*parts)(state, fewer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients, wanted
    )
    assert float(sums["loss"][1]) == 6.0


@pytest.mark.parametrize("microbatches", [1, 2])
def test_rows_that_the_task_ignores_are_as_if_they_were_not_there(microbatches: int) -> None:
    """Against the same rows with numbers in them, of which the loss knows nothing."""
    batch = rows() | {"label": jnp.asarray([0, 1, 255, 1, 0, 255, 1, 0])}
    del batch["weight"], batch["target"]
    bad = batch | {"image": batch["image"].at[np.array([2, 5])].set(jnp.nan)}
    parts = (init, apply), Classification(ignore=255), SGD(0.1)
    options: dict[str, Any] = {"schedule": Constant(warmup=0.0), "microbatches": microbatches}
    step = steps.make_train_step(*parts, **options)
    wanted, sums = step(init_state(*parts, seed=0, batch=batch, **options), batch)
    found, others = step(init_state(*parts, seed=0, batch=batch, **options), bad)
    for old, new in zip(jax.tree.leaves(wanted.params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)
    assert float(others["loss"][1]) == 6
    np.testing.assert_allclose(others["loss"][0], sums["loss"][0], rtol=1e-6)
