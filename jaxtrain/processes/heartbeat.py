"""The pulse: how far a worker has come, in a small file that its supervisor reads.

Only the main thread beats, and only when something was really done: a thread that beat by itself
would go on through any hang. In a process that nobody supervises every call returns at once.
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

PULSE, STACKS, SUPERVISED = "JAXTRAIN_PULSE", "JAXTRAIN_STACKS", "JAXTRAIN_SUPERVISED"
"""What a supervisor tells its worker in the environment: the file to beat into, the one to dump
stacks into, and the supervisor's own pid."""
PHASES = ("starting", "joining", "data", "compiling", "training", "evaluating", "saving", "ending")
"""What a worker can be at, in the order in which it mostly comes to them."""

_LINE = 64
"""Bytes of the first line; those after it hold the run's wishes and its workdir. Fixed, so that a
beat overwrites the last one in one call."""
_LONGEST = 2 * _LINE + 4096


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a pulse file says: how many beats there were, and what the last one told."""

    counter: int = 0
    phase: str = "starting"
    step: int | None = None
    workdir: str = ""
    max_restarts: int | None = None
    """None if the worker has not said yet what the run asks of its supervisor."""
    hang_seconds: float | None = None


class Pulse:
    """Writes the beats of one worker into one file."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._counter, self._step = 0, -1
        self._wishes = self._workdir = b""
        self.beat(PHASES[0])

    def beat(self, phase: str, step: int | None = None) -> None:
        """Says that the worker has got on, at `step` or where it was; costs a few microseconds, and
        a full disk is not worth a run."""
        assert phase in PHASES, phase
        assert threading.current_thread() is threading.main_thread(), (
            "another thread's beats say nothing of the main one"
        )
        self._counter += 1
        self._step = self._step if step is None else step
        line = (
            f"{self._counter} {phase} {'-' if self._step < 0 else self._step}".ljust(_LINE - 1)
            + "\n"
        )
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, line.encode(), 0)

    def wishes(self, max_restarts: int, hang_seconds: float | None) -> None:
        """Says what the run asks of its supervisor, which has read no experiment, only flags."""
        self._wishes = f"{max_restarts} {'-' if hang_seconds is None else hang_seconds}".encode()
        self._tell()

    def workdir(self, path: str | Path) -> None:
        """Says where the run's folder is, so that the supervisor can restart into it."""
        self._workdir = os.fsencode(os.path.abspath(path))
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, self._wishes + b"\n" + self._workdir + b"\n", _LINE)


def read(path: str | Path) -> Beat | None:
    """What the pulse file at `path` says; None if there is none yet, or if it was read at the wrong
    moment.

    >>> read("/no/such/pulse") is None
    True
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST)
        counter, phase, step = text[:_LINE].decode("ascii").split()
        told = text[_LINE:].split(b"\n")  # empty, or whole lines and what follows the last
        wishes = told[0].decode("ascii").split() if len(told) > 1 else []
        return Beat(
            int(counter),
            phase,
            None if step == "-" else int(step),
            workdir=os.fsdecode(told[1]) if len(told) > 2 else "",
            max_restarts=int(wishes[0]) if wishes else None,
            hang_seconds=float(wishes[1]) if wishes and wishes[1] != "-" else None,
        )
    except (OSError, ValueError):
        return None


def beat(phase: str, step: int | None = None) -> None:
    """Tells the supervisor, if there is one, that the main thread has got on: what it is at now,
    and at which step if that is another.

    >>> beat("training", 12)
    """
    own = _own()
    if own is not None:
        own.beat(phase, step)


def wishes(max_restarts: int, hang_seconds: float | None) -> None:
    """Tells the supervisor, if there is one, how often the run may be restarted, and after how many
    seconds of silence it counts as hung."""
    own = _own()
    if own is not None:
        own.wishes(max_restarts, hang_seconds)


def workdir(path: str | Path) -> None:
    """Tells the supervisor, if there is one, the run's folder."""
    own = _own()
    if own is not None:
        own.workdir(path)


@functools.cache
def _own() -> Pulse | None:
    """This process's pulse, if a supervisor started it; a child of a worker has none, though it
    inherits the environment."""
    path, supervisor = os.environ.get(PULSE), int(os.environ.get(SUPERVISED) or 0)
    if not path:
        return None
    if os.getppid() != supervisor:
        if not _exists(supervisor):
            _end_orphan()
        return None
    own = Pulse(path)
    if stacks := os.environ.get(STACKS):
        # Written by a C handler, so a thread that holds the interpreter for ever is seen too. The
        # file stays open for good.
        file = open(stacks, "ab", buffering=0)  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
    threading.Thread(
        target=_watch_supervisor, args=(supervisor,), name="supervisor watch", daemon=True
    ).start()
    return own


def _watch_supervisor(supervisor: int) -> None:
    """Ends the worker when its supervisor was killed: nobody would notice any more if it hung,
    holding a GPU."""
    while os.getppid() == supervisor:
        time.sleep(1)
    _end_orphan()


def _end_orphan() -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(
            2,
            b"jaxtrain: error: the supervisor is gone; this process ends, what is committed"
            b" stays\n",
        )
    if os.getpgrp() == os.getpid():
        # The supervisor gave each worker a group of its own, so this takes its children along, such
        # as those that load data.
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(TRY_AGAIN)  # nothing is wrong with the run


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return process > 0
