"""The way to the devices: streams that resume exactly, padding that counts for nothing, errors that
arrive, threads that end."""

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxtrain.data import order, pipeline
from jaxtrain.data.statistics import Statistics, measure, standardize
from jaxtrain.data.table import ArrayTable, SliceTable, join, load, num_bytes, select

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def sharded() -> NamedSharding:
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def numbered(length: int) -> ArrayTable:
    """A table in which every value tells its row."""
    rows = np.arange(length)
    return ArrayTable(
        {
            "image": (
                np.broadcast_to(rows[:, None, None, None], (length, 2, 2, 1)).astype(np.float32)
            ),
            "label": rows,
        },
        length,
    )


def data_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith("jaxtrain-data")
    ]


def stream_of(table: Any, *, seed: int, offset: int = 0, **more: Any) -> pipeline.BatchLoader:
    """A stream of a table, shuffled, that begins so many examples into the first epoch."""
    shuffled = order.Shuffled(len(table))
    position = shuffled.advance(shuffled.start(seed), offset)
    return pipeline.BatchLoader(table, order=shuffled, position=position, **more)


def take(stream: pipeline.BatchLoader, count: int) -> list[list[int]]:
    return [next(stream)["id"].tolist() for _ in range(count)]


@pytest.mark.parametrize(("length", "batch_size"), [(7, 3), (5, 5), (3, 8)])
def test_a_stream_resumed_at_any_position_goes_on_as_if_never_interrupted(
    one: SingleDeviceSharding, length: int, batch_size: int
) -> None:
    table, steps = numbered(length), 3 * length
    epoch = order.Shuffled(length)
    with pipeline.BatchLoader(
        table, order=epoch, position=epoch.start(5), batch_size=batch_size, sharding=one
    ) as stream:
        golden, positions = [], []
        for _ in range(steps):
            positions.append(stream.position)
            golden += take(stream, 1)
    flat = list(itertools.chain(*golden))
    for number in range(len(flat) // length):
        assert sorted(flat[number * length : (number + 1) * length]) == list(range(length))
    for step, position in enumerate(positions):
        prefetch = 1 + step % 3
        with pipeline.BatchLoader(
            table,
            order=epoch,
            position=position,
            batch_size=batch_size,
            sharding=one,
            prefetch=prefetch,
        ) as stream:
            assert take(stream, min(4, steps - step)) == golden[step : step + 4]


def test_a_stream_hands_out_the_rows_of_its_ids_sharded_ahead_of_the_step(
    sharded: NamedSharding,
) -> None:
    batch_size = 2 * len(jax.devices())
    with (
        jax.transfer_guard("disallow"),
        stream_of(numbered(50), seed=1, batch_size=batch_size, sharding=sharded) as stream,
    ):
        batches = [next(stream) for _ in range(6)]
    for step, batch in enumerate(batches):
        expected = order.example_ids(1, *order.advance(0, 0, step * batch_size, 50), batch_size, 50)
        assert batch["image"].sharding.is_equivalent_to(sharded, 4)
        assert all(shard.data.shape[0] == 2 for shard in batch["image"].addressable_shards)
        assert np.array_equal(batch["id"], expected)
        assert np.array_equal(batch["label"], expected)
        assert np.array_equal(np.asarray(batch["image"])[:, 1, 1, 0], expected)
        assert batch["label"].dtype == batch["id"].dtype == jnp.int32


class Slow:
    """A table that counts its reads, and may fail at one of them."""

    arrays = None
    num_classes = class_names = None

    def __init__(self, fails_at: int = -1) -> None:
        self.fields = numbered(4).fields
        self.reads = 0
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 4

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        with self._lock:
            self.reads += 1
            if self.reads == self._fails_at:
                raise ValueError("/data/train-00003: corrupt record 881")
        time.sleep(0.005)
        return numbered(4).read(indices)


def test_what_fails_while_reading_ahead_is_raised_in_its_place(one: SingleDeviceSharding) -> None:
    stream = stream_of(Slow(fails_at=3), seed=0, batch_size=2, sharding=one, prefetch=1)
    take(stream, 2)
    with pytest.raises(ValueError, match="corrupt record 881"):
        next(stream)
    assert not data_threads()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_reading_runs_ahead_but_no_further_than_told_and_threads_end(
    one: SingleDeviceSharding, prefetch: int
) -> None:
    table = Slow()
    stream = stream_of(table, seed=0, batch_size=2, sharding=one, prefetch=prefetch)
    assert table.reads == 0
    take(stream, 3)
    time.sleep(0.1)
    assert table.reads == 3 + prefetch
    assert data_threads()
    stream.close()
    stream.close()
    assert not data_threads()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_an_evaluation_pass_counts_each_example_once(sharded: NamedSharding, length: int) -> None:
    batches = list(pipeline.evaluation_batches(numbered(length), 8, sharded))
    assert {batch["image"].shape for batch in batches} == {(8, 2, 2, 1)}
    ids, weights = (np.concatenate([batch[name] for batch in batches]) for name in ("id", "weight"))
    assert ids[weights == 1].tolist() == list(range(length))
    assert weights.sum() == length
    assert np.concatenate([batch["label"] for batch in batches])[weights == 1].tolist() == list(
        range(length)
    )
    assert not data_threads()


def test_an_evaluation_pass_that_is_left_early_ends_its_threads(one: SingleDeviceSharding) -> None:
    batches = pipeline.evaluation_batches(numbered(50), 8, one)
    next(batches)
    batches.close()
    assert not data_threads()


def test_a_resident_table_gathers_the_same_batches_as_a_stream(sharded: NamedSharding) -> None:
    table = numbered(37)
    with jax.transfer_guard("disallow"):
        arrays = pipeline.resident_arrays(table, NamedSharding(sharded.mesh, PartitionSpec()))
        seed = jax.device_put(np.uint32(3), NamedSharding(sharded.mesh, PartitionSpec()))
        gathered = jax.jit(
            lambda arrays, seed: pipeline.gather(
                arrays, order.example_ids(seed, 0, 24, 16, 37, jnp)
            )
        )(arrays, seed)
    with stream_of(table, seed=3, batch_size=16, offset=24, sharding=sharded) as stream:
        streamed = next(stream)
    assert gathered.keys() == streamed.keys() == {"image", "label", "id"}
    for name in gathered:
        assert gathered[name].dtype == streamed[name].dtype
        assert np.array_equal(gathered[name], streamed[name])


def test_only_tables_in_memory_that_leave_half_of_it_free_become_resident() -> None:
    table = numbered(100)
    assert num_bytes(table) == 100 * (16 + 4)
    assert pipeline.fits_on_device(table, 4000)
    assert not pipeline.fits_on_device(table, 3999)
    assert pipeline.fits_on_device(table, None)
    assert not pipeline.fits_on_device(Slow(), 10**9)


def test_parts_of_tables_read_like_slices_of_arrays() -> None:
    random, whole = np.random.default_rng(0), numbered(20)
    wanted = random.integers(0, 9, 30)
    for rows in (range(4, 13), np.arange(4, 13), np.array([3, 3, 19, 0, 7, 7, 1, 2, 5])):
        for table in (
            select(whole, rows),
            SliceTable(whole, rows),
            load(SliceTable(whole, rows), chunk=4),
        ):
            assert len(table) == 9
            assert np.array_equal(table.read(wanted)["label"], np.asarray(rows)[wanted])
    lazy = join(SliceTable(whole, range(3, 8)), whole, SliceTable(whole, np.array([9, 2])))
    joined = np.concatenate([np.arange(3, 8), np.arange(20), [9, 2]])
    wanted = random.permutation(len(joined))
    assert np.array_equal(lazy.read(wanted)["label"], joined[wanted])
    assert np.array_equal(lazy.read(wanted)["image"][:, 0, 0, 0], joined[wanted])
    with pytest.raises(ValueError, match="differ in fields or shapes"):
        join(whole, ArrayTable({"label": np.zeros(3)}))


def test_statistics_equal_numpy_in_float64() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (100, 6, 5, 3), dtype=np.uint8)
    far = (1e4 + random.standard_normal((100, 40, 2))).astype(np.float32)
    signals = random.standard_normal((100, 40)).astype(np.float32)
    for images, scale, dims in ((pixels, 255, (0, 1, 2)), (far, 1, (0, 1)), (signals, 1, None)):
        measured = measure(ArrayTable({"image": images}), chunk=7)
        exact = images.astype(np.float64) / scale
        assert np.allclose(measured.mean_C, exact.mean(dims), rtol=1e-12, atol=1e-14)
        assert np.allclose(measured.std_C, exact.std(dims), rtol=1e-9, atol=0)
        batch = jax.jit(lambda images, measured=measured: standardize({"image": images}, measured))(
            images
        )
        assert batch["image"].dtype == jnp.float32
        assert np.allclose(
            batch["image"],
            (exact - exact.mean(dims)) / exact.std(dims),
            atol=2e-3 if images is far else 2e-5,
        )


def test_statistics_of_odd_tables() -> None:
    constant = ArrayTable({"image": np.full((5, 2, 2, 2), 255, np.uint8)})
    assert measure(constant) == Statistics((1.0, 1.0), (1.0, 1.0))
    tenth = measure(
        ArrayTable({"image": np.arange(100, dtype=np.float32)[:, None]}), max_examples=10
    )
    assert tenth.mean_C == (45.0,)
    with pytest.raises(ValueError, match="image: holds values that are not finite"):
        measure(ArrayTable({"image": np.array([[1.0], [np.nan]])}))


STUCK = """
import sys, threading, time
import jax
from test_data_pipeline import numbered
from jaxtrain.data import pipeline
from jaxtrain.data.order import Shuffled


class Stuck:
    arrays = num_classes = class_names = None
    fields = numbered(4).fields

    def __len__(self):
        return 4

    def read(self, indices):
        print("reading", flush=True)
        time.sleep(1000)


pipeline.CLOSE_SECONDS = 0.5
stream = pipeline.BatchLoader(
    Stuck(), order=Shuffled(4), position=Shuffled(4).start(0), batch_size=2,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
)
stream._batches._submit()
time.sleep(0.2)
began = time.monotonic()
stream.close()
stream.close()
print("closed after", round(time.monotonic() - began, 1), flush=True)
"""


def test_a_reader_that_is_stuck_keeps_neither_the_run_nor_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "closed after 0.5"
    assert done.stderr == (
        "jaxtrain: warning: 2 reading threads do not end: no answer from the data for 0.5 s; they"
        " are left behind\n"
    )
