"""Losses and tasks against NumPy in float64.

Dims: B batch, C classes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import losses, metrics
from jaxtrain.tasks import Classification, NextToken, Regression, units_of
from jaxtrain.train.feeds import steps_per_call


@pytest.fixture
def logits_BC() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=5, size=(9, 6)).astype(np.float32)


LABELS_B = np.array([0, 5, 2, 2, 1, 4, 3, 0, 5], np.int32)


def log_softmax(logits_BC: np.ndarray) -> np.ndarray:
    wide_BC = logits_BC.astype(np.float64)
    wide_BC = wide_BC - wide_BC.max(1, keepdims=True)
    return wide_BC - np.log(np.exp(wide_BC).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(logits_BC, smoothing):
    target_BC = (1 - smoothing) * np.eye(6)[LABELS_B] + smoothing / 6
    expected_B = -(target_BC * log_softmax(logits_BC)).sum(1)
    np.testing.assert_allclose(
        losses.cross_entropy(logits_BC, LABELS_B, label_smoothing=smoothing), expected_B, rtol=1e-5
    )
    traced = jax.jit(
        lambda value: losses.cross_entropy(jnp.asarray(logits_BC), LABELS_B, label_smoothing=value)
    )(smoothing)
    np.testing.assert_allclose(traced, expected_B, rtol=1e-5)


def test_cross_entropy_gradient_is_softmax_minus_target(logits_BC):
    gradient = jax.grad(lambda logits: losses.cross_entropy(logits, jnp.asarray(LABELS_B)).sum())(
        jnp.asarray(logits_BC)
    )
    np.testing.assert_allclose(
        gradient, np.exp(log_softmax(logits_BC)) - np.eye(6)[LABELS_B], atol=1e-6
    )


def test_half_precision_logits_are_reduced_in_float32():
    assert losses.cross_entropy(jnp.full((1, 70_000), 3.0, jnp.bfloat16), jnp.array([1]))[
        0
    ] == pytest.approx(np.log(70_000), rel=1e-5)


def test_mixed_labels_weigh_both(logits_BC):
    other_B = LABELS_B[::-1].copy()
    share_B = np.linspace(0, 1, 9).astype(np.float32)
    batch = {"label": LABELS_B, "label_other": other_B, "label_weight": share_B}
    sums = Classification().loss(jnp.asarray(logits_BC), batch)
    own, rest = (-log_softmax(logits_BC)[np.arange(9), labels] for labels in (LABELS_B, other_B))
    assert float(sums["loss"][0]) == pytest.approx(
        (share_B * own + (1 - share_B) * rest).sum(), rel=1e-5
    )
    greater_B = np.where(share_B >= 0.5, LABELS_B, other_B)
    assert float(sums["accuracy"][0]) == (logits_BC.argmax(1) == greater_B).sum()


def test_smoothing_counts_in_training_only(logits_BC):
    task = Classification(label_smoothing=0.3)
    plain = Classification().loss(jnp.asarray(logits_BC), {"label": LABELS_B})
    evaluated = task.loss(jnp.asarray(logits_BC), {"label": LABELS_B}, train=False)
    assert float(evaluated["loss"][0]) == float(plain["loss"][0])
    assert float(task.loss(jnp.asarray(logits_BC), {"label": LABELS_B})["loss"][0]) != float(
        plain["loss"][0]
    )


def test_examine(logits_BC):
    found = Classification().examine(jnp.asarray(logits_BC), {"label": jnp.asarray(LABELS_B)})
    np.testing.assert_array_equal(found["prediction"], logits_BC.argmax(1))
    np.testing.assert_allclose(
        found["probability"], np.exp(log_softmax(logits_BC))[np.arange(9), LABELS_B], rtol=1e-4
    )


def test_regression():
    outputs, targets = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    sums = Regression().loss(
        jnp.asarray(outputs),
        {"target": jnp.asarray(targets), "weight": jnp.array([1.0, 1, 0, 1, 0])},
    )
    expected = np.square(outputs.astype(np.float64) - targets).mean(1)[[0, 1, 3]].sum()
    assert (float(sums["loss"][0]), float(sums["loss"][1])) == (
        pytest.approx(expected, rel=1e-6),
        3.0,
    )
    with pytest.raises(
        ValueError,
        match=(
            r"^outputs have shape \(5, 1\), targets \(5, 3\); they must be equal, so give the model"
            r" 3 outputs an example \(--model.num_classes=3\), or set --task.target$"
        ),
    ):
        Regression().loss(jnp.ones((5, 1)), {"target": jnp.asarray(targets)})


def test_missing_field():
    with pytest.raises(
        ValueError,
        match=r"^batch has keys image, label; the task wants 'tokens'; set --task.input$",
    ):
        Classification(input="tokens").inputs({"image": jnp.ones(1), "label": jnp.ones(1)})


def test_totals_carry_over_a_record():
    """An interval cut in two by a checkpoint has the same mean, to the last bit."""
    values = np.random.default_rng(2).normal(size=20).astype(np.float32)
    whole, first = metrics.Totals(), metrics.Totals()
    for value in values:
        whole.add({"loss": (value, 1.0)})
    for value in values[:7]:
        first.add({"loss": (value, 1.0)})
    second = metrics.Totals(first.record())
    for value in values[7:]:
        second.add({"loss": (value, 1.0)})
    assert second.means() == whole.means()


def test_totals_that_overflow_can_be_recorded():
    first = metrics.Totals()
    first.add({"loss": (3.0, 2.0), "perplexity": (np.inf, 2.0), "odd": (np.nan, 2.0)})
    second = metrics.Totals(json.loads(json.dumps(first.record(), allow_nan=False)))
    np.testing.assert_equal(second.means(), {"loss": 1.5, "perplexity": np.inf, "odd": np.nan})


def test_steps_per_call_by_work():
    """Small dense models run many steps a dispatch; one with a convolution runs alone on CPU."""
    dense = jax.jit(lambda x, w: x @ w).lower(jnp.ones((32, 64)), jnp.ones((64, 32)))
    large = jax.jit(lambda x, w: x @ w).lower(jnp.ones((512, 2048)), jnp.ones((2048, 512)))
    conv = jax.jit(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")).lower(
        jnp.ones((1, 1, 8, 8)), jnp.ones((1, 1, 3, 3))
    )
    assert steps_per_call(dense, "cpu", 50) == 50
    assert steps_per_call(large, "cpu", 50) == 1
    assert steps_per_call(conv, "cpu", 50) == 1
    assert steps_per_call(conv, "gpu", 50) == 50


def test_speed_is_counted_in_the_unit_of_the_task() -> None:
    """Of sequences of nine tokens eight are predicted; tasks that say nothing count examples."""
    assert units_of(NextToken(), {"tokens": jnp.zeros((3, 9), jnp.int32)}) == ("tokens", 24)
    assert units_of(Classification(), {"image": jnp.zeros((5, 2))}) == ("examples", 5)
    assert units_of(object(), {"x": jnp.zeros((7, 2))}) == ("examples", 7)
