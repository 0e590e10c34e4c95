"""Every schedule against Optax's or a closed form, with every number traced, and the lengths that
do not fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import fields
from jaxtrain.horizon import Horizon
from jaxtrain.schedules import (
    NAMES,
    Constant,
    Cosine,
    Linear,
    Rsqrt,
    Schedule,
    Step,
    WarmupStableDecay,
    resolve,
)
from jaxtrain.train import hyper

TOTAL = 40
WARMUP = 8.0
STEPS = np.arange(TOTAL)
RAMP = optax.linear_schedule(1 / (WARMUP + 1), 1.0, int(WARMUP))


def warmed_up(after: optax.Schedule) -> optax.Schedule:
    """Optax's join of our warm-up, which begins at 1 / (warmup + 1) rather than at 0, and a
    schedule that counts from its end."""
    return optax.join_schedules([RAMP, after], [int(WARMUP)])


ROWS: list[tuple[Schedule, Any]] = [
    (Constant(warmup=0.0), optax.constant_schedule(1.0)),
    (Constant(warmup=WARMUP), warmed_up(optax.constant_schedule(1.0))),
    (
        Cosine(warmup=WARMUP, final=0.1),
        optax.warmup_cosine_decay_schedule(1 / (WARMUP + 1), 1.0, int(WARMUP), TOTAL, 0.1),
    ),
    (Cosine(warmup=0.0), optax.cosine_decay_schedule(1.0, TOTAL)),
    (
        Linear(warmup=WARMUP, final=0.2),
        warmed_up(optax.linear_schedule(1.0, 0.2, TOTAL - int(WARMUP))),
    ),
    (
        Step(warmup=0.0, first=20.0, every=10.0, factor=0.5),
        optax.piecewise_constant_schedule(1.0, {20: 0.5, 30: 0.5}),
    ),
    (
        WarmupStableDecay(warmup=WARMUP, decay=10.0),
        warmed_up(
            optax.join_schedules(
                [optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 10)], [22]
            )
        ),
    ),
    (
        WarmupStableDecay(warmup=0.0, decay=10.0, shape="cosine"),
        optax.join_schedules(
            [optax.constant_schedule(1.0), optax.cosine_decay_schedule(1.0, 10)], [30]
        ),
    ),
    (
        WarmupStableDecay(warmup=0.0, decay=10.0, shape="sqrt"),
        lambda step: 1 - np.sqrt(np.maximum(step - 30, 0) / 10),
    ),
    # The Transformer's: with timescale = warm-up it is sqrt(warmup / step) once warm.
    (
        Rsqrt(warmup=WARMUP, timescale=WARMUP, cooldown=0.0),
        lambda step: np.where(
            step < WARMUP, RAMP(step), np.sqrt(WARMUP / np.maximum(step, WARMUP))
        ),
    ),
    (
        Rsqrt(warmup=0.0, timescale=5.0, cooldown=10.0),
        lambda step: np.sqrt(5 / (5 + step)) * np.minimum(1, (TOTAL - step) / 10),
    ),
]


def traced(schedule: Schedule, steps: Any = STEPS, total_steps: float = TOTAL) -> np.ndarray:
    """The multipliers at many steps, from a program into which all numbers go as inputs."""

    def program(values: dict[str, jax.Array], step: jax.Array, total_steps: jax.Array) -> jax.Array:
        return hyper.bind(schedule, values).multiplier(step, total_steps)

    values = {name: jnp.float32(value) for name, value in hyper.collect(schedule).items()}
    return np.asarray(
        jax.jit(jax.vmap(program, in_axes=(None, 0, None)))(
            values, jnp.asarray(steps, jnp.int32), jnp.int32(total_steps)
        )
    )


@pytest.mark.parametrize(
    ("schedule", "reference"),
    ROWS,
    ids=[f"{type(row[0]).__name__}-{index}" for index, row in enumerate(ROWS)],
)
def test_equals_its_reference_with_every_number_traced(schedule: Schedule, reference: Any) -> None:
    expected = np.asarray([reference(step) for step in STEPS], np.float32)
    found = traced(schedule)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    constants = [float(schedule.multiplier(int(step), TOTAL)) for step in STEPS[::7]]
    np.testing.assert_allclose(constants, expected[::7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total_steps", [1, 2, 37, 100_000])
def test_defaults_fit_runs_of_any_length(name: str, total_steps: int) -> None:
    schedule = resolve(NAMES[name], total_steps=total_steps, steps_per_epoch=11.25)
    fields.check(schedule)
    found = traced(schedule, np.unique(np.linspace(0, total_steps - 1, 50, dtype=int)), total_steps)
    # No update is wasted: neither the first nor the last has the rate 0.
    assert np.all(found > 0)
    assert np.all(found <= 1)
    assert not any(isinstance(value, Horizon) for value in dataclasses.asdict(schedule).values())


def test_horizons_become_steps() -> None:
    schedule = WarmupStableDecay(
        warmup=Horizon(2, "epochs"), decay=Horizon(10, "percent"), final=0.1
    )
    assert resolve(schedule, total_steps=1000, steps_per_epoch=12.5) == WarmupStableDecay(
        25.0, 100.0, 0.1
    )
    assert resolve(Cosine(7.5), total_steps=10, steps_per_epoch=1) == Cosine(7.5)


def test_nothing_of_the_run_is_left_after_percentages_that_fill_it() -> None:
    full = WarmupStableDecay(warmup=Horizon(30, "percent"), decay=Horizon(70, "percent"))
    assert traced(resolve(full, total_steps=TOTAL, steps_per_epoch=1)).max() == pytest.approx(
        1.0, abs=0.05
    )


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (
            Cosine(warmup=Horizon(200)),
            (
                "--schedule.warmup=200steps: 200 steps do not fit into a run of 100; shorten them"
                " or write e.g. 5%"
            ),
        ),
        (
            WarmupStableDecay(warmup=Horizon(3, "epochs"), decay=Horizon(80, "percent")),
            (
                "--schedule.warmup=3epochs and --schedule.decay=80%: 110 steps do not fit into a"
                " run of 100; shorten them or write e.g. 5%"
            ),
        ),
        (
            Rsqrt(warmup=0.0, cooldown=101.0),
            "--schedule.cooldown=101.0: 101 steps do not fit into a run of 100",
        ),
        (Linear(warmup=-1.0), "--schedule.warmup=-1.0: must be >= 0; e.g. 200, 2epochs or 5%"),
        (
            Step(every=Horizon(0)),
            "--schedule.every=0steps: must be > 0; to drop only once, write 100%",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_errors(schedule: Schedule, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(schedule, total_steps=100, steps_per_epoch=10)
    assert text in str(caught.value)
