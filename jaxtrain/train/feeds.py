"""Feeds: how the next steps get their data, from the device's memory or from a stream of batches.

A feed is called with the state and a number of steps, dispatches them, and returns without waiting
for the device.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from jaxtrain import metrics
from jaxtrain.data.pipeline import BatchLoader
from jaxtrain.processes import group
from jaxtrain.train.reproducible import Trainer
from jaxtrain.train.state import TrainState
from jaxtrain.tree import Batch

CALL_FLOPS = {"cpu": 1e8, "gpu": 2e11}
"""How much work a dispatch should hold, so that starting it (about 0.1 ms) costs nothing that can
be seen."""
MOST_STEPS = 128


class Feed(Protocol):
    """What the loop asks for steps."""

    compiles_late: ClassVar[bool]
    """Whether the first dispatch compiles, so that its time says nothing of the others."""

    def advance(self, state: TrainState, count: int) -> tuple[TrainState, metrics.Sums]:
        """Dispatches `count` steps; the sums are those of all of them."""
        ...

    def close(self) -> None:
        """Ends what reads in the background."""
        ...


@dataclasses.dataclass(frozen=True)
class ResidentFeed:
    """Data in device memory: one dispatch gathers and trains any number of steps."""

    compiles_late: ClassVar[bool] = False
    program: Any
    """The compiled program: one step, or as many as it is told. It is the same for every call, so a
    resumed run repeats the same bits."""
    data: Batch
    counts: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    """The few numbers of steps that occur, as device scalars: an implicit transfer would be refused
    by the guard."""

    def advance(self, state: TrainState, count: int) -> tuple[TrainState, metrics.Sums]:
        """Dispatches `count` steps."""
        if count not in self.counts:
            self.counts[count] = device_count(count, self.data)
        return self.program(state, self.data, self.counts[count])

    def close(self) -> None:
        """Nothing reads in the background."""


def device_count(count: int, data: Batch) -> jax.Array:
    """A number of steps as a device scalar, on the same devices as the data."""
    return group.place(np.asarray(count, np.int32), next(iter(data.values())).sharding)


@dataclasses.dataclass(frozen=True)
class ReproducibleFeed:
    """Steps of one-device programs (`reproducible.py`), over data in device memory or over a
    stream."""

    compiles_late: ClassVar[bool] = True
    trainer: Trainer
    source: Batch | BatchLoader
    batch_size: int

    def advance(self, state: TrainState, count: int) -> tuple[TrainState, metrics.Sums]:
        """Dispatches `count` steps."""
        copies, sums = self.trainer.copies(state), None
        for _ in range(count):
            if isinstance(self.source, BatchLoader):
                parts = self.trainer.cut(next(self.source))
            else:
                parts = self.trainer.draw(copies, self.source, self.batch_size)
            copies, more = self.trainer.step(copies, parts)
            sums = more if sums is None else metrics.add(sums, more)
        assert sums is not None
        return self.trainer.joined(copies, state), sums

    def close(self) -> None:
        """Ends the reading threads."""
        if isinstance(self.source, BatchLoader):
            self.source.close()


@dataclasses.dataclass(frozen=True)
class LoaderFeed:
    """Batches read ahead in the background: one step a dispatch."""

    compiles_late: ClassVar[bool] = False
    step: Any
    loader: BatchLoader

    def advance(self, state: TrainState, count: int) -> tuple[TrainState, metrics.Sums]:
        """Dispatches `count` steps, each as soon as its batch is there."""
        state, sums = self.step(state, next(self.loader))
        for _ in range(count - 1):
            state, more = self.step(state, next(self.loader))
            sums = metrics.add(sums, more)
        return state, sums

    def close(self) -> None:
        """Ends the reading threads."""
        self.loader.close()


def steps_per_call(lowered: Any, platform: str, log_every: int) -> int:
    """How many steps one dispatch should run, decided by the lowered program of one step alone, so
    that every start decides alike.

    A convolution inside a loop is 25 times slower on XLA's CPU backend, so there a model with one
    runs step by step.
    """
    if platform == "cpu" and "stablehlo.convolution" in lowered.as_text():
        return 1
    flops = max(flops_of(lowered), 1.0)
    wanted = round(CALL_FLOPS.get(platform, CALL_FLOPS["gpu"]) / flops)
    return max(1, min(wanted, MOST_STEPS, log_every))


def flops_of(lowered: Any) -> float:
    """Floating point operations of a lowered program, as XLA counts them; 0 where it does not
    say."""
    analysis = lowered.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis
    return float(analysis.get("flops", 0.0)) if isinstance(analysis, dict) else 0.0
