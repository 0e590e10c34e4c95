"""Optax transformations and functions of the step, given as they are: the same numbers as a loop
written by hand, and a line for what cannot be."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import config, optimizers, schedules
from jaxtrain.config import flags
from jaxtrain.config import record as run_record
from jaxtrain.data import Digits
from jaxtrain.errors import UserError
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD, AdamW, FromOptax
from jaxtrain.parallel import mesh
from jaxtrain.runner import build
from jaxtrain.runner.main import main
from jaxtrain.tasks import Regression
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import init_state, initial_numbers, initializer, place
from jaxtrain.train.steps import make_eval_step, make_train_step

BATCH = {
    "image": np.sin(np.arange(16 * 8, dtype=np.float32)).reshape(16, 8),
    "label": np.linspace(0, 1, 16, dtype=np.float32).reshape(16, 1),
}
TASK = Regression(target="label")


def init(key: Any, inputs: Any) -> Any:
    first, last = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (8, 16)) * 0.3, "b": jnp.zeros(16)},
        "head": {"w": jax.random.normal(last, (16, 1)) * 0.3, "b": jnp.zeros(1)},
    }


def apply(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


@pytest.fixture(autouse=True)
def as_people_write() -> Iterator[None]:
    """Models that are brought broadcast as NumPy does."""
    with jax.numpy_rank_promotion("allow"):
        yield


def by_hand(tx: Any, params: Any, steps: int, name: str = "") -> tuple[Any, Any]:
    """The loop of Optax's own documentation."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)

    def loss(params: Any) -> Any:
        return jnp.mean((apply(params, BATCH["image"]) - BATCH["label"]) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        extra = {} if name == "sam" else {"value": value}
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def trained(optimizer: Any, steps: int, **options: Any) -> tuple[Any, Any]:
    parts = (init, apply), TASK, optimizer
    state, step = init_state(*parts, BATCH, **options), make_train_step(*parts, **options)
    first, sums = jax.tree.map(jnp.copy, state.params), {}
    for _ in range(steps):
        state, sums = step(state, BATCH)
    return (first, state), sums


def kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


RATES = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 20)
TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "masked decay": lambda: optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=kernels),
        optax.scale_by_learning_rate(RATES),
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATES),
    "every second step": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "by labels": lambda: optax.multi_transform(
        {"kernel": optax.adam(1e-2), "bias": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "bias", params),
    ),
    "plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2, factor=0.5)
    ),
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
}
QUICK = ("adamw", "masked decay", "injected", "plateau", "sam")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in TRANSFORMATIONS
    ],
)
def test_the_same_numbers_as_a_loop_by_hand(name: str) -> None:
    tx = TRANSFORMATIONS[name]()
    (first, state), sums = trained(tx, 20)
    expected, _ = by_hand(tx, first, 20, name)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6),
        state.params,
        expected,
    )
    if name == "injected":
        assert float(sums["learning_rate"][0]) == pytest.approx(float(RATES(19)), rel=1e-5)
    else:
        assert "learning_rate" not in sums
    assert not any(key.startswith("optimizer") for key in state.hyper)
    if name in ("adamw", "adafactor", "by labels"):
        grid = mesh.make("fsdp:8")
        (_, spread), _ = trained(tx, 20, mesh=grid)
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6),
            spread.params,
            state.params,
        )
        moments = [leaf for leaf in jax.tree.leaves(spread.opt_state) if leaf.shape == (8, 16)]
        assert all("fsdp" in leaf.sharding.spec for leaf in moments)
        assert moments or name == "adafactor"


def test_multi_steps_itself_and_rates_and_frozen() -> None:
    (first, state), _ = trained(optax.MultiSteps(optax.sgd(0.1), 2), 1)
    jax.tree.map(np.testing.assert_array_equal, first, state.params)
    (first, state), _ = trained(
        FromOptax(
            transformation=optax.adam(1e-2), frozen=("hidden",), rates=(("b", 0.0), (".*", 1.0))
        ),
        2,
    )
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), first, state.params)
    assert moved == {"hidden": {"w": False, "b": False}, "head": {"w": True, "b": False}}


def test_schedule_free_parameters_are_averaged_for_evaluation() -> None:
    tx = optax.contrib.schedule_free_adamw(1e-2)
    (first, state), _ = trained(tx, 5)
    params, opt_state = by_hand(tx, first, 5)
    wanted = optax.contrib.schedule_free_eval_params(opt_state, params)
    found = optimizers.evaluation_params(optimizers.of(tx), state.opt_state, state.params)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6), found, wanted
    )
    sums = make_eval_step((init, apply), TASK, tx)(state, BATCH)
    loss = np.mean((np.asarray(apply(wanted, BATCH["image"])) - BATCH["label"]) ** 2)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(float(loss), rel=1e-4)


def test_its_averages_in_bf16_and_in_the_memory_of_the_host() -> None:
    (_, state), _ = trained(optax.adamw(1e-2), 1, optimizer_state="bf16")
    stored = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1]
    assert {leaf.dtype.name for leaf in stored} == {"bfloat16"}
    with pytest.raises(ValueError, match="^--optimizer_state=bf16: FromOptax keeps copies of"):
        trained(optax.contrib.schedule_free_sgd(0.1), 1, optimizer_state="bf16")
    with pytest.raises(ValueError, match="^--optimizer_state=bf16: FromOptax keeps copies of"):
        trained(optax.lbfgs(0.1, linesearch=None), 1, optimizer_state="bf16")
    accepted(optax.contrib.schedule_free_sgd(0.1), optimizer_state="fp32")  # the remedy
    recipe = Recipe((init, apply), TASK, optax.adamw(1e-2), offload="optimizer")
    placed = place(recipe, state, BATCH, mesh.make("fsdp:8")).state.opt_state
    assert {leaf.memory_kind for leaf in jax.tree.leaves(placed)} == {"pinned_host"}


@pytest.mark.parametrize(
    ("make", "message", "followed"),
    [
        (
            lambda: optax.lbfgs(),
            (
                "needs value_fn, a function that it can call again, which a step over batches does"
                " not have; take one that needs gradients, parameters and the loss only (of lbfgs:"
                " linesearch=None)"
            ),
            lambda: optax.lbfgs(0.1, linesearch=None),
        ),
        (
            lambda: optax.contrib.sophia(1e-3),
            "needs obj_fn, a function that it can call again",
            lambda: optax.polyak_sgd(),  # which needs the loss, too
        ),
        (
            lambda: optax.lookahead(optax.adam(1e-3), 5, 0.5),
            "optimizer: optax.lookahead needs",
            lambda: optax.adam(1e-3),
        ),
        (
            lambda: optax.masked(optax.sgd(0.1), {"other": True}),
            "this Optax transformation cannot update the parameters (",
            lambda: optax.masked(optax.sgd(0.1), kernels),
        ),
        (
            lambda: optax.GradientTransformation(lambda p: (), widened),
            "optimizer: this Optax transformation changes the structure or shapes",
            lambda: optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, s)),
        ),
        (
            lambda: AdamW,
            "optimizer=AdamW: a function or class; call it, such as AdamW(1e-3)",
            lambda: AdamW(1e-3),
        ),
        (
            lambda: optax.adamw,
            "optimizer=adamw: a function or class; call it, such as adamw(1e-3)",
            lambda: optax.adamw(1e-3),
        ),
        (
            lambda: "adamw",
            (
                "optimizer=str: not an optimizer of jaxtrain.optimizers, and no Optax"
                " transformation; give one, such as AdamW(1e-3)"
            ),
            lambda: AdamW(1e-3),
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(make: Any, message: str, followed: Any) -> None:
    with pytest.raises(UserError) as caught:
        init_state((init, apply), TASK, make(), BATCH)
    first = str(caught.value).splitlines()[0]
    assert message in first
    assert first.startswith("optimizer")
    accepted(followed())


def accepted(optimizer: Any, **options: Any) -> None:
    """Does all that `init_state` does before it compiles."""
    recipe = Recipe((init, apply), TASK, optimizers.of(optimizer), **options)
    jax.eval_shape(initializer(recipe, BATCH), initial_numbers(recipe), np.uint32(0))


def test_a_rate_is_never_applied_twice() -> None:
    tx = optax.adamw(RATES)
    message = (
        r"^schedule=Cosine: the optimizer is an Optax transformation, which sets its own rate; give"
        r" it an Optax schedule and --schedule=constant without warm-up \(in Python"
        r" schedule=Constant\(\)\), or take an optimizer of jaxtrain.optimizers$"
    )
    with pytest.raises(ValueError, match=message):
        init_state((init, apply), TASK, tx, BATCH, schedule=schedules.Cosine(warmup=2.0))
    with pytest.raises(ValueError, match="^schedule=Constant: the optimizer is"):
        init_state((init, apply), TASK, tx, BATCH, schedule=schedules.Constant(warmup=2.0))
    accepted(tx, schedule=schedules.Constant())  # the remedies
    accepted(AdamW(1e-2), schedule=schedules.Cosine(warmup=2.0), total_steps=20.0)


def test_a_function_of_the_step_is_a_multiplier() -> None:
    share = optax.cosine_decay_schedule(1.0, 20)
    (first, state), sums = trained(SGD(learning_rate=0.1), 20, schedule=share, total_steps=20.0)
    expected, _ = by_hand(optax.sgd(lambda step: 0.1 * share(step)), first, 20)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6),
        state.params,
        expected,
    )
    assert float(sums["learning_rate"][0]) == pytest.approx(0.1 * float(share(19)), rel=1e-5)
    (_, state), _ = trained(SGD(learning_rate=1.0), 1, schedule=optax.constant_schedule(1e-3))
    assert float(state.step) == 1


def widened(gradients: Any, state: Any, params: Any = None) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], gradients), state


def python_branch(step: Any) -> Any:
    return 1.0 if step < 10 else 0.1


@pytest.mark.parametrize(
    ("schedule", "message", "followed"),
    [
        (
            python_branch,
            "^schedule=python_branch: cannot be compiled as a function of the step",
            lambda step: jnp.where(step < 10, 1.0, 0.1),
        ),
        (
            lambda step: jnp.ones(3),
            r"^schedule=.*: gives \(3,\) for a step; must give one number(\n|$)",
            lambda step: jnp.ones(()),
        ),
        (
            schedules.Cosine,
            (
                "^schedule=Cosine: not a schedule of jaxtrain.schedules, and no function of the"
                r" step; call it: Cosine\(\)(\n|$)"
            ),
            schedules.Cosine(),
        ),
        (
            "cosine",
            (
                "^schedule=str: not a schedule of jaxtrain.schedules, and no function of the step;"
                r" give one, such as Cosine\(\)(\n|$)"
            ),
            schedules.Cosine(),
        ),
        (
            optax.cosine_decay_schedule(1e-3, 1000),
            (
                "^schedule=cosine_decay_schedule: is at most 0.001 in this run, and is multiplied"
                r" by learning_rate=0.01; give a function that peaks at 1, or, if it gives rates,"
                r" set the optimizer's learning_rate to 1(\n|$)"
            ),
            optax.cosine_decay_schedule(1.0, 1000),
        ),
        (
            lambda step: 1 - 0.1 * step,
            r"^schedule=.*: is -.* at step .*; must be >= 0(\n|$)",
            lambda step: jnp.maximum(1 - 0.1 * step, 0),
        ),
    ],
)
def test_what_is_no_schedule_is_said_in_a_line(schedule: Any, message: str, followed: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        init_state(
            (init, apply),
            TASK,
            SGD(learning_rate=0.01),
            BATCH,
            schedule=schedule,
            total_steps=100.0,
        )
    accepted(SGD(learning_rate=0.01), schedule=followed, total_steps=100.0)
    if "set the optimizer's learning_rate to 1" in str(caught.value):
        accepted(SGD(learning_rate=1.0), schedule=schedule, total_steps=100.0)


def experiment(**changes: Any) -> config.Run:
    given = {
        "name": "toy",
        "model": MLP(num_classes=3),
        "data": Digits(),
        "task": TASK,
        "optimizer": optax.adamw(1e-3),
        "steps": 10,
        "offers": {"optimizer": optimizers.NAMES | {"optax": optax.sgd(0.1)}},
    }
    return config.Run(**(given | changes))


def test_flags_of_a_run_with_an_optax_transformation() -> None:
    run = build.accepted(experiment())
    assert isinstance(run.optimizer, FromOptax)
    assert flags.parse(run, ["--optimizer=adamw", "--optimizer.learning_rate=0.1"]).optimizer == (
        AdamW(learning_rate=0.1)
    )
    assert isinstance(flags.parse(run, ["--optimizer=optax"]).optimizer, FromOptax)
    with pytest.raises(ValueError, match="learning_rate") as caught:
        flags.parse(run, ["--optimizer.learning_rate=0.1"])
    assert str(caught.value) == (
        "unknown flag --optimizer.learning_rate: optimizer 'FromOptax' has rates, frozen,"
        " and its transformation is set in Python only; learning_rate comes with --optimizer=sgd,"
        " --optimizer=momentum, --optimizer=nesterov, --optimizer=adam"
    )
    assert flags.parse(run, ["--optimizer=sgd", "--optimizer.learning_rate=0.1"])  # the remedy
    # The same in every process, other where a number differs, and so a run of it resumes.
    one, same, other = (
        run_record.to_json(build.accepted(experiment(optimizer=optax.adamw(rate))))["optimizer"]
        for rate in (1e-3, 1e-3, 1e-4)
    )
    assert "0x" not in str(one)
    assert one == same != other


@pytest.mark.parametrize(
    ("changes", "message", "followed"),
    [
        (
            {"optimizer": AdamW},
            "optimizer=AdamW: a class; give one of its kind, such as AdamW()",
            {"optimizer": AdamW()},
        ),
        (
            {"optimizer": "adamw"},
            "optimizer=str: not an optimizer of jaxtrain.optimizers",
            {"optimizer": AdamW(1e-3)},
        ),
        (
            {"optimizer": SGD(0.1), "schedule": python_branch},
            "schedule=python_branch: cannot be compiled",
            {"optimizer": SGD(0.1), "schedule": lambda step: jnp.where(step < 10, 1.0, 0.1)},
        ),
    ],
)
def test_a_run_of_what_is_no_optimizer_ends_in_a_line(
    changes: Any, message: str, followed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(experiment(**changes), [])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert build.accepted(experiment(**followed))
