"""Stochastic rounding: unbiased, between the two neighbours, the same on any layout, and averages
that would stand still move."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.parallel import mesh
from jaxtrain.precision import stochastic_rounding

LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
round_to_bf16 = jax.jit(stochastic_rounding.to_bf16)


def neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next to each float32 one, towards zero and away from it (equal where it
    is one), as float64."""
    words = values.view(np.uint32)
    inner = words & np.uint32(0xFFFF0000)
    outer = np.where(words == inner, inner, inner + np.uint32(0x10000))
    return tuple(
        np.asarray(half, np.uint32).view(np.float32).astype(np.float64) for half in (inner, outer)
    )


def test_rounds_to_a_neighbour_and_the_mean_is_the_number():
    values = np.concatenate([np.geomspace(1e-30, 1e30, 60), -np.geomspace(1e-3, 1e3, 60)]).astype(
        np.float32
    )
    values = values[np.not_equal(*neighbours(values))]
    keys = jax.random.split(jax.random.key(0), 4096)
    seen = np.asarray(
        jax.jit(jax.vmap(lambda key: stochastic_rounding.to_bf16(values, key)))(keys)
    ).astype(np.float64)
    inner, outer = neighbours(values)
    assert ((seen == inner) | (seen == outer)).all()
    # The mean of n coins of p is off by at most half a gap / sqrt(n) at one sigma.
    off = np.abs(seen.mean(axis=0) - values.astype(np.float64)) / np.abs(outer - inner)
    assert off.max() < 4.5 * 0.5 / np.sqrt(len(keys))
    shares = (seen == outer).mean(axis=0)
    assert np.abs(shares - (values - inner) / (outer - inner)).max() < 4.5 * 0.5 / np.sqrt(
        len(keys)
    )


def test_what_bfloat16_holds_is_kept():
    held = np.array(
        [0.0, -0.0, 1.0, -1.5, LARGEST, -LARGEST, 2.0**-126, 2.0**-133, np.inf, -np.inf, np.nan],
        np.float32,
    )
    for seed in range(20):
        found = np.asarray(round_to_bf16(held, jax.random.key(seed)))
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), held)
        assert (np.signbit(found) == np.signbit(held))[:-1].all()


def test_finite_numbers_stay_finite_and_nan_stays_nan():
    largest = np.finfo(np.float32).max
    # cut off, this NaN would be an infinity
    payload = np.array([0x7F800001], np.uint32).view(np.float32)[0]
    values = np.tile(np.array([largest, -largest, payload], np.float32), 200)
    found = np.asarray(round_to_bf16(values, jax.random.key(0))).astype(np.float32).reshape(200, 3)
    assert np.isfinite(found[:, :2]).all()
    assert np.isnan(found[:, 2]).all()


def test_which_leaves_are_rounded_and_the_way_back():
    tree = {
        "mean": jnp.full((2, 3), 1.0001),
        "rate": jnp.float32(0.1),
        "one": jnp.full(1, 0.1),
        "count": jnp.arange(3),
        "half": jnp.ones(3, jnp.float16),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(5), 3),
    }
    stored = round_to_bf16(tree, jax.random.key(0))
    assert {name for name, leaf in stored.items() if leaf.dtype != tree[name].dtype} == {"mean"}
    assert stored["mean"].dtype == jnp.bfloat16
    back = jax.jit(
        lambda stored: stochastic_rounding.to_fp32(stored, jax.eval_shape(lambda: tree))
    )(stored)
    assert [leaf.dtype for leaf in jax.tree.leaves(back)] == [
        leaf.dtype for leaf in jax.tree.leaves(tree)
    ]
    np.testing.assert_array_equal(back["mean"], np.asarray(stored["mean"]).astype(np.float32))
    assert float(back["rate"]) == float(tree["rate"])
    np.testing.assert_array_equal(round_to_bf16(back, jax.random.key(9))["mean"], stored["mean"])


def test_leaves_draw_numbers_of_their_own():
    values = np.full(64, 1.00390625 / 1.00195, np.float32)
    first, second = round_to_bf16([values, values], jax.random.key(0))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, round_to_bf16([values, values], jax.random.key(0))[0])


@pytest.mark.parametrize("text", ["data:8", "data:2,fsdp:4"])
def test_the_layout_changes_no_bit(text):
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    grid = mesh.make(text)
    for spec in (
        PartitionSpec(("data", "fsdp")),
        PartitionSpec("data", "fsdp"),
        PartitionSpec(None, ("data", "fsdp")),
    ):
        place = NamedSharding(grid, spec)
        found = jax.jit(stochastic_rounding.to_bf16, out_shardings=[place])(
            [jax.device_put(values, place)], jax.random.key(4)
        )
        np.testing.assert_array_equal(found[0], round_to_bf16([values], jax.random.key(4))[0])


def test_an_average_moves_where_rounding_to_nearest_stands_still():
    """1,000 numbers, an average of decay 0.999 from 0 towards 1: after 6,000 steps it should be 1 -
    0.999^6000 = 0.9975."""
    size, steps = 1000, 6000

    def after(store) -> float:
        def body(step: jax.Array, average: jax.Array) -> jax.Array:
            return store(
                0.999 * average.astype(jnp.float32) + 0.001,
                jax.random.fold_in(jax.random.key(0), step),
            )

        return float(
            jax.jit(
                lambda: (
                    jax.lax.fori_loop(0, steps, body, jnp.zeros(size, jnp.bfloat16))
                    .astype(jnp.float32)
                    .mean()
                )
            )()
        )

    assert after(lambda average, key: average.astype(jnp.bfloat16)) < 0.6
    assert abs(after(stochastic_rounding.to_bf16) - (1 - 0.999**steps)) < 0.003
