"""Trackers: copies of a run's numbers for TensorBoard and for Weights & Biases. Neither is imported
before it is used."""

import importlib
import io
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain import extras
from jaxtrain.messages import one_line
from jaxtrain.report.metrics_file import warn_on_stderr


class TensorBoardWriter:
    """Scalars as TensorBoard's event files in `folder`, tagged `loss/train`, `loss/validation`;
    TensorFlow is never imported.

    The file is opened at the first write, so a start costs nothing. Each write is flushed:
    TensorBoard is at most one log line behind.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        extras.require("--tensorboard", "tensorboard")
        self.folder = Path(folder)
        self._file: Any = None
        self._records: Any = None

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one event with a scalar for each value."""
        summary_pb2 = _protocol("summary")
        scalars = [
            summary_pb2.Summary.Value(tag=f"{key}/{split}", simple_value=float(value))
            for key, value in values.items()
        ]
        self._event(step, summary=summary_pb2.Summary(value=scalars))

    def rewind(self, step: int) -> None:
        """Makes TensorBoard drop what it has of steps after `step`, from this or earlier
        processes."""
        event_pb2 = _protocol("event")
        self._event(step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def close(self) -> None:
        """Closes the event file."""
        if self._file is not None:
            self._file.close()
            self._file = self._records = None

    def _event(self, step: int, **content: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event_pb2 = _protocol("event")
        if self._file is None:
            # tensorboard's own EventFileWriter opens files through TensorFlow if that is installed,
            # which then takes the GPU's memory.
            self.folder.mkdir(parents=True, exist_ok=True)
            seconds, unique = time.time_ns() // 10**9, f"{os.getpid()}.{time.monotonic_ns()}"
            name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{unique}"
            self._file = io.BufferedWriter(io.FileIO(self.folder / name, "ab"))
            self._records = RecordWriter(self._file)
            self._records.write(
                event_pb2.Event(
                    wall_time=time.time(), file_version="brain.Event:2"
                ).SerializeToString()
            )
        self._records.write(
            event_pb2.Event(wall_time=time.time(), step=step, **content).SerializeToString()
        )
        self._records.flush()


def _protocol(name: str) -> Any:
    """A module of TensorBoard's protocol buffers; their classes are made at import, where no type
    checker sees them."""
    return importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")


class WandbWriter:
    """Weights & Biases. A thread of its own talks to it, so that neither an exception nor a
    network that hangs reaches the run.

    The key comes from WANDB_API_KEY only; without it the run is kept offline in `folder`, where
    `wandb sync` finds it. Failures are counted in `failures`, and the first one is passed to
    `note`. Lines that find the queue full are dropped, and counted too.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str,
        run_id: str,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
        patience_seconds: float = 15.0,
    ) -> None:
        self.failures = 0
        self._note = note or warn_on_stderr
        self._patience_seconds = patience_seconds
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=1000)
        mode = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        settings = {
            "project": project,
            "name": name,
            "id": run_id,
            "dir": str(folder),
            "config": dict(config or {}),
            "mode": mode,
            "resume": "allow",
        }
        self._thread = threading.Thread(
            target=self._work, args=(settings,), name="wandb-writer", daemon=True
        )
        self._thread.start()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Queues one line; never waits."""
        try:
            self._queue.put_nowait(
                {"step": step} | {f"{split}/{key}": float(value) for key, value in values.items()}
            )
        except queue.Full:
            self._failed("it does not keep up; lines are dropped")

    def rewind(self, step: int) -> None:
        """Does nothing: every line carries its own `step`, against which W&B plots."""

    def close(self) -> None:
        """Waits for the queue to empty, but not for longer than `patience_seconds`."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=self._patience_seconds)
            except queue.Full:
                pass
            self._thread.join(self._patience_seconds)
            if self._thread.is_alive():
                self._failed(f"not finished after {self._patience_seconds:g} s; left behind")

    def _work(self, settings: dict[str, Any]) -> None:
        run = self._attempt(self._begin, settings)
        while (line := self._queue.get()) is not None:
            if run is not None:
                self._attempt(run.log, line)
        if run is not None:
            self._attempt(run.finish)

    def _begin(self, settings: dict[str, Any]) -> Any:
        # Optional; a checker finds it only where it is installed.
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(**settings)
        run.define_metric("*", step_metric="step")
        return run

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        # wandb has been seen to call sys.exit; it ends here.
        except BaseException as error:  # noqa: BLE001
            self._failed(f"{type(error).__name__}: {error}")
            return None

    def _failed(self, reason: str) -> None:
        self.failures += 1
        if self.failures == 1:
            self._note(f"wandb: {one_line(reason)}; training goes on without it")
