"""The order of examples: exact epochs, the same bits on host and device, and no pattern that an eye
or a count could find."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtrain.data import order

LENGTHS = [
    *range(1, 200),
    255,
    256,
    257,
    999,
    1000,
    1437,
    1797,
    4000,
    4093,
    10007,
    55000,
    60000,
    65536,
    65537,
    99991,
]


@pytest.mark.parametrize("epoch", [0, 1, 4_000_000_000])
def test_each_permutation_holds_each_example_once(epoch: int) -> None:
    for length in LENGTHS:
        ids = order.permute(4294967295 - epoch % 7, epoch, np.arange(length), length)
        assert ids.dtype == np.int32
        assert np.array_equal(np.sort(ids), np.arange(length)), length


@pytest.mark.parametrize("length", [2**31 - 1, 1_281_167, 2**31 - 2, 2**30 + 1])
def test_huge_tables_are_in_range_and_distinct(length: int) -> None:
    index = np.concatenate([np.arange(2000), np.arange(length - 2000, length)])
    ids = order.permute(1, 2, index, length)
    assert ids.min() >= 0
    assert ids.max() < length
    assert len(np.unique(ids)) == len(index)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1437, 60000])
def test_numpy_and_a_compiled_program_agree_in_every_bit(length: int) -> None:
    compiled = jax.jit(
        lambda seed, epoch, offset: order.example_ids(seed, epoch, offset, 64, length, jnp)
    )
    for seed, epoch, offset in itertools.product(
        (0, 1, 2**31, 4294967295), (0, 3, 70000), (0, length // 2, length - 1)
    ):
        on_host = order.example_ids(seed, epoch, offset, 64, length)
        on_device = compiled(jnp.uint32(seed), jnp.int32(epoch), jnp.int32(offset))
        assert on_device.dtype == on_host.dtype == np.int32
        assert np.array_equal(on_host, on_device), (seed, epoch, offset)
    assert np.array_equal(
        order.example_ids(2**32 - 1, 5, 0, 64, length, jnp),
        order.example_ids(2**32 - 1, 5, 0, 64, length),
    )


def test_ids_made_sharded_over_all_devices_are_the_same() -> None:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ids = jax.jit(
        lambda seed: order.example_ids(seed, 1, 1430, 8 * len(devices), 1437, jnp),
        out_shardings=sharding,
    )(jnp.uint32(9))
    assert len(ids.addressable_shards) == len(devices)
    assert np.array_equal(ids, order.example_ids(9, 1, 1430, 8 * len(devices), 1437))


@pytest.mark.parametrize(
    ("length", "batch_size"), [(10, 1), (10, 3), (10, 10), (10, 32), (7, 20), (1, 4)]
)
def test_batches_that_straddle_epochs_still_make_exact_epochs(length: int, batch_size: int) -> None:
    epochs = [
        order.permute(3, epoch, np.arange(length), length) for epoch in range(2 * batch_size + 2)
    ]
    stream = np.concatenate(epochs)
    epoch, offset = 0, 0
    for step in range(2 * length):
        ids = order.example_ids(3, epoch, offset, batch_size, length)
        assert np.array_equal(ids, stream[step * batch_size : (step + 1) * batch_size])
        epoch, offset = order.advance(epoch, offset, batch_size, length)
        assert (epoch, offset) == divmod((step + 1) * batch_size, length)


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    orders = [
        order.permute(seed, epoch, np.arange(1000), 1000) for seed in range(8) for epoch in range(8)
    ]
    # Two random permutations agree in one place on average; eight would happen once in a million
    # pairs.
    agreements = [int((one == other).sum()) for one, other in itertools.combinations(orders, 2)]
    assert max(agreements) <= 9
    assert 0.85 < np.mean(agreements) < 1.15


@pytest.mark.parametrize("length", [5, 10, 37])
def test_every_example_comes_at_every_place_equally_often(length: int) -> None:
    trials = 400 * length
    ids = order.permute(
        0, np.repeat(np.arange(trials), length), np.tile(np.arange(length), trials), length
    ).reshape(trials, length)
    counts = np.stack([np.bincount(column, minlength=length) for column in ids.T])
    chi_square = ((counts - trials / length) ** 2 / (trials / length)).sum()
    degrees = (length - 1) ** 2
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees), (chi_square, degrees)


def test_neighbours_do_not_stay_neighbours() -> None:
    steps = np.diff(
        np.concatenate(
            [order.permute(0, epoch, np.arange(1437), 1437) for epoch in range(200)]
        ).astype(np.int64)
    )
    counts = np.bincount(np.abs(steps), minlength=1437)[1:]
    # Of random permutations, a step of size d comes about 2 (N - d) / N times an epoch.
    expected = 200 * 2 * (1437 - np.arange(1, 1437)) / 1437
    assert abs(((counts - expected) ** 2 / expected)[:-40].mean() - 1) < 0.25


def test_all_orders_of_four_examples_occur() -> None:
    ids = order.permute(0, np.repeat(np.arange(24000), 4), np.tile(np.arange(4), 24000), 4).reshape(
        -1, 4
    )
    _, counts = np.unique(ids, axis=0, return_counts=True)
    assert len(counts) == 24
    assert 700 < counts.min() < counts.max() < 1300


def test_grids_have_so_few_surplus_cells_that_no_loop_is_needed() -> None:
    random = np.random.default_rng(0)
    for length in [*range(1, 3000), *random.integers(3000, 2**31 - 1, 40).tolist()]:
        rows, columns = order.grid(length)
        assert 0 <= rows * columns - length <= 12, length
    with pytest.raises(ValueError, match="a table of 0 examples: must be 1..2147483647"):
        order.grid(0)


def test_the_order_never_changes_between_versions() -> None:
    # Runs are resumed by newer code: these numbers must stand for ever.
    assert order.permute(0, 0, np.arange(8), 1437).tolist() == GOLDEN
    assert order.example_ids(7, 2, 59_998, 4, 60_000).tolist() == GOLDEN_STRADDLING


GOLDEN = [587, 844, 1417, 94, 1088, 468, 579, 975]
GOLDEN_STRADDLING = [11969, 55606, 8917, 57982]
