"""The recipe: what one step does, as a value; its numbers are fed to the step from
`TrainState.hyper` (see `hyper.py`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax

from jaxtrain.data.order import Order, Shuffled
from jaxtrain.fields import Above, Decay, Traced
from jaxtrain.optimizers import Optimizer
from jaxtrain.schedules import Constant, Schedule
from jaxtrain.tasks import Task
from jaxtrain.tree import Rules

Batch = Mapping[str, jax.Array]
Prepare = Callable[[Batch], Batch]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one step does."""

    model: Any
    task: Task
    optimizer: Optimizer
    schedule: Schedule = Constant(warmup=0.0)
    total_steps: Annotated[float, Above(0), Traced()] = 1.0
    """Where the schedule ends."""
    prepare: Prepare | None = None
    """What every batch goes through first, also in evaluation: casts, normalisation."""
    augment: Any = None
    """What training batches go through next, see `augment.py`."""
    clip_norm: Annotated[float | None, Above(0), Traced()] = None
    """The largest global norm of the gradient."""
    ema_decay: Decay | None = None
    """Decay of the moving average of the parameters, after a warm-up in which it is (1 + step) /
    (10 + step)."""
    microbatches: int = 1
    """Into how many parts a batch is cut; sums stay exact."""
    order: Order = Shuffled()
    """In which order examples come, and how `TrainState.position` moves on."""
    precision: str = "fp32"
    """What the model computes in: fp32, bf16, fp16 (with loss scaling) or fp8, see
    `precision.py`."""
    optimizer_state: str = "fp32"
    """What the optimizer's averages are stored in: fp32 or bf16, see `rounding.py`."""
    remat: str = "none"
    """What the backward pass computes again: none, dots, dense or blocks, see `gradients.py`."""
    offload: str = "none"
    """What is kept in the memory of the host: none or optimizer."""
    shard: Rules[str] = ()
    """Where parameters lie, by path pattern, see `sharding.py`."""

    def inputs(self, batch: Batch) -> Any:
        """What the model sees of a raw batch."""
        return self.task.inputs(batch if self.prepare is None else self.prepare(dict(batch)))
