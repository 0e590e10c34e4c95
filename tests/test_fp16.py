"""Training in float16: what overflows is skipped whole, counted, and forgotten; the scale is part
of the run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain
from jaxtrain.checkpoints import checkpoints
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.models import mlp
from jaxtrain.optimizers import AdamW
from jaxtrain.report.metrics_file import JsonlWriter, Writers
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.tasks import Classification
from jaxtrain.train import state, steps
from jaxtrain.train.metrics_log import Diverged, MetricsLog

PARTS = (mlp.MLP(widths=(8,), norm="batch"), Classification(), AdamW(learning_rate=0.01))
OPTIONS = {"precision": "fp16", "ema_decay": 0.9, "clip_norm": 1.0}
RANDOM = np.random.default_rng(0)
BATCHES = [
    {
        "image": RANDOM.normal(size=(8, 6)).astype(np.float32),
        "label": RANDOM.integers(0, 10, 8).astype(np.int32),
    }
    for _ in range(5)
]
OVERFLOWING = BATCHES[0] | {"image": np.full((8, 6), 1e6, np.float32)}


@pytest.fixture(scope="module")
def train() -> jaxtrain.train.steps.Update:
    return steps.make_train_step(*PARTS, **OPTIONS)


def initial_state() -> state.TrainState:
    """The state before the first step, with a scale that overflows nothing by itself."""
    now = state.init_state(*PARTS, BATCHES[0], **OPTIONS)
    return dataclasses.replace(
        now, scaling=dataclasses.replace(now.scaling, scale=jnp.float32(1024))
    )


def test_an_overflow_changes_nothing_but_the_scale_and_the_place(
    train: jaxtrain.train.steps.Update,
) -> None:
    before = jax.device_get(initial_state())
    after, sums = train(initial_state(), OVERFLOWING)
    for part in ("params", "opt_state", "collections", "ema"):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(getattr(after, part)),
            getattr(before, part),
        )
    assert (
        float(after.scaling.scale),
        int(after.scaling.skipped),
        int(after.step),
        int(after.position.offset),
    ) == (512.0, 1, 1, 8)
    assert {name: float(count) for name, (_, count) in sums.items()} == {
        "loss": 0,
        "accuracy": 0,
        "learning_rate": 0,
        "grad_norm": 0,
        "loss_scale": 1,
        "skipped": 1,
    }
    assert all(np.isfinite(jax.device_get(leaf)).all() for leaf in jax.tree.leaves(sums))


def test_a_run_with_overflows_is_the_run_without_them(train: jaxtrain.train.steps.Update) -> None:
    """A smaller scale moves gradients by the rounding of float16 at most."""
    one, other = initial_state(), initial_state()
    for index, batch in enumerate(BATCHES):
        one, _ = train(one, batch)
        other, _ = train(other, batch)
        if index % 2:
            other, _ = train(other, OVERFLOWING)
    assert int(other.scaling.skipped) == 2 and int(one.scaling.skipped) == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        jax.device_get(one.params),
        jax.device_get(other.params),
    )


def test_the_scale_is_restored(train: jaxtrain.train.steps.Update, tmp_path: Path) -> None:
    now, _ = train(initial_state(), OVERFLOWING)
    now, _ = train(now, BATCHES[1])
    kept = Checkpoints(tmp_path)
    kept.save(2, now, {}, wait=True)
    restored, _ = kept.restore(
        2, jax.eval_shape(lambda: state.init_state(*PARTS, BATCHES[0], **OPTIONS))
    )
    assert (
        float(restored.scaling.scale),
        int(restored.scaling.skipped),
        int(restored.scaling.good_steps),
    ) == (512.0, 1, 1)
    now, _ = train(now, BATCHES[2])
    restored, _ = train(restored, BATCHES[2])
    assert checkpoints.digest(now) == checkpoints.digest(restored)


def test_the_gradient_is_that_of_float32(train: jaxtrain.train.steps.Update) -> None:
    one, other = (
        steps.make_gradients(*PARTS, precision=name)(
            state.init_state(*PARTS, BATCHES[0], precision=name), BATCHES[0]
        )
        for name in ("fp16", "fp32")
    )
    for found, expected in zip(
        jax.tree.leaves(jax.device_get(one[0])),
        jax.tree.leaves(jax.device_get(other[0])),
        strict=True,
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_overflow_for_good_is_divergence(tmp_path: Path) -> None:
    writers = Writers(JsonlWriter(tmp_path / "metrics.jsonl"))
    log = MetricsLog(writers, Progress(9, live=False), every=4, step=0, total_steps=9, batch_size=1)
    log.take(
        1,
        {
            "loss": (0.0, 0.0),
            "grad_norm": (0.0, 0.0),
            "loss_scale": (2.0, 1.0),
            "skipped": (1.0, 1.0),
        },
    )
    with pytest.raises(Diverged) as caught:
        log.take(
            2,
            {
                "loss": (0.0, 0.0),
                "grad_norm": (0.0, 0.0),
                "loss_scale": (1.0, 1.0),
                "skipped": (1.0, 1.0),
            },
        )
    writers.close()
    message = (
        "step 2: gradients overflow float16 even at loss scale 1; lower --optimizer.learning_rate,"
        " or use bf16 or fp32"
    )
    assert str(caught.value) == message
