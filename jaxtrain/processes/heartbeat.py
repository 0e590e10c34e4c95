"""Heartbeats: each worker writes its progress into a small file, which its supervisor reads.

Only the main thread sends a heartbeat, and only after real progress: a timer thread would go on
through any hang. In a process without a supervisor every call returns at once.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import os
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

from jaxtrain.errors import TRY_AGAIN

HEARTBEAT_FILE_ENV = "JAXTRAIN_HEARTBEAT_FILE"
"""The environment variable that names the file for the worker's heartbeats."""
STACKS_FILE_ENV = "JAXTRAIN_STACKS_FILE"
"""The environment variable that names the file for the worker's stack traces."""
SUPERVISOR_PID_ENV = "JAXTRAIN_SUPERVISOR_PID"
"""The environment variable that holds the supervisor's process id."""
PHASES = ("starting", "joining", "data", "compiling", "training", "evaluating", "saving", "ending")
"""The phases of a worker, roughly in their order."""

_PROGRESS_BYTES = 64
"""The length of the first line, which holds the progress. It is fixed, so that one write replaces
it. The next two lines hold the supervisor options and the workdir."""
_MAX_FILE_BYTES = 2 * _PROGRESS_BYTES + 4096


@dataclasses.dataclass(frozen=True)
class SupervisorOptions:
    """How often the supervisor may restart the run, and after how many seconds without a heartbeat
    a worker counts as hung (None: the limits of failure.py)."""

    max_restarts: int = 0
    hang_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """The content of a heartbeat file: the number of heartbeats so far, the phase and step of the
    last one, and what the worker has said of the run."""

    counter: int = 0
    phase: str = "starting"
    step: int | None = None
    workdir: str = ""
    options: SupervisorOptions | None = None
    """None until the worker has sent them."""


class HeartbeatWriter:
    """Writes the heartbeats of one worker into one file."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._counter, self._step = 0, -1
        self._options = self._workdir = b""
        self.beat(PHASES[0])

    def beat(self, phase: str, step: int | None = None) -> None:
        """Writes a heartbeat, at `step` or at the step of the last one. It costs a few
        microseconds. A full disk is ignored, because it need not end the run."""
        assert phase in PHASES, phase
        assert threading.current_thread() is threading.main_thread(), (
            "a heartbeat of another thread says nothing of the main one"
        )
        self._counter += 1
        self._step = self._step if step is None else step
        step_text = "-" if self._step < 0 else str(self._step)
        line = f"{self._counter} {phase} {step_text}".ljust(_PROGRESS_BYTES - 1) + "\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, line.encode(), 0)

    def send_options(self, options: SupervisorOptions) -> None:
        """Sends the options that the experiment sets; the supervisor itself reads flags only."""
        hang_text = "-" if options.hang_seconds is None else str(options.hang_seconds)
        self._options = f"{options.max_restarts} {hang_text}".encode()
        self._write_details()

    def send_workdir(self, path: str | Path) -> None:
        """Sends the run's folder, so that the supervisor can restart the run in it."""
        self._workdir = os.fsencode(os.path.abspath(path))
        self._write_details()

    def _write_details(self) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(
                self._descriptor, self._options + b"\n" + self._workdir + b"\n", _PROGRESS_BYTES
            )


def read(path: str | Path) -> Heartbeat | None:
    """The content of the heartbeat file at `path`; None if there is no file yet, or if it is half
    written.

    >>> read("/no/such/heartbeat") is None
    True
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES)
        counter, phase, step = text[:_PROGRESS_BYTES].decode("ascii").split()
        # Either nothing, or whole lines and what follows the last newline.
        details = text[_PROGRESS_BYTES:].split(b"\n")
        options = details[0].decode("ascii").split() if len(details) > 1 else []
        return Heartbeat(
            int(counter),
            phase,
            None if step == "-" else int(step),
            workdir=os.fsdecode(details[1]) if len(details) > 2 else "",
            options=SupervisorOptions(
                int(options[0]), None if options[1] == "-" else float(options[1])
            )
            if len(options) == 2
            else None,
        )
    except (OSError, ValueError):
        return None


_phases = [PHASES[0]]
"""The phase of the last heartbeat, with or without a supervisor."""


def beat(phase: str, step: int | None = None) -> None:
    """Sends a heartbeat to the supervisor, if there is one: the main thread has made progress, is
    in this phase, and at this step (None: at the step of the last heartbeat).

    >>> beat("training", 12)
    """
    _phases[0] = phase
    writer = _writer()
    if writer is not None:
        writer.beat(phase, step)


def phase() -> str:
    """The phase that the main thread is in, whoever asks.

    >>> beat("compiling"), phase()
    (None, 'compiling')
    """
    return _phases[0]


def send_options(max_restarts: int, hang_seconds: float | None) -> None:
    """Sends the supervisor, if there is one, how often it may restart the run, and after how many
    seconds without a heartbeat a worker counts as hung."""
    writer = _writer()
    if writer is not None:
        writer.send_options(SupervisorOptions(max_restarts, hang_seconds))


def send_workdir(path: str | Path) -> None:
    """Sends the supervisor, if there is one, the run's folder."""
    writer = _writer()
    if writer is not None:
        writer.send_workdir(path)


@functools.cache
def _writer() -> HeartbeatWriter | None:
    """This process's writer, if a supervisor started it. A child of a worker has none, although it
    inherits the environment."""
    path, supervisor = (
        os.environ.get(HEARTBEAT_FILE_ENV),
        int(os.environ.get(SUPERVISOR_PID_ENV) or 0),
    )
    if not path:
        return None
    if os.getppid() != supervisor:
        if not _process_exists(supervisor):
            _exit_as_orphan()
        return None
    writer = HeartbeatWriter(path)
    if stacks := os.environ.get(STACKS_FILE_ENV):
        # A C handler writes the stacks, so it also works while a thread holds the interpreter. The
        # file stays open for good.
        file = open(stacks, "ab", buffering=0)  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    threading.Thread(
        target=_watch_supervisor, args=(supervisor,), name="supervisor watch", daemon=True
    ).start()
    return writer


def _watch_supervisor(supervisor: int) -> None:
    """Ends the worker when its supervisor was killed: without one, nobody would notice a hang of a
    process that holds a GPU."""
    while os.getppid() == supervisor:
        time.sleep(1)
    _exit_as_orphan()


def _exit_as_orphan() -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(
            2,
            b"jaxtrain: error: the supervisor is gone; this process ends, what is committed"
            b" stays\n",
        )
    if os.getpgrp() == os.getpid():
        # The supervisor gave each worker a process group of its own, so this also kills the
        # worker's children, such as data loaders.
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(TRY_AGAIN)  # nothing is wrong with the run


def _process_exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        return True
    return process > 0
