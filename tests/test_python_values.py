"""Components made in Python are held to what flags are held to: types, bounds, whole steps, and
numbers that float32 can hold. Each remedy is followed."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain import adapters, config, fields
from jaxtrain.config import flags
from jaxtrain.data import Digits, Images
from jaxtrain.data.sources.arrays import Arrays
from jaxtrain.errors import UserError
from jaxtrain.fields import Count, Positive
from jaxtrain.horizon import Horizon
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD, Adafactor, AdamW
from jaxtrain.runner import build
from jaxtrain.schedules import Constant, Cosine, Linear, WarmupStableDecay, resolve
from jaxtrain.tasks import Classification
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import initial_numbers

TENTH = (
    "steps must be a whole number; for a part of the run write e.g. 10% (in Python Horizon(10,"
    ' "percent"))'
)
SMALL = "is 0 in float32, which the step computes in; must be at least 1.2e-38"


def run_with(**changes: Any) -> config.Run:
    parts = {
        "model": MLP(num_classes=3),
        "data": Digits(),
        "task": Classification(),
        "optimizer": AdamW(),
        "steps": 100,
    }
    return config.Run(name="toy", **(parts | changes))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "part of a step": ({"schedule": Cosine(warmup=0.1)}, f"schedule.warmup=0.1: {TENTH}"),
    "a half": (
        {"schedule": Cosine(warmup=2.5)},
        (
            "schedule.warmup=2.5: steps must be a whole number; for a part of the run write e.g. 5%"
            ' (in Python Horizon(5, "percent"))'
        ),
    ),
    "horizon of parts": (
        {"schedule": Cosine(warmup=Horizon(0.1))},
        f"schedule.warmup=0.1steps: {TENTH}",
    ),
    "text": (
        {"schedule": Cosine(warmup="10%")},
        (
            'schedule.warmup=10%: must be steps or a horizon such as Horizon(5, "percent"), not a'
            " str"
        ),
    ),
    "unit": (
        {"schedule": Cosine(warmup=Horizon(3, "weeks"))},  # pyright: ignore[reportArgumentType]
        "schedule.warmup=3weeks: the unit 'weeks' is none of steps, epochs, tokens, percent",
    ),
    "percent": (
        {"schedule": Linear(warmup=Horizon(150, "percent"))},
        "schedule.warmup=150%: must be at most 100%",
    ),
    "choice": (
        {"schedule": WarmupStableDecay(shape="square")},
        "schedule.shape=square: must be one of linear, sqrt, cosine",
    ),
    "rate as text": (
        {"optimizer": AdamW(learning_rate="1e-3")},
        "optimizer.learning_rate=1e-3: must be a number, not a str",
    ),
    "rate as a function": (
        {"optimizer": AdamW(learning_rate=abs)},
        (
            "optimizer.learning_rate=<built-in function abs>: must be a number, not a"
            " builtin_function_or_method; a function of the step is the run's schedule=, a factor"
            " of the rate"
        ),
    ),
    "no rate": (
        {"optimizer": AdamW(learning_rate=None)},
        "optimizer.learning_rate=none: must not be None",
    ),
    "rate that is 0": (
        {"optimizer": AdamW(learning_rate=1e-46)},
        f"optimizer.learning_rate=1e-46: {SMALL}",
    ),
    "subnormal": ({"optimizer": SGD(weight_decay=1e-40)}, f"optimizer.weight_decay=1e-40: {SMALL}"),
    "infinite rate": (
        {"optimizer": SGD(learning_rate=1e39)},
        (
            "optimizer.learning_rate=1e39: is too large for float32, which the step computes in;"
            " must be < 3.4e+38"
        ),
    ),
    "decay that is 1": (
        {"optimizer": AdamW(b2=0.9999999999)},
        (
            "optimizer.b2=0.9999999999: is 1 in float32, which the step computes in; must be"
            " 0 <= value < 1 there"
        ),
    ),
    "rate of NumPy": (
        {"optimizer": AdamW(learning_rate=np.float32(-1))},
        "optimizer.learning_rate=-1.0: must be > 0",
    ),
    "not a number": (
        {"optimizer": AdamW(learning_rate=float("nan"))},
        "optimizer.learning_rate=nan: must be finite",
    ),
    "one pattern": (
        {"optimizer": AdamW(frozen="bias")},
        "optimizer.frozen=bias: must be a tuple, such as ('bias',)",
    ),
    "rules of a dict": (
        {"optimizer": AdamW(rates={"bias": 1.0})},
        "optimizer.rates={'bias': 1.0}: must be a tuple, such as (('bias', 1.0),)",
    ),
    "a rule without value": (
        {"optimizer": AdamW(rates=("bias",))},
        "optimizer.rates=bias: item 1 ('bias'): must be a tuple, such as ('bias', 1.0)",
    ),
    "rules as flags have them": (
        {"optimizer": AdamW(rates=("bias=0.5",))},
        "optimizer.rates=bias=0.5: item 1 ('bias=0.5'): must be a tuple, such as ('bias', 0.5)",
    ),
    "half a rule": (
        {"optimizer": AdamW(rates=(("bias",),))},
        "optimizer.rates=bias: item 1 (('bias',)): must have 2 items, such as ('bias', 1.0)",
    ),
    "one side": (
        {"data": Images(path="pictures", size=32)},
        "data.size=32: must be a tuple, such as (32, 32)",
    ),
    "part of a count": (
        {"optimizer": Adafactor(min_factored_dim=2.5)},
        "optimizer.min_factored_dim=2.5: must be a whole number, not a float",
    ),
    "yes": (
        {"optimizer": SGD(nesterov="yes")},
        "optimizer.nesterov=yes: must be True or False, not a str",
    ),
    "smoothing": (
        {"task": Classification(label_smoothing=1.5)},
        "task.label_smoothing=1.5: must be in 0..1",
    ),
}


RATES = {"optimizer": AdamW(rates=(("bias", 1.0),))}
TENTH_OF_RUN = {"schedule": Cosine(warmup=Horizon(10, "percent"))}
FOLLOWED: dict[str, tuple[dict[str, Any], ...]] = {
    "part of a step": (TENTH_OF_RUN, {"schedule": Cosine(warmup=1)}),
    "a half": ({"schedule": Cosine(warmup=Horizon(5, "percent"))}, {"schedule": Cosine(warmup=2)}),
    "horizon of parts": (TENTH_OF_RUN, {"schedule": Cosine(warmup=Horizon(1))}),
    "text": ({"schedule": Cosine(warmup=Horizon(5, "percent"))}, {"schedule": Cosine(warmup=10)}),
    "unit": tuple(
        {"schedule": Cosine(warmup=Horizon(3, unit))} for unit in ("steps", "epochs", "percent")
    ),
    "percent": ({"schedule": Linear(warmup=Horizon(100, "percent"))},),
    "choice": tuple(
        {"schedule": WarmupStableDecay(shape=shape)} for shape in ("linear", "sqrt", "cosine")
    ),
    "rate as text": ({"optimizer": AdamW(learning_rate=1e-3)},),
    "rate as a function": ({"optimizer": AdamW(learning_rate=0.1), "schedule": abs},),
    "no rate": ({"optimizer": AdamW(learning_rate=1e-3)},),
    "rate that is 0": ({"optimizer": AdamW(learning_rate=1.2e-38)},),
    "subnormal": ({"optimizer": SGD(weight_decay=1.2e-38)}, {"optimizer": SGD(weight_decay=0)}),
    "infinite rate": ({"optimizer": SGD(learning_rate=3.39e38)},),
    "decay that is 1": ({"optimizer": AdamW(b2=0.9999999)}, {"optimizer": AdamW(b2=0)}),
    "rate of NumPy": ({"optimizer": AdamW(learning_rate=np.float32(1))},),
    "not a number": ({"optimizer": AdamW(learning_rate=1.0)},),
    "one pattern": ({"optimizer": AdamW(frozen=("bias",))},),
    "rules of a dict": (RATES,),
    "a rule without value": (RATES,),
    "rules as flags have them": ({"optimizer": AdamW(rates=(("bias", 0.5),))},),
    "half a rule": (RATES,),
    "one side": ({"data": Images(path="pictures", size=(32, 32))},),
    "part of a count": ({"optimizer": Adafactor(min_factored_dim=2)},),
    "yes": ({"optimizer": SGD(nesterov=True)}, {"optimizer": SGD(nesterov=False)}),
    "smoothing": tuple({"task": Classification(label_smoothing=s)} for s in (0, 0.5, 1)),
}
"""What the messages of `WRONG` say to write instead."""


@pytest.mark.parametrize("name", WRONG)
def test_its_remedies_are_accepted(name: str) -> None:
    assert FOLLOWED.keys() == WRONG.keys()
    for changes in FOLLOWED[name]:
        run = build.accepted(flags.parse(run_with(**changes), []))
        schedule = resolve(run.schedule, total_steps=100, steps_per_epoch=10)
        recipe = Recipe(run.model, run.task, run.optimizer, schedule=schedule, total_steps=100.0)
        initial_numbers(recipe)


@pytest.mark.parametrize("name", WRONG)
def test_a_run_is_held_to_what_flags_are_held_to(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        flags.parse(run_with(**changes), [])
    assert str(caught.value) == f"--{message}"
    parts = {"optimizer": AdamW(), "task": Classification()} | changes
    if parts.pop("data", None):
        return
    with pytest.raises(UserError) as caught:
        Recipe(MLP(num_classes=3), total_steps=100.0, **parts)
    family, rest = message.split("=", 1)
    assert str(caught.value).startswith(f"{family}=")
    assert str(caught.value).endswith(rest.split(": ", 1)[1])


@pytest.mark.parametrize(
    ("changes", "line", "followed"),
    [
        (
            {"eval_every": 100},
            '--eval_every=100: must be a horizon such as Horizon(5, "percent"), not an int',
            {"eval_every": Horizon(5, "percent")},
        ),
        (
            {"batch_size": 32.0},
            "--batch_size=32: must be a whole number, not a float",
            {"batch_size": 32},
        ),
        ({"steps": "100"}, "--steps=100: must be a whole number, not a str", {"steps": 100}),
        ({"seed": None}, "--seed=none: must not be None", {"seed": 0}),
        ({"clip_norm": 1e-46}, f"--clip_norm=1e-46: {SMALL}", {"clip_norm": 1.2e-38}),
        ({"mesh": ("data:1",)}, "--mesh=data:1: must be a text, not a tuple", {"mesh": "data:1"}),
        (
            {"shard": ("head=data:-",)},
            (
                "--shard=head=data:-: item 1 ('head=data:-'): must be a tuple, such as ('head',"
                " 'data:-')"
            ),
            {"shard": (("head", "data:-"),)},
        ),
    ],
)
def test_the_fields_of_a_run_itself(
    changes: dict[str, Any], line: str, followed: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        flags.parse(run_with(**changes), [])
    assert str(caught.value) == line
    flags.parse(run_with(**followed), [])


@pytest.mark.parametrize(
    ("argument", "line", "followed"),
    [
        (
            "--optimizer.learning_rate=1e-46",
            f"--optimizer.learning_rate=1e-46: {SMALL}",
            "--optimizer.learning_rate=1.2e-38",
        ),
        (
            "--optimizer.b2=0.9999999999",
            (
                "--optimizer.b2=0.9999999999: is 1 in float32, which the step computes in; must"
                " be 0 <= value < 1 there"
            ),
            "--optimizer.b2=0.9999999",
        ),
    ],
)
def test_flags_know_what_float32_holds(argument: str, line: str, followed: str) -> None:
    with pytest.raises(UserError) as caught:
        flags.parse(run_with(), [argument])
    assert str(caught.value) == line
    flags.parse(run_with(), [followed])


def test_the_remedies_work() -> None:
    right = {
        "schedule": Cosine(warmup=Horizon(10, "percent")),
        "optimizer": AdamW(frozen=("bias",), rates=(("bias", 1.0), (".*", 2.0)), b2=0.999999),
        "eval_every": Horizon(5, "percent"),
    }
    run = flags.parse(run_with(**right), [])
    assert flags.parse(run, ["--schedule.warmup=10%"]).schedule == run.schedule
    numbers = initial_numbers(
        Recipe(run.model, run.task, run.optimizer, schedule=run.schedule, total_steps=50.0)
    )
    assert numbers["schedule.warmup"] == 5.0
    # What horizons come to need not be whole, nor does a number of NumPy's be Python's.
    numbers = initial_numbers(
        Recipe(
            run.model,
            run.task,
            SGD(learning_rate=np.float32(0.5)),
            schedule=Cosine(warmup=Horizon(5, "percent")),
            total_steps=50.0,
        )
    )
    assert (numbers["schedule.warmup"], numbers["optimizer.learning_rate"]) == (2.5, 0.5)
    for number in (jnp.float32(0.5), 1, np.float64(0.5), 1.2e-38):
        fields.check(SGD(learning_rate=number), "optimizer")


def test_a_schedule_that_falls_needs_its_end() -> None:
    """Without one it was over after the first step, and the rate 0 from then on."""
    parts = MLP(num_classes=3), Classification(), AdamW()
    line = (
        r"^total_steps: not given, but schedule=Cosine ends there; give the length of the run, such"
        r" as total_steps=1000$"
    )
    for warmup in (2.0, Horizon(5, "percent")):
        with pytest.raises(UserError, match=line):
            Recipe(*parts, schedule=Cosine(warmup=warmup))
        Recipe(*parts, schedule=Cosine(warmup=warmup), total_steps=1000)
    assert Recipe(*parts, schedule=Constant(warmup=Horizon(9))).schedule.warmup == 9.0
    assert Recipe(*parts).total_steps == 1.0


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A component that somebody annotated for themselves."""

    width: int = None  # type: ignore[assignment]
    depth: Count = 2
    rate: Positive = 0.1


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """An annotation that only type checkers can read."""

    net: "Nowhere" = 3  # type: ignore[name-defined]  # noqa: F821
    rate: Positive = 0.1


def test_what_others_annotate_is_not_taken_at_its_word_but_for_its_bounds() -> None:
    assert list(fields.out_of_bounds(Theirs())) == []
    assert list(fields.out_of_bounds(Theirs(depth=0))) == [("depth", 0, "must be >= 1")]
    assert [field.name for field in fields.fields_of(Unresolved())] == ["net", "rate"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"steps": 2**31},
            (
                "--steps=2147483648: 2147483648 steps are more than are counted; must be at most"
                " 2147483647"
            ),
        ),
        (
            {"steps": None, "epochs": 1e12},
            (
                "--epochs=1e12: 7812500000000 steps are more than are counted; must be at most"
                " 2147483647"
            ),
        ),
    ],
)
def test_more_steps_than_int32_counts(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        build.lengths(run_with(**changes), 1000)
    assert str(caught.value) == line
    assert build.lengths(run_with(steps=2**31 - 1), 1000).total == 2**31 - 1


@pytest.mark.parametrize(
    ("family", "given"), [("task", Classification), ("schedule", Cosine), ("data", Digits)]
)
def test_a_class_in_place_of_its_instance(family: str, given: type) -> None:
    line = f"^{family}={given.__name__}: a class; give one of its kind, such as {given.__name__}"
    with pytest.raises(UserError, match=line):
        build.accepted(run_with(**{family: given}))
    build.accepted(run_with(**{family: given()}))


def test_a_class_of_nnx_is_a_model_and_one_of_linen_is_not() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, width: int = 3) -> None:
            self.dense = nnx.Linear(2, width, rngs=rngs)

    assert build.accepted(run_with(model=Net)).model is Net
    with pytest.raises(UserError, match=r"^model=MLP: a class; give a module, such as MLP\(\)"):
        adapters.functions(build.accepted(run_with(model=MLP)).model)


def test_an_average_that_would_never_move() -> None:
    with pytest.raises(UserError, match=r"^--ema_decay=0.9999999999: is 1 in float32"):
        flags.parse(run_with(ema_decay=0.9999999999), [])
    flags.parse(run_with(ema_decay=0.9999999), [])


def test_what_numpy_has_besides_numbers_of_python_is_refused_with_a_remedy() -> None:
    assert fields.misfit(np.int64(3), int) == (
        "must be a whole number of Python, not an int64; write int(3)"
    )
    assert fields.misfit(np.array([0.1, 0.2]), float) == "must be a number, not 2 of them"
    assert fields.misfit(np.array(0.1), float) is None
    with pytest.raises(UserError, match=r"^arrays: a masked array of float64 \(2, 1\), whose mask"):
        Arrays.of({"x": np.ma.masked_array([[1.0], [2.0]], [[False], [True]])}).open()
    filled = {"x": np.ma.masked_array([[1.0], [2.0]], [[False], [True]]).filled()}
    assert Arrays.of({**filled, "weight": np.array([1, 0])}, test="").open().notes == ()


@pytest.mark.parametrize("family", ["model", "data", "task", "optimizer", "schedule"])
def test_a_part_that_is_none_is_refused_by_its_name(family: str) -> None:
    parts: dict[str, Any] = {"model": MLP(num_classes=3), "data": Arrays.of({"x": np.zeros(3)})}
    parts |= {"task": Classification(), "optimizer": SGD(0.1), family: None}
    with pytest.raises(UserError, match=rf"^{family}=None: a run needs one; give "):
        build.accepted(config.Run(name="toy", steps=1, batch_size=1, **parts))
    parts |= {family: run_with(schedule=Constant(warmup=0.0)).__dict__[family]}
    build.accepted(config.Run(name="toy", steps=1, batch_size=1, **parts))
