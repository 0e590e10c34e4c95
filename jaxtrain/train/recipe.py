"""The recipe: what one step does, as a value; its numbers are fed to the step from
`TrainState.hyper` (see `hyper.py`)."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any

import jax

from jaxtrain import fields, messages, optimizers, precision, schedules
from jaxtrain.config.step_options import StepOptions
from jaxtrain.data.order import Order, Shuffled
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast, Traced, fields_of
from jaxtrain.horizon import Horizon
from jaxtrain.optimizers import FromOptax, Optimizer
from jaxtrain.schedules import Constant, FromFunction, Schedule
from jaxtrain.tasks import Task
from jaxtrain.tree import Batch

Prepare = Callable[[Batch], Batch]


@dataclasses.dataclass(frozen=True)
class Recipe(StepOptions):
    """What one step does: its parts, and the options of `StepOptions`, which are given by name."""

    model: Any
    task: Task
    optimizer: Optimizer
    schedule: Schedule = Constant(warmup=0.0)
    total_steps: Annotated[float, AtLeast(0), Traced()] = 0.0
    """Where the schedule ends; a constant rate and a function of the step need no end."""
    prepare: Prepare | None = None
    """What every batch goes through first, also in evaluation: casts, normalisation."""
    augment: Any = None
    """What training batches go through next, see `jaxtrain/augment/`."""
    order: Order = Shuffled()
    """In which order examples come, and how `TrainState.position` moves on."""

    def __post_init__(self) -> None:
        """`UserError` for an option that is out of its bounds or none of its choices."""
        object.__setattr__(self, "optimizer", optimizers.of(self.optimizer))
        object.__setattr__(self, "schedule", schedules.of(self.schedule))
        _check_rate_is_given_once(self.optimizer, self.schedule)
        for name in ("optimizer", "schedule", "task", "augment"):
            if fields.is_component(getattr(self, name)):
                fields.check(getattr(self, name), name)
        object.__setattr__(self, "schedule", _in_steps(self.schedule, self.total_steps))
        if not isinstance(self.total_steps, jax.Array) and self.total_steps == 0:
            object.__setattr__(self, "total_steps", _no_end(self.schedule))
        choices = {"precision": tuple(precision.POLICIES)}
        for field in fields_of(StepOptions):
            value, name = getattr(self, field.name), field.name
            allowed = choices.get(name) or typing.get_args(field.type)
            if allowed and isinstance(value, str) and value not in allowed:
                near = messages.did_you_mean(value, allowed)
                raise UserError(f"{name}={value!r}: must be one of {', '.join(allowed)}{near}")
            # Inside a step the numbers are traced, and were looked at when they were concrete.
            if not isinstance(value, jax.Array) and (problem := field.problem(value)):
                raise UserError(f"{name}={value}: {problem}")

    @property
    def dtype(self) -> Any:
        """What the model computes in."""
        return precision.POLICIES[self.precision].dtype

    def inputs(self, batch: Batch) -> Any:
        """What the model sees of a raw batch."""
        return self.task.inputs(batch if self.prepare is None else self.prepare(dict(batch)))


def _in_steps(schedule: Schedule, total: float) -> Schedule:
    """The schedule without horizons, as far as the recipe knows how long they are."""
    given = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    horizons = {name: value for name, value in given.items() if isinstance(value, Horizon)}
    units = {value.unit for value in horizons.values()}
    if not horizons or units & {"epochs", "tokens"} or isinstance(total, jax.Array):
        return schedule
    if total > 0:
        return schedules.resolve(schedule, total_steps=total, steps_per_epoch=math.nan)
    if "percent" in units:
        _no_end(schedule)
    steps = {name: float(value.value) for name, value in horizons.items() if value.unit == "steps"}
    return dataclasses.replace(schedule, **steps)


def _no_end(schedule: Schedule) -> float:
    """Any end, for a schedule that needs none."""
    if isinstance(schedule, Constant | FromFunction):
        return 1.0
    raise UserError(
        f"total_steps: not given, but schedule={type(schedule).__name__} ends there; give the"
        " length of the run, such as total_steps=1000"
    )


def _check_rate_is_given_once(optimizer: Optimizer, schedule: Schedule) -> None:
    if not isinstance(optimizer, FromOptax):
        return
    warmup = schedule.warmup.value if isinstance(schedule.warmup, Horizon) else schedule.warmup
    # Inside a step the number is traced, and was looked at when it was concrete.
    if type(schedule) is not Constant or (not isinstance(warmup, jax.Array) and warmup != 0):
        kind = type(schedule).__name__
        raise UserError(
            f"schedule={kind}: the optimizer is an Optax transformation, which sets its own rate;"
            " give it an Optax schedule and --schedule=constant without warm-up (in Python"
            " schedule=Constant()), or take an optimizer of jaxtrain.optimizers"
        )
