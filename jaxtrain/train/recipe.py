"""The recipe: what one step does, as a value; its numbers are fed to the step from
`TrainState.hyper` (see `hyper.py`)."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Annotated, Any

import jax

from jaxtrain import messages, precision
from jaxtrain.config.step_options import StepOptions
from jaxtrain.data.order import Order, Shuffled
from jaxtrain.errors import UserError
from jaxtrain.fields import Above, Traced, fields_of
from jaxtrain.optimizers import Optimizer
from jaxtrain.schedules import Constant, Schedule
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
    total_steps: Annotated[float, Above(0), Traced()] = 1.0
    """Where the schedule ends."""
    prepare: Prepare | None = None
    """What every batch goes through first, also in evaluation: casts, normalisation."""
    augment: Any = None
    """What training batches go through next, see `jaxtrain/augment/`."""
    order: Order = Shuffled()
    """In which order examples come, and how `TrainState.position` moves on."""

    def __post_init__(self) -> None:
        """`UserError` for an option that is out of its bounds or none of its choices."""
        if not isinstance(self.optimizer, Optimizer):
            kind = type(self.optimizer).__name__
            raise UserError(f"optimizer={kind}: not an optimizer of jaxtrain.optimizers")
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
