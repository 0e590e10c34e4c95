"""Learning-rate schedules: pure multipliers in 0..1 of the peak rate, whose every number may be a
tracer.

Steps count from 0. All warm up alike: step s has the share (s + 1) / (warmup + 1), so the first
update already moves, and the peak is reached at s = warmup, where what follows begins. Shapes after
it are functions of the step and `total_steps`, evaluated at s, so the last update (s = total_steps
- 1) still moves too. Optax's schedules branch in Python on their horizons, hence these.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.fields import Between, Length, Probability, Traced
from jaxtrain.horizon import Horizon, Steps

Number = float | jax.Array
AnySchedule = TypeVar("AnySchedule", bound="Schedule")
MOST_OF_RATES = 0.1
"""A function of the step whose largest value is this or less gives rates, not multipliers."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A multiplier of the learning rate as a function of the step."""

    warmup: Length = Horizon(5, "percent")
    """How long the rate rises linearly to its peak (steps, epochs or percent of the run)."""

    def multiplier(self, step: Number, total_steps: Number) -> jax.Array:
        """The share of the peak rate at `step`, a float32 scalar in 0..1.

        >>> schedule = resolve(Linear(warmup=1.0), total_steps=5, steps_per_epoch=5)
        >>> [round(float(schedule.multiplier(step, 5)), 2) for step in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
        """
        step = _float(step)
        ramp = jnp.minimum(1.0, (step + 1) / (_float(self.warmup) + 1))
        return ramp * self.after_warmup(step, _float(total_steps))

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        """The shape without its warm-up; 1 for every step before the warm-up's end."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate throughout, after an optional warm-up."""

    warmup: Length = Horizon(0)

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        """1 at every step."""
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final` at the end of the run."""

    final: Probability = 0.0
    """The share of the peak rate at the end of the run."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        return _fall(_half_cosine(_progress(step, _float(self.warmup), total_steps)), self.final)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from the peak to `final` at the end of the run."""

    final: Probability = 0.0
    """The share of the peak rate at the end of the run."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        return _fall(1 - _progress(step, _float(self.warmup), total_steps), self.final)


@dataclasses.dataclass(frozen=True)
class Rsqrt(Schedule):
    """One over the square root of the steps since the warm-up, and a linear cool-down at the
    end."""

    timescale: Length = Horizon(5, "percent")
    """How slowly it falls: after three timescales the rate is halved. Equal to `warmup` it is the
    Transformer's schedule."""

    cooldown: Length = Horizon(0)
    """How long the rate falls linearly to `final` at the end of the run."""

    final: Probability = 0.0
    """The factor that the cool-down ends with."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        # A timescale under one step, as 5% of a very short run, would halve the rate within the
        # first update.
        timescale = jnp.maximum(_float(self.timescale), 1.0)
        shape = jax.lax.rsqrt(1 + jnp.maximum(step - _float(self.warmup), 0.0) / timescale)
        return shape * _fall(
            1 - _progress(step, total_steps - _float(self.cooldown), total_steps), self.final
        )


@dataclasses.dataclass(frozen=True)
class Step(Schedule):
    """Drops by a factor at `first` and then after each `every`: at 50% and 75% by default, as for
    CIFAR in the ResNet paper."""

    first: Length = Horizon(50, "percent")
    """When the rate drops for the first time."""

    every: Length = Horizon(25, "percent")
    """How long after a drop the next one comes."""

    factor: Annotated[float, Between(0, 1), Traced()] = 0.1
    """What the rate is multiplied by at each drop."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        drops = jnp.floor((step - _float(self.first)) / _float(self.every)) + 1
        return jnp.power(_float(self.factor), jnp.maximum(drops, 0.0))


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, then the peak rate, then a fall to `final` at the end: the trunk can be prolonged or
    branched."""

    decay: Length = Horizon(20, "percent")
    """How long the fall at the end lasts."""

    final: Probability = 0.0
    """The share of the peak rate at the end of the run."""

    shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """How the rate falls; sqrt is 1 - sqrt(progress)."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        done = _progress(step, total_steps - _float(self.decay), total_steps)
        if self.shape == "cosine":
            return _fall(_half_cosine(done), self.final)
        return _fall(1 - (jnp.sqrt(done) if self.shape == "sqrt" else done), self.final)


@dataclasses.dataclass(frozen=True)
class FromFunction(Schedule):
    """Any function of the step, such as one of Optax's: the multiplier of the peak rate."""

    warmup: Length = Horizon(0)
    function: Callable[[jax.Array], Number] | None = None
    """From the step, an int32 scalar, to the multiplier."""

    in_python: ClassVar[str] = "function"
    """The field that makes it what it is, and that no flag can set."""

    def after_warmup(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        assert self.function is not None
        return _float(self.function(step.astype(jnp.int32)))

    def check(self, *, learning_rate: float, total_steps: float) -> None:
        """`UserError` if a value within the run is no multiplier, or if all are so small that they
        must be rates.
        """
        # Where nobody said how long the run is, up to where schedules are over.
        last = total_steps - 1 if total_steps > 1 else 1e6
        steps = sorted({round(last * share**4) for share in np.linspace(0, 1, 33)})
        with jax.ensure_compile_time_eval():
            values = [float(self.multiplier(jnp.int32(step), total_steps)) for step in steps]
        name = _name(self.function)
        for step, value in zip(steps, values, strict=True):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"schedule={name}: is {value:g} at step {step}; must be >= 0")
        if max(values) <= MOST_OF_RATES and learning_rate != 1:
            raise UserError(
                f"schedule={name}: is at most {max(values):g} in this run, and is multiplied by"
                f" learning_rate={learning_rate:g}; give a function that peaks at 1, or, if it"
                " gives rates, set the optimizer's learning_rate to 1"
            )


def of(given: Any) -> Schedule:
    """What was given as a schedule, as one of ours: a function of the step is a multiplier.

    >>> halves = resolve(of(lambda step: 0.5**step), total_steps=10, steps_per_epoch=1)
    >>> float(halves.multiplier(2, 10))
    0.25

    `UserError` for what is neither, or cannot be traced.
    """
    if isinstance(given, Schedule):
        return given
    kind = _name(given) if callable(given) else type(given).__name__
    if not callable(given) or isinstance(given, type):
        hint = f"call it: {kind}()" if isinstance(given, type) else "give one, such as Cosine()"
        raise UserError(
            f"schedule={kind}: not a schedule of jaxtrain.schedules, and no function of the"
            f" step; {hint}"
        )
    try:
        value = jax.eval_shape(given, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:  # whatever the function says of a step that is not known yet
        said = str(error).splitlines()[0][:120]
        raise UserError(
            f"schedule={kind}: cannot be compiled as a function of the step ({said}); write it"
            " with jax.numpy, and jnp.where in place of if"
        ) from error
    if getattr(value, "shape", None) != ():
        shape = getattr(value, "shape", type(value).__name__)
        raise UserError(f"schedule={kind}: gives {shape} for a step; must give one number")
    function: Any = given
    return FromFunction(function=function)


def resolve(
    schedule: AnySchedule,
    *,
    total_steps: float,
    steps_per_epoch: float,
    tokens_per_step: float | None = None,
) -> AnySchedule:
    """The same schedule with every horizon as a number of steps.

    >>> resolve(Cosine(warmup=Horizon(2, "epochs")), total_steps=100, steps_per_epoch=10)
    Cosine(warmup=20.0, final=0.0)

    `UserError` if a length is negative, or the warm-up and what must follow it do not fit into the
    run.
    """
    given = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    steps = {
        name: Steps(
            value.steps(
                total_steps=total_steps,
                steps_per_epoch=steps_per_epoch,
                tokens_per_step=tokens_per_step,
            )
        )
        for name, value in given.items()
        if isinstance(value, Horizon)
    }
    resolved = dataclasses.replace(schedule, **steps)
    lengths = [name for name in ("warmup", "decay", "cooldown") if name in given]
    for name in [*lengths, "timescale", "first", "every"]:
        if name in given and getattr(resolved, name) < 0:
            raise UserError(
                f"--schedule.{name}={given[name]}: must be >= 0; e.g. 200, 2epochs or 5%"
            )
    if isinstance(resolved, Step) and resolved.every == 0:
        raise UserError(
            f"--schedule.every={given['every']}: must be > 0; to drop only once, write 100%"
        )
    needed = sum(getattr(resolved, name) for name in lengths)
    # Percentages that add up to 100% may exceed the run by a rounding error.
    if needed > total_steps * (1 + 1e-6):
        text = " and ".join(
            f"--schedule.{name}={given[name]}" for name in lengths if getattr(resolved, name) > 0
        )
        raise UserError(
            f"{text}: {needed:g} steps do not fit into a run of {total_steps:g}; shorten them or"
            " write e.g. 5%"
        )
    return resolved


NAMES: dict[str, Schedule] = {
    "constant": Constant(),
    "cosine": Cosine(),
    "linear": Linear(),
    "rsqrt": Rsqrt(),
    "step": Step(),
    "warmup_stable_decay": WarmupStableDecay(),
}


def _name(function: Any) -> str:
    """What messages call a function: its maker's name if it was made by one, as Optax's are."""
    name = getattr(function, "__qualname__", type(function).__name__)
    maker, made, own = name.rpartition(".<locals>.")
    return (maker.rpartition(".")[2] if made and own != "<lambda>" else own) or name


def _float(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _progress(step: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """How far `step` is from begin to end, in 0..1; a stretch shorter than a step counts as one
    step."""
    return jnp.clip((step - begin) / jnp.maximum(end - begin, 1.0), 0.0, 1.0)


def _half_cosine(done: jax.Array) -> jax.Array:
    # The same as (1 + cos(pi done)) / 2, which in float32 is 0 for the last updates of a long run.
    return jnp.sin(0.5 * jnp.pi * (1 - done)) ** 2


def _fall(share: jax.Array, final: Number) -> jax.Array:
    """A share that goes from 1 to 0, made to end at `final`."""
    return final + (1 - final) * share
