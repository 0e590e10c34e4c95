"""The supervisor: starts the processes of a run, names the one that fails, ends them all, and
starts again from the last commit.

    python -m jaxtrain.processes.supervisor [--processes=N] [--devices=D] [--hang_seconds=S]
    [--max_restarts=R] FILE.py flags...

jax ends a process whose peer is lost by an abort, up to 99 s later, and never notices one that
hangs (docs/processes.md), so somebody outside has to look. With one process, the default, it looks
after its own worker of a larger group, which a scheduler started on other hosts too.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from jaxtrain import errors
from jaxtrain.processes import cluster, failure
from jaxtrain.processes.arguments import Plan, parse, value_of
from jaxtrain.processes.signals import STATUS
from jaxtrain.processes.worker_log import WorkerLog, say
from jaxtrain.processes.workers import Worker, dump_stacks, end

POLL_SECONDS = 0.1
SLEPT_SECONDS = 1.0
"""A pause between two looks that is longer than this was not ours: the supervisor, or the whole
machine, was stopped."""
FOLLOW_SECONDS = 1.0
FINAL_STATUS = "JAXTRAIN_FINAL_STATUS"
"""Names a file for a status that no restart mends, so that a batch script does not take the deaths
that follow for the cause."""


class Signals:
    """Remembers the signals that ask the run to end. Those that are ignored (nohup) stay so, here
    and in the workers."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, object] = {}

    @property
    def twice(self) -> bool:
        """Whether Ctrl-C came a second time: then at once is meant."""
        return self.received.count(signal.SIGINT) > 1

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # What signal.signal itself gave.
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


class Supervisor:
    """Runs one plan to its end."""

    def __init__(
        self, plan: Plan, environ: Mapping[str, str], folder: Path, signals: Signals
    ) -> None:
        self._plan, self._environ, self._folder, self._signals = plan, environ, folder, signals
        self._logs = [WorkerLog(folder, index) for index in range(1, plan.processes)]
        self._workers: list[Worker] = []
        self._index, self._count = _place_in_group(plan, environ)
        self._workdir = ""
        self._max_restarts, self._hang_seconds = plan.max_restarts, plan.hang_seconds
        self._found: failure.Verdict | None = None

    def run(self) -> int:
        """Attempts until one succeeds, fails for good, or is the last that is allowed; the exit
        status."""
        try:
            for restarts in itertools.count():
                self._start()
                self._found, seen = self._watch()
                if self._found is None:
                    return self._ended_by_themselves(seen)
                status = self._end(self._found, seen, restarts)
                if status is not None:
                    return status
            raise AssertionError("the last attempt has a status")
        finally:
            end(self._workers)
            for worker in self._workers:
                worker.forget()

    def keeps(self) -> bool:
        """Whether something lies in the temporary folder that is nowhere else, and was not said on
        the terminal either."""
        if self._found is None:
            said = not self._workdir  # nothing was trained: help, or a comparison
        # a final status is that of all, so the first worker has said why; of others what counts was
        # shown
        else:
            said = self._found.final is not None and (
                self._found.index == 0 or self._found.final in (errors.BAD_INPUT, errors.DIFFERENT)
            )
        if said:
            return False
        return not all(log.follow(self._workdir) for log in self._logs) or any(
            self._folder.glob("stacks/*.txt")
        )

    def _start(self) -> None:
        command, environ, now = (
            self._plan.command(self._workdir),
            self._worker_environ(),
            time.monotonic(),
        )
        for log in self._logs:
            log.begin()
        self._workers = []
        for index in range(self._plan.processes):
            theirs = (
                {cluster.PROCESS: str(index), cluster.LOCAL_PROCESS: str(index)}
                if self._plan.processes > 1
                else {}
            )
            log = self._logs[index - 1].path if index else None
            self._workers.append(
                Worker(index, command, {**environ, **theirs}, self._folder, log, now)
            )

    def _worker_environ(self) -> dict[str, str]:
        environ = dict(self._environ)
        if self._plan.devices is not None:
            forced = f"--xla_force_host_platform_device_count={self._plan.devices}"
            environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {forced}".strip()
            environ.setdefault("JAX_PLATFORMS", "cpu")  # else jax takes the GPU where there is one
        if self._plan.processes > 1:
            count = str(self._plan.processes)
            # A new port each time: the last attempt's may still be taken by a process that does not
            # die.
            environ |= {
                cluster.PROCESSES: count,
                cluster.LOCAL_PROCESSES: count,
                cluster.COORDINATOR: f"127.0.0.1:{free_port()}",
            }
        return environ

    def _watch(self) -> tuple[failure.Verdict | None, list[failure.Observation]]:
        """Looks until all workers have ended or one has failed."""
        last = followed = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last > SLEPT_SECONDS:
                for worker in self._workers:
                    worker.forgive(now - last)
            last = now
            for worker in self._workers:
                for number in dict.fromkeys(self._signals.received):
                    worker.send(number)
            seen = [worker.observe(now) for worker in self._workers]
            self._workdir = next(
                (worker.workdir for worker in self._workers if worker.workdir), self._workdir
            )
            told = next(
                (worker.wishes for worker in self._workers if worker.wishes),
                (self._max_restarts, self._hang_seconds),
            )
            self._max_restarts, self._hang_seconds = told
            if now - followed > FOLLOW_SECONDS:
                followed = now
                for log in self._logs:
                    log.follow(self._workdir)
            found = failure.judge(
                seen, now, failure.limits(self._hang_seconds), asked=bool(self._signals.received)
            )
            if (
                self._signals.twice
                or found is not None
                or not any(worker.alive for worker in self._workers)
            ):
                return found, seen
            time.sleep(POLL_SECONDS)

    def _ended_by_themselves(self, seen: Sequence[failure.Observation]) -> int:
        """The status of a group in which nothing failed, or that was told to end, which worker 0
        speaks for."""
        if self._signals.twice:
            end(self._workers)
            say("jaxtrain: interrupted twice; nothing more is saved")
            return errors.INTERRUPTED
        status = seen[0].status
        assert status is not None
        # Before Python has installed its handlers, a signal that asks ends the worker outright.
        return {-number: meant for number, meant in STATUS.items()}.get(status, status)

    def _end(
        self, found: failure.Verdict, seen: Sequence[failure.Observation], restarts: int
    ) -> int | None:
        """Ends the group, says why in one line, and returns the exit status; None if it shall start
        again."""
        who = (
            f"process {self._name(found.index)} of {self._count}"
            if self._count > 1
            else "the process"
        )
        headline = f"jaxtrain: {who} {found.words}"
        stacks = self._gather(headline, seen) if any(each.status is None for each in seen) else ""
        immortal = end(self._workers)
        for log in self._logs:
            log.follow(self._workdir)
        asked = self._signals.received
        allowed = self._max_restarts
        if found.final is not None:
            after, status = "a restart would not help", found.final
        elif asked:
            after = f"it was asked to end ({signal.Signals(asked[0]).name})"
            status = errors.INTERRUPTED if signal.SIGINT in asked else errors.TRY_AGAIN
        elif immortal:
            after, status = (
                f"no restart, for process {self._name(immortal[0])} does not die of SIGKILL",
                errors.TRY_AGAIN,
            )
        elif restarts >= allowed:
            after, status = f"no restarts left (--max_restarts={allowed})", errors.TRY_AGAIN
        else:
            after, status = (
                f"restarting from {_origin(self._workdir)} ({restarts + 1} of {allowed})",
                None,
            )
        # worker 0 has the terminal, and has said it there
        if found.final is not None and found.index == 0:
            _note_final(self._environ, found.final)
            return status
        if status is not None and found.index > 0:
            for line in self._logs[found.index - 1].last_words():
                say(f"process {self._name(found.index)}: {line}")
        say("; ".join(part for part in (headline, stacks, after) if part))
        if found.final is not None:
            _note_final(self._environ, found.final)
        return status

    def _gather(self, headline: str, seen: Sequence[failure.Observation]) -> str:
        """Writes the stacks of the living into one file, and returns what the line says of it."""
        text = dump_stacks(self._workers, seen, headline, first=self._index)
        name = time.strftime("%Y%m%d-%H%M%S") + (
            f"-{self._name(0)}" if self._count > self._plan.processes else ""
        )
        for folder in (Path(self._workdir), self._folder):
            path = folder / "stacks" / f"{name}.txt"
            if folder.is_absolute() and folder.is_dir():
                with contextlib.suppress(OSError):
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                    return f"stacks: {path}"
        return ""

    def _name(self, index: int) -> int:
        """A worker's index in the whole group."""
        return self._index + index


def main(argv: Sequence[str] | None = None) -> int:
    """Supervises what the command line says, and returns the exit status."""
    try:
        plan = parse(sys.argv[1:] if argv is None else argv)
        folder = Path(tempfile.mkdtemp(prefix="jaxtrain-"))
    except errors.UserError as error:
        say(f"jaxtrain: error: {error}")
        return errors.BAD_INPUT
    except OSError as error:
        say(
            f"jaxtrain: error: {error.filename or tempfile.gettempdir()}: {error.strerror}; TMPDIR"
            " names another place for small files"
        )
        return errors.IO_ERROR
    # where a launcher ignores it, the kernel forgets how children ended
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with Signals() as signals:
        supervisor = Supervisor(plan, os.environ, folder, signals)
        try:
            return supervisor.run()
        finally:
            if supervisor.keeps():
                say(
                    f"jaxtrain: what the processes printed is kept in {folder}, for it does not lie"
                    " in the run's folder"
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _place_in_group(plan: Plan, environ: Mapping[str, str]) -> tuple[int, int]:
    """The index of the first worker here, and of how many; what is wrong with it the worker
    says."""
    if plan.processes > 1:
        return 0, plan.processes
    given: dict[str, Callable[[str], int]] = {"processes": int, "process": int}
    with contextlib.suppress(ValueError):
        values = {
            name: None if (text := value_of(plan.flags, name)) is None else read(text)
            for name, read in given.items()
        }
        found = cluster.find(
            environ, **values, coordinator=value_of(plan.flags, "coordinator") or ""
        )
        return (0, 1) if found is None else (found.index, found.count)
    return 0, 1


def free_port() -> int:
    """A port of this machine that nobody listens on, above those that the system hands out to
    outgoing connections."""
    for port in random.sample(range(61440, 65536), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports taken")


def _origin(workdir: str) -> str:
    committed = workdir and any(Path(workdir, "checkpoints").glob("*/COMMIT"))
    return "the last commit" if committed else "the beginning, for nothing was committed"


def _note_final(environ: Mapping[str, str], status: int) -> None:
    if path := environ.get(FINAL_STATUS):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{status}\n")


if __name__ == "__main__":
    sys.exit(main())
