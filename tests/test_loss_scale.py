"""The loss scale against a plain Python account of it, over long random runs with overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.precision import loss_scale
from jaxtrain.precision.loss_scale import (
    GROWTH_STEPS,
    INITIAL_SCALE,
    MAX_SCALE,
    MIN_SCALE,
    LossScale,
)


def reference(finite: np.ndarray) -> list[tuple[float, int, int]]:
    """(scale, good steps, skipped) after each step, by if and else."""
    scale, good, skipped, seen = INITIAL_SCALE, 0, 0, []
    for fine in finite:
        if fine:
            good += 1
            if good == GROWTH_STEPS:
                scale, good = min(2 * scale, MAX_SCALE), 0
        else:
            scale, good, skipped = max(scale / 2, MIN_SCALE), 0, skipped + 1
        seen.append((scale, good, skipped))
    return seen


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.002, 0.9, 1.0])
def test_updates_are_those_of_the_reference(share):
    finite = np.random.default_rng(7).random(40000) >= share
    finite[:9] = False

    def body(state: LossScale, fine: jax.Array) -> tuple[LossScale, LossScale]:
        state = loss_scale.update(state, fine)
        return state, state

    _, states = jax.jit(lambda finite: jax.lax.scan(body, LossScale.new(), finite))(finite)
    wanted = reference(finite)
    for found, right in zip(
        (states.scale, states.good_steps, states.skipped), zip(*wanted, strict=True), strict=True
    ):
        np.testing.assert_array_equal(found, right)
    assert (states.scale.dtype, states.good_steps.dtype, states.skipped.dtype) == (
        jnp.float32,
        jnp.int32,
        jnp.int32,
    )
    assert share not in (0.0, 1.0) or wanted[-1][0] == (MAX_SCALE if share == 0.0 else MIN_SCALE)


def test_a_tree_is_finite_if_every_number_is():
    tree = {
        "a": jnp.ones((2, 3)),
        "b": [jnp.zeros(4, jnp.bfloat16)],
        "count": jnp.int32(3),
        "key": jax.random.key(0),
        "none": None,
    }
    check = jax.jit(loss_scale.all_finite)
    assert bool(check(tree))
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not bool(check(tree | {"b": [jnp.zeros(4, jnp.bfloat16).at[3].set(bad)]}))
    assert bool(check({"count": jnp.int32(3)}))


@pytest.mark.parametrize("finite", [True, False])
def test_keep_selects_whole_trees(finite):
    new = {
        "a": jnp.ones(3),
        "half": jnp.ones((2, 2), jnp.bfloat16),
        "count": jnp.int32(8),
        "key": jax.random.key(1),
    }
    old = {
        "a": jnp.full(3, jnp.nan),
        "half": jnp.zeros((2, 2), jnp.bfloat16),
        "count": jnp.int32(7),
        "key": jax.random.key(0),
    }
    kept = jax.jit(loss_scale.select)(finite, new, old)
    for name, wanted in (new if finite else old).items():
        found = kept[name]
        assert found.dtype == wanted.dtype
        if name == "key":
            found, wanted = jax.random.key_data(found), jax.random.key_data(wanted)
        np.testing.assert_array_equal(found, wanted)


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """d/dw of the mean of 1e-8 w, in float16: zero without the scale, exact to rounding with it."""

    def gradient(scale: float) -> float:
        def loss(w: jax.Array) -> jax.Array:
            return jnp.float32(scale * 1e-8) * w.astype(jnp.float16).astype(jnp.float32)

        return float(jax.grad(loss)(jnp.float32(1.0))) / scale

    assert gradient(1.0) == 0.0
    assert abs(gradient(INITIAL_SCALE) / 1e-8 - 1) < 2**-11
