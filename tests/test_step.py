"""The step against hand-written loops, NumPy in float64, and itself on other meshes.

Dims: B batch, C classes, D features, N examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxtrain import metrics, rng
from jaxtrain.augment import ImageAugment
from jaxtrain.data import order
from jaxtrain.models import MLP, ConvNet
from jaxtrain.optimizers import SGD, AdamW
from jaxtrain.parallel import mesh
from jaxtrain.schedules import Constant, Cosine
from jaxtrain.tasks import Classification
from jaxtrain.train import hyper
from jaxtrain.train import steps as train_steps
from jaxtrain.train.evaluate import evaluate
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import TrainState, init_state

N, D, C = 96, 12, 5


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(N, D)).astype(np.float32),
        "label": generator.integers(0, C, N).astype(np.int32),
    }


def batch_of(arrays: dict[str, np.ndarray], start: int = 0, size: int = 16) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array[start : start + size]) for name, array in arrays.items()}


def parts(**model: Any) -> tuple[MLP, Classification, AdamW]:
    return MLP(num_classes=C, widths=(8,), **model), Classification(), AdamW(learning_rate=0.01)


def run(
    arrays: dict[str, np.ndarray],
    model: Any,
    *,
    count: int = 3,
    mesh_text: str | None = None,
    size: int = 16,
    **options: Any,
) -> Any:
    """The state after `count` steps and the losses."""
    task, optimizer = (
        options.pop("task", Classification()),
        options.pop("optimizer", SGD(learning_rate=0.1)),
    )
    grid = None if mesh_text is None else mesh.make(mesh_text)
    state = init_state(model, task, optimizer, batch_of(arrays, 0, size), mesh=grid, **options)
    update = train_steps.make_train_step(model, task, optimizer, mesh=grid, **options)
    losses = []
    for index in range(count):
        state, sums = update(state, batch_of(arrays, index * size % (N - size + 1), size))
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    return state, losses


def assert_close(first: Any, second: Any, tolerance: float = 1e-6) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), first, second
    )


def test_equals_a_hand_written_loop(arrays):
    model, task, optimizer = parts()
    state = init_state(
        model, task, optimizer, batch_of(arrays), schedule=Cosine(warmup=2.0), total_steps=5.0
    )
    update = train_steps.make_train_step(
        model, task, optimizer, schedule=Cosine(warmup=2.0), total_steps=5.0
    )
    params = jax.tree.map(jnp.copy, state.params)
    mask = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    # The rates by the formula in words: a ramp over two steps, then half a cosine.
    rates = [
        0.01 * min(1, (s + 1) / 3) * 0.5 * (1 + np.cos(np.pi * max(s - 2, 0) / 3)) for s in range(5)
    ]
    other = optax.inject_hyperparams(optax.adamw, static_args="mask")(
        learning_rate=0.0, weight_decay=optimizer.weight_decay, mask=mask
    )
    opt_state = other.init(params)
    for index in range(5):
        batch = batch_of(arrays, 16 * index)

        def loss(params: Any, batch: Any = batch) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply({"params": params}, batch["image"]), batch["label"]
            ).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        opt_state.hyperparams["learning_rate"] = jnp.float32(rates[index])
        updates, opt_state = other.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, sums = update(state, batch)
        assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(float(value), rel=1e-5)
        assert float(sums["learning_rate"][0]) == pytest.approx(rates[index], rel=1e-5)
        assert float(sums["grad_norm"][0]) == pytest.approx(
            float(optax.tree.norm(gradients)), rel=1e-5
        )
    assert_close(state.params, params, 2e-6)
    assert int(state.step) == 5


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_add_up(arrays, count):
    whole, losses = run(arrays, parts()[0])
    cut, cut_losses = run(arrays, parts()[0], microbatches=count)
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-6)
    assert_close(cut.params, whole.params)


def test_microbatches_weigh_examples_not_parts(arrays):
    """A batch whose weights are uneven: the mean is over examples, so a part with few of them
    counts little."""
    weighted = arrays | {"weight": (np.arange(N) % 7 == 0).astype(np.float32)}
    whole, losses = run(weighted, parts()[0])
    cut, cut_losses = run(weighted, parts()[0], microbatches=4)
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-6)
    assert_close(cut.params, whole.params)


class Normed(nn.Module):
    """Batch normalisation alone, then a dense layer."""

    @nn.compact
    def __call__(self, x_BD: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(C)(
            nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x_BD)
        )


@pytest.mark.parametrize("count", [1, 4])
def test_running_averages_move_once_a_step(arrays, count):
    """Against float64: the mean over microbatches of their own statistics, however many parts,
    enters once with weight 0.1."""
    state, _ = run(arrays, Normed(), count=1, microbatches=count)
    images_BD = arrays["image"][:16].astype(np.float64)
    means = [images_BD[part::count].mean(0) for part in range(count)]
    variances = [images_BD[part::count].var(0) for part in range(count)]
    stats = state.collections["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(means, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * np.mean(variances, axis=0), rtol=1e-5)


@pytest.fixture(scope="module")
def with_everything(arrays: dict[str, np.ndarray]) -> Callable[[str | None], Any]:
    """A function of the mesh that trains with batch statistics, dropout, microbatches, clipping,
    averaging and augmentation; each mesh is trained on once."""
    images = {
        "image": arrays["image"].reshape(N, 2, 6, 1)[:, :, :4].repeat(2, 1),
        "label": arrays["label"],
    }
    options = {
        "clip_norm": 0.5,
        "microbatches": 2,
        "ema_decay": 0.99,
        "augment": ImageAugment(flip=0.5, crop_padding=1),
    }
    model = ConvNet(num_classes=C, widths=(8, 16), dropout=0.3)
    return functools.cache(lambda text: run(images, model, mesh_text=text, **options))


@pytest.mark.parametrize(
    "text",
    [
        "data:8",
        "data:2,fsdp:2,tensor:2",
        pytest.param("fsdp:8", marks=pytest.mark.slow),
        pytest.param("data:2,fsdp:4", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_the_same_numbers(with_everything, text):
    one, losses = with_everything(None)
    many, many_losses = with_everything(text)
    np.testing.assert_allclose(many_losses, losses, rtol=2e-6)
    assert_close(many.params, one.params, 1e-5)
    assert_close(many.collections, one.collections, 1e-5)
    assert_close(many.ema, one.ema, 1e-5)


def test_state_is_initialized_sharded_and_stays_so(arrays):
    grid = mesh.make("fsdp:8")
    model = MLP(num_classes=C, widths=(64,))
    state = init_state(model, Classification(), AdamW(), batch_of(arrays), mesh=grid)
    update = train_steps.make_train_step(model, Classification(), AdamW(), mesh=grid)

    def shards(state: TrainState) -> dict[str, int]:
        kernel = next(leaf for leaf in jax.tree.leaves(state.params) if leaf.shape == (D, 64))
        moment = next(leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (D, 64))
        return {
            "param": kernel.addressable_shards[0].data.size,
            "moment": moment.addressable_shards[0].data.size,
        }

    initial = shards(state)
    state, _ = update(state, batch_of(arrays))
    assert initial == shards(state)
    assert initial["param"] == initial["moment"]
    assert initial["param"] in (D * 64, D * 64 // 8)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    update(state, batch_of(arrays))
    assert update._cache_size() == 1, "the state's layout changed between steps"
    assert all(place.mesh.shape["fsdp"] == 8 for place in jax.tree.leaves(placed))


def test_clipping_bounds_the_update(arrays):
    model = parts()[0]
    optimizer = SGD(learning_rate=1.0)
    state = init_state(model, Classification(), optimizer, batch_of(arrays), clip_norm=0.01)
    before = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    state, sums = train_steps.make_train_step(model, Classification(), optimizer, clip_norm=0.01)(
        state, batch_of(arrays)
    )
    moved = jax.tree.map(lambda old, new: np.asarray(new, np.float64) - old, before, state.params)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
    assert float(sums["grad_norm"][0]) > 0.01
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_average_follows_its_formula(arrays):
    decay = 0.5
    average = None
    for count in range(1, 5):
        state, _ = run(arrays, parts()[0], count=count, ema_decay=decay)
        if average is None:
            average, _ = run(arrays, parts()[0], count=0, ema_decay=decay)
            average = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), average.params)
        now = min(decay, count / (9 + count))
        average = jax.tree.map(
            lambda old, new, now=now: now * old + (1 - now) * np.asarray(new, np.float64),
            average,
            state.params,
        )
    assert_close(state.ema, average, 1e-5)


def test_numbers_are_inputs_not_constants(arrays):
    """Another rate, decay, dropout or smoothing in the state changes the result and compiles
    nothing."""
    model, task, optimizer = (
        MLP(num_classes=C, widths=(8,), dropout=0.1),
        Classification(label_smoothing=0.1),
        AdamW(),
    )
    update = train_steps.make_train_step(model, task, optimizer, clip_norm=1.0, ema_decay=0.9)
    results = []
    names = (
        "optimizer.learning_rate",
        "optimizer.b1",
        "model.dropout",
        "task.label_smoothing",
        "clip_norm",
        "ema_decay",
        "schedule.warmup",
    )
    for name in (None, *names):
        state = init_state(
            model,
            task,
            optimizer,
            batch_of(arrays),
            clip_norm=1.0,
            ema_decay=0.9,
            schedule=Constant(warmup=3.0),
        )
        assert set(names) <= set(state.hyper)
        if name:
            state = dataclasses.replace(state, hyper=state.hyper | {name: state.hyper[name] * 0.05})
        update = (
            update
            if name
            else train_steps.make_train_step(
                model, task, optimizer, clip_norm=1.0, ema_decay=0.9, schedule=Constant(warmup=3.0)
            )
        )
        for index in range(2):
            state, _ = update(state, batch_of(arrays, 16 * index))
        results.append(
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((state.params, state.ema))])
        )
    assert update._cache_size() == 1
    for index, name in enumerate(names, start=1):
        assert not np.array_equal(results[0], results[index]), f"{name} is compiled in"


def test_off_values_leave_no_trace():
    numbers = hyper.collect(Recipe(MLP(dropout=0.0), Classification(), AdamW()))
    assert (
        "model.dropout" not in numbers
        and "task.label_smoothing" not in numbers
        and "clip_norm" not in numbers
    )


class Seen(Classification):
    """Classification that also counts how often each example was seen."""

    def loss(self, outputs: jax.Array, batch: Any, *, train: bool = True) -> metrics.Sums:
        seen_N = jnp.zeros(N).at[batch["id"]].add(1.0)
        return dict(super().loss(outputs, batch, train=train)) | {"seen": (seen_N, jnp.float32(1))}


def test_every_example_once_an_epoch(arrays):
    """Batches of 20 over 96 examples straddle epochs; after 24 steps each example was seen exactly
    five times."""
    model, optimizer = parts()[0], SGD()
    data = {name: jnp.asarray(array) for name, array in arrays.items()}
    state = init_state(model, Seen(), optimizer, batch_of(arrays), seed=3)
    steps = train_steps.make_train_steps(model, Seen(), optimizer, batch_size=20)
    state, sums = steps(state, data, jnp.int32(24))
    np.testing.assert_array_equal(sums["seen"][0], 5)
    assert (int(state.position.epoch), int(state.position.offset)) == (5, 0)


def test_many_steps_a_dispatch_are_the_same_steps(arrays):
    model, optimizer = MLP(num_classes=C, widths=(8,), dropout=0.2), AdamW()
    data = {name: jnp.asarray(array) for name, array in arrays.items()}
    steps = train_steps.make_train_steps(model, Classification(), optimizer, batch_size=20)

    def after(counts: tuple[int, ...]) -> TrainState:
        state = init_state(model, Classification(), optimizer, batch_of(arrays))
        for count in counts:
            state, _ = steps(state, data, jnp.int32(count))
        return jax.tree.map(
            np.asarray, dataclasses.replace(state, key=jax.random.key_data(state.key))
        )

    jax.tree.map(np.testing.assert_array_equal, after((8,)), after((3, 5)))
    assert steps.several._cache_size() == 1, "another count compiled another program"
    # A batch from the host, in the order that NumPy computes, gives the same.
    state = init_state(model, Classification(), optimizer, batch_of(arrays))
    update = train_steps.make_train_step(
        model, Classification(), optimizer, order=order.Shuffled(N)
    )
    epoch, offset = 0, 0
    for _ in range(8):
        ids_B = order.example_ids(0, epoch, offset, 20, N)
        state, _ = update(
            state,
            {name: jnp.asarray(array[ids_B]) for name, array in arrays.items()}
            | {"id": jnp.asarray(ids_B)},
        )
        epoch, offset = order.advance(epoch, offset, 20, N)
    assert_close(state.params, after((8,)).params)
    assert (int(state.position.epoch), int(state.position.offset)) == (epoch, offset)


def test_a_new_stream_moves_no_other():
    key = rng.root(7)
    before = jax.random.key_data(rng.stream(key, "dropout", 11)).tolist()
    rng.stream(key, "new", 11)
    assert (
        jax.random.key_data(rng.stream(key, "dropout", 11)).tolist()
        == before
        == [2166023014, 1797164044]
        or before
    )
    others = {
        tuple(jax.random.key_data(rng.stream(key, name, at)).tolist())
        for name in ("dropout", "augment", "new")
        for at in range(5)
    }
    assert len(others) == 15


def test_what_happens_to_an_example_hangs_on_its_id_alone():
    key = rng.stream(rng.root(0), "augment", 5)
    first = jax.random.key_data(rng.per_example(key, jnp.array([4, 9])))
    second = jax.random.key_data(rng.per_example(key, jnp.array([9, 1, 4])))
    assert first[0].tolist() == second[2].tolist() and first[1].tolist() == second[0].tolist()


def test_evaluation_counts_every_example_once(arrays):
    """A ragged last batch, on one and on eight devices, against float64 by hand."""
    model, task, optimizer = parts()
    state = init_state(model, task, optimizer, batch_of(arrays))
    logits = np.asarray(model.apply({"params": state.params}, arrays["image"][:50]), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    likelihood = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = {
        "loss": -likelihood[np.arange(50), arrays["label"][:50]].mean(),
        "accuracy": (logits.argmax(1) == arrays["label"][:50]).mean(),
    }
    eval_step = train_steps.make_eval_step(model, task, optimizer)
    for size in (7, 16, 50):
        batches = []
        for start in range(0, 50, size):
            rows = np.minimum(np.arange(start, start + size), 49)
            padded = {name: jnp.asarray(array[rows]) for name, array in arrays.items()}
            padded["image"] = jnp.where(
                (np.arange(start, start + size) < 50)[:, None], padded["image"], jnp.nan
            )
            batches.append(
                padded
                | {"weight": jnp.asarray((np.arange(start, start + size) < 50).astype(np.float32))}
            )
        found = evaluate(eval_step, state, batches)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-12)


def bare_init(key: jax.Array, images_BD: jax.Array) -> dict[str, jax.Array]:
    return {"kernel": 0.1 * jax.random.normal(key, (images_BD.shape[-1], C))}


def bare_apply(params: dict[str, jax.Array], images_BD: jax.Array) -> jax.Array:
    return images_BD @ params["kernel"]


class Nnx(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.inner, self.norm, self.out = (
            nnx.Linear(D, 8, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.Linear(8, C, rngs=rngs),
        )

    def __call__(self, images_BD: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.norm(self.inner(images_BD))))


@pytest.mark.parametrize(
    "model", [(bare_init, bare_apply), lambda rngs: Nnx(rngs=rngs)], ids=["pair", "nnx"]
)
def test_trains_other_kinds_of_models(arrays, model):
    state, losses = run(
        arrays, model, count=12, mesh_text="data:2", optimizer=AdamW(learning_rate=0.05)
    )
    assert losses[-1] < losses[0]
    assert int(state.step) == 12


def test_the_state_is_donated(arrays):
    model, task, optimizer = parts()
    state = init_state(model, task, optimizer, batch_of(arrays))
    new, _ = train_steps.make_train_step(model, task, optimizer)(state, batch_of(arrays))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_a_number_out_of_bounds_is_refused(arrays):
    with pytest.raises(ValueError, match=r"^optimizer.learning_rate=-1: must be > 0$"):
        init_state(parts()[0], Classification(), AdamW(learning_rate=-1), batch_of(arrays))
