"""The recipe: what one step does, as a value; its numbers are fed to the step from
`TrainState.hyper` (see `hyper.py`)."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from jaxtrain.config.step_options import StepOptions
from jaxtrain.data.order import Order, Shuffled
from jaxtrain.fields import Above, Traced
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

    def inputs(self, batch: Batch) -> Any:
        """What the model sees of a raw batch."""
        return self.task.inputs(batch if self.prepare is None else self.prepare(dict(batch)))
