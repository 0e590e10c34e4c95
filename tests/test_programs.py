"""The programs of a run: horizons in steps, what is refused on shapes alone, and resident against
streamed data."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxtrain
from jaxtrain.augment import NoAugment
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.data.table import ArrayTable
from jaxtrain.horizon import Horizon
from jaxtrain.models import MLP
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh
from jaxtrain.runner import build, preflight
from jaxtrain.runner.compile import Sharded
from jaxtrain.schedules import Cosine
from jaxtrain.tasks import Classification
from jaxtrain.train import lowering

N = 100


def make_run(**changes):
    generator = np.random.default_rng(0)
    arrays = {
        "x": generator.normal(size=(N, 6)).astype(np.float32),
        "y": generator.integers(0, 4, N),
    }
    run = jaxtrain.Run(
        name="toy",
        model=MLP(num_classes=4, widths=(8,), dropout=0.1),
        data=Arrays.of(arrays, test=""),
        task=Classification(),
        optimizer=AdamW(),
        schedule=Cosine(),
        augment=NoAugment(),
        steps=40,
        batch_size=16,
        precision="fp32",
    )
    return dataclasses.replace(run, **changes)


def test_lengths_by_hand():
    length = build.lengths(
        make_run(
            steps=None,
            epochs=3.0,
            eval_every=Horizon(1, "epochs"),
            checkpoint_every=Horizon(10, "percent"),
        ),
        N,
    )
    assert (length.total, length.per_epoch, length.evaluate, length.save, length.keep_every) == (
        19,
        6.25,
        6,
        2,
        None,
    )
    length = build.lengths(
        make_run(
            eval_every=Horizon(0), checkpoint_every=Horizon(7), keep_every=Horizon(50, "percent")
        ),
        N,
    )
    assert (length.total, length.evaluate, length.save, length.keep_every) == (40, 0, 7, 20)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            r"^--batch_size=128: train split has 100 examples, so a batch would repeat some; use <="
            r" 100$"
        ),
    ):
        build.lengths(make_run(batch_size=128), N)


def checked(run, grid="data:1"):
    train, where = run.data.open().train, mesh.make(grid)
    recipe = build.recipe_of(run, train, build.lengths(run, len(train)))
    return preflight.model(run, train, recipe, build.execution(run, where)).batch


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        (
            {"model": MLP(num_classes=3)},
            "data:1",
            "--model.num_classes=3: the data has 4 classes; set --model.num_classes=4",
        ),
        (
            {"batch_size": 20},
            "data:8",
            "--batch_size=20: not divisible by 8 devices; nearest: 16 or 24",
        ),
        (
            {"reproducible": True},
            "data:3",
            (
                "--logical_shards=8: must be a multiple of the 3 devices; use --logical_shards=3 or"
                " fewer devices"
            ),
        ),
        (
            {"microbatches": 4},
            "data:8",
            "--microbatches=4: a part of 4 examples is not divisible by 8 devices; use fewer parts",
        ),
        (
            {"task": Classification(input="tokens")},
            "data:1",
            "batch has keys image, label; the task wants 'tokens'; set --task.input",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_compiling(changes, grid, message):
    with pytest.raises(ValueError, match="^(--|batch)") as caught:
        checked(make_run(**changes), grid)
    assert str(caught.value) == message


def test_data_that_does_not_fit_on_the_device_is_streamed_or_refused():
    table = ArrayTable({"image": np.broadcast_to(np.float32(0), (2**20, 2**10))})
    assert build.place_data(make_run(), table, mesh.make("data:1")) is None
    with pytest.raises(
        ValueError,
        match=r"^--device_data=yes: the train split is not in host memory, or larger than half",
    ):
        build.place_data(make_run(device_data="yes"), table, mesh.make("data:1"))


def test_evaluation_is_no_larger_than_the_set():
    grid = Sharded(mesh.make("data:8"))
    assert build.evaluation_size(make_run(), ArrayTable({"label": np.arange(50)}), grid) == 56
    assert build.evaluation_size(make_run(), ArrayTable({"label": np.arange(5000)}), grid) == 512


@pytest.mark.parametrize("grid", ["data:1", "data:8"])
def test_streamed_data_trains_like_resident_data(grid):
    """The same examples in the same order; the two programs differ, so to rounding."""
    run = make_run()
    train = run.data.open().train
    recipe = build.recipe_of(run, train, build.lengths(run, N))
    where = mesh.make(grid)
    execution = build.execution(run, where)
    lowered = lowering.lower(recipe, preflight.model(run, train, recipe, execution).batch, where)
    finals = []
    for data in (None, build.place_data(run, train, where)):
        state = execution.initialize(lowered, 0)
        source = data or build.open_loader(run, state, train, recipe, where)
        compiled = execution.training(lowered, source, per_call=None, most=50)
        assert compiled.per_call == (1 if data is None else 50)
        done, losses = 0, []
        with jax.transfer_guard("disallow"):
            while done < 20:
                state, sums = compiled.feed.advance(state, 5)
                done += 5
                losses.append(jax.device_get(sums["loss"]))
        compiled.feed.close()
        finals.append(
            (
                losses,
                jax.device_get(state.params),
                int(state.position.epoch),
                int(state.position.offset),
            )
        )
    np.testing.assert_allclose(finals[0][0], finals[1][0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        finals[0][1],
        finals[1][1],
    )
    assert finals[0][2:] == finals[1][2:] == (3, 20)
