"""Witnesses: what the processes other than the first do where the first one writes. They take part
in what all must do, and leave no trace."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jaxtrain.checkpoints import arrays
from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.report.metrics_file import Writers
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.tree import PyTree


class WitnessCheckpoints(Checkpoints):
    """Checkpoints that this process helps to gather and can read, but does not write."""

    def save(
        self,
        step: int,
        state: PyTree,
        loop: Mapping[str, Any],
        *,
        metric: float | None = None,
        wait: bool = False,
    ) -> None:
        """Gives process 0 this process's part of every array."""
        arrays.to_host(state)

    def sweep(self) -> None:
        """Nothing: process 0 sweeps."""

    def check_space(self, like: PyTree) -> None:
        """Nothing: process 0 looks."""


class WitnessWriters(Writers):
    """Writers that forget."""

    def __init__(self) -> None:
        self.others = ()
        self.failures = {}

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Nothing."""

    def sync(self) -> int:
        """No bytes."""
        return 0

    def resume(self, step: int, offset: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WitnessLock:
    """The lock on a folder that process 0 holds.

    >>> with WitnessLock(Path("/anywhere")) as lock:
    ...     lock.held()
    True
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def held(self) -> bool:
        """Always: if process 0 loses it, the whole group ends."""
        return True


def witness_progress(total_steps: int) -> Progress:
    """A progress display that shows nothing."""
    return Progress(total_steps, stream=io.StringIO(), live=False)
