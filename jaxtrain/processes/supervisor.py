"""The supervisor: starts the worker processes of a run, names the one that fails first, kills them
all, and restarts them from the last commit within the restart budget.

    python -m jaxtrain.processes.supervisor [--processes=N] [--devices=D] [--hang_seconds=S]
    [--max_restarts=R] FILE.py flags...

jax aborts a process up to 99 s after its peer is lost, and never notices a peer that hangs
(docs/processes.md), so a process outside must watch. With one process, the default, the supervisor
watches its own worker of a larger group, whose other workers a scheduler started on other hosts.
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
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain import errors
from jaxtrain.processes import cluster, failure
from jaxtrain.processes.arguments import Arguments, flag_value, parse
from jaxtrain.processes.signals import EXIT_STATUS, StopSignals
from jaxtrain.processes.worker_log import WorkerLog, print_line
from jaxtrain.processes.workers import Worker, collect_stacks, kill_all

POLL_SECONDS = 0.1
SUSPENDED_SECONDS = 1.0
"""A longer pause between two polls means that the supervisor, or the whole machine, was
suspended."""
COPY_LOGS_SECONDS = 1.0
FINAL_STATUS_FILE_ENV = "JAXTRAIN_FINAL_STATUS"
"""The environment variable that names a file. The supervisor writes an exit status into it that no
restart can mend, so that a batch script does not take the exits that follow for the cause."""


class Supervisor:
    """Runs the workers of one command line until the run is done or cannot go on."""

    def __init__(
        self, arguments: Arguments, environ: Mapping[str, str], folder: Path, stop: StopSignals
    ) -> None:
        self._arguments, self._environ, self._folder = arguments, environ, folder
        self._stop = stop
        self._logs = [WorkerLog(folder, index) for index in range(1, arguments.processes)]
        self._workers: list[Worker] = []
        self._first_index, self._group_size = _position_in_group(arguments, environ)
        self._workdir = ""
        self._options = arguments.options
        self._failure: failure.Failure | None = None

    def run(self) -> int:
        """Starts the workers until they succeed, fail for good, or the restart budget is spent;
        returns the exit status."""
        try:
            for restarts in itertools.count():
                self._start_workers()
                self._failure, observations = self._watch()
                if self._failure is None:
                    return self._status_without_failure(observations)
                status = self._handle_failure(self._failure, observations, restarts)
                if status is not None:
                    return status
            raise AssertionError("the last attempt has a status")
        finally:
            kill_all(self._workers)
            for worker in self._workers:
                worker.remove_files()

    def folder_is_needed(self) -> bool:
        """Whether the temporary folder holds logs or stacks of a failure that are nowhere else, and
        whose reason is not on the terminal either."""
        if self._failure is None:
            explained = not self._workdir  # nothing was trained: --help, or a comparison
        else:
            # All workers exit with the same final status, and worker 0 has printed the reason. For
            # bad input or a difference of meshes the line of any worker says everything.
            explained = self._failure.final_status is not None and (
                self._failure.index == 0
                or self._failure.final_status in (errors.BAD_INPUT, errors.DIFFERENT)
            )
        if explained:
            return False
        return not all(log.copy_to(self._workdir) for log in self._logs) or any(
            self._folder.glob("stacks/*.txt")
        )

    def _start_workers(self) -> None:
        command = self._arguments.worker_command(self._workdir)
        environ, now = self._worker_environ(), time.monotonic()
        for log in self._logs:
            log.clear()
        self._workers = []
        for index in range(self._arguments.processes):
            own_environ = (
                {cluster.PROCESS_INDEX_ENV: str(index), cluster.LOCAL_INDEX_ENV: str(index)}
                if self._arguments.processes > 1
                else {}
            )
            log = self._logs[index - 1].path if index else None
            self._workers.append(
                Worker(index, command, {**environ, **own_environ}, self._folder, log, now)
            )

    def _worker_environ(self) -> dict[str, str]:
        environ = dict(self._environ)
        if self._arguments.devices is not None:
            count_flag = f"--xla_force_host_platform_device_count={self._arguments.devices}"
            environ["XLA_FLAGS"] = f"{environ.get('XLA_FLAGS', '')} {count_flag}".strip()
            environ.setdefault("JAX_PLATFORMS", "cpu")  # else jax takes the GPU where there is one
        if self._arguments.processes > 1:
            count = str(self._arguments.processes)
            # A new port for each attempt: a process that does not die may still hold the last one.
            environ |= {
                cluster.PROCESS_COUNT_ENV: count,
                cluster.LOCAL_COUNT_ENV: count,
                cluster.COORDINATOR_ENV: f"127.0.0.1:{free_port()}",
            }
        return environ

    def _watch(self) -> tuple[failure.Failure | None, list[failure.Observation]]:
        """Polls until all workers have exited or one has failed."""
        last_poll = last_copy = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last_poll > SUSPENDED_SECONDS:
                for worker in self._workers:
                    worker.extend_limits(now - last_poll)
            last_poll = now
            for worker in self._workers:
                for number in dict.fromkeys(self._stop.received):
                    worker.send_signal(number)
            observations = [worker.observe(now) for worker in self._workers]
            self._read_what_workers_sent()
            if now - last_copy > COPY_LOGS_SECONDS:
                last_copy = now
                self._copy_logs()
            found = failure.first_failure(
                observations,
                now,
                failure.silence_limits(self._options.hang_seconds),
                stop_requested=bool(self._stop.received),
            )
            if (
                self._stop.interrupted_again
                or found is not None
                or not any(worker.alive for worker in self._workers)
            ):
                return found, observations
            time.sleep(POLL_SECONDS)

    def _read_what_workers_sent(self) -> None:
        """Takes the run's folder and the options from the first worker that has sent them."""
        for worker in reversed(self._workers):
            self._workdir = worker.workdir or self._workdir
            self._options = worker.supervisor_options or self._options

    def _copy_logs(self) -> None:
        for log in self._logs:
            log.copy_to(self._workdir)

    def _status_without_failure(self, observations: Sequence[failure.Observation]) -> int:
        """The exit status if no worker failed: that of worker 0, unless Ctrl-C came a second
        time."""
        if self._stop.interrupted_again:
            kill_all(self._workers)
            print_line("jaxtrain: interrupted twice; nothing more is saved")
            return errors.INTERRUPTED
        status = observations[0].exit_status
        assert status is not None
        # A stop signal kills a worker that has not installed its handlers yet.
        return {-number: meant for number, meant in EXIT_STATUS.items()}.get(status, status)

    def _handle_failure(
        self, found: failure.Failure, observations: Sequence[failure.Observation], restarts: int
    ) -> int | None:
        """Kills the group, prints the reason in one line, and returns the exit status; None if the
        group shall start again."""
        who = (
            f"process {self._group_index(found.index)} of {self._group_size}"
            if self._group_size > 1
            else "the process"
        )
        headline = f"jaxtrain: {who} {found.description}"
        some_alive = any(each.exit_status is None for each in observations)
        stacks = self._write_stacks(headline, observations) if some_alive else ""
        not_killed = kill_all(self._workers)
        self._copy_logs()
        consequence, status = self._restart_or_status(found, restarts, not_killed)
        # Worker 0 has the terminal, and has printed its final status there.
        if found.final_status is None or found.index > 0:
            if status is not None and found.index > 0:
                for line in self._logs[found.index - 1].error_lines():
                    print_line(f"process {self._group_index(found.index)}: {line}")
            print_line("; ".join(part for part in (headline, stacks, consequence) if part))
        if found.final_status is not None:
            _write_final_status(self._environ, found.final_status)
        return status

    def _restart_or_status(
        self, found: failure.Failure, restarts: int, not_killed: Sequence[int]
    ) -> tuple[str, int | None]:
        """What follows from a failure, in words, and the exit status; None for a restart."""
        allowed = self._options.max_restarts
        if found.final_status is not None:
            return "a restart would not help", found.final_status
        if self._stop.first is not None:
            interrupted = signal.SIGINT in self._stop.received
            return (
                f"it was asked to end ({self._stop.name})",
                errors.INTERRUPTED if interrupted else errors.TRY_AGAIN,
            )
        if not_killed:
            index = self._group_index(not_killed[0])
            return f"no restart, for process {index} does not die of SIGKILL", errors.TRY_AGAIN
        if restarts >= allowed:
            return f"no restarts left (--max_restarts={allowed})", errors.TRY_AGAIN
        return (
            f"restarting from {_restart_origin(self._workdir)} ({restarts + 1} of {allowed})",
            None,
        )

    def _write_stacks(self, headline: str, observations: Sequence[failure.Observation]) -> str:
        """Writes the stacks of the living workers into one file; returns the file's name for the
        printed line."""
        text = collect_stacks(self._workers, observations, headline, first_index=self._first_index)
        name = time.strftime("%Y%m%d-%H%M%S") + (
            f"-{self._group_index(0)}" if self._group_size > self._arguments.processes else ""
        )
        for folder in (Path(self._workdir), self._folder):
            path = folder / "stacks" / f"{name}.txt"
            if folder.is_absolute() and folder.is_dir():
                with contextlib.suppress(OSError):
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                    return f"stacks: {path}"
        return ""

    def _group_index(self, index: int) -> int:
        """The index in the whole group of the worker that has `index` here."""
        return self._first_index + index


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the supervisor as the command line says, and returns the exit status."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        folder = Path(tempfile.mkdtemp(prefix="jaxtrain-"))
    except errors.UserError as error:
        print_line(f"jaxtrain: error: {error}")
        return errors.BAD_INPUT
    except OSError as error:
        print_line(
            f"jaxtrain: error: {error.filename or tempfile.gettempdir()}: {error.strerror}; TMPDIR"
            " names another place for small files"
        )
        return errors.IO_ERROR
    # Where a launcher ignores SIGCHLD, the kernel forgets how children exited.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with StopSignals(exit_on_second_interrupt=False) as stop:
        supervisor = Supervisor(arguments, os.environ, folder, stop)
        try:
            return supervisor.run()
        finally:
            if supervisor.folder_is_needed():
                print_line(
                    f"jaxtrain: what the processes printed is kept in {folder}, for it does not lie"
                    " in the run's folder"
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _position_in_group(arguments: Arguments, environ: Mapping[str, str]) -> tuple[int, int]:
    """The index of the first worker here, and the size of the whole group. Wrong flags count as one
    process alone, because the worker will refuse them."""
    if arguments.processes > 1:
        return 0, arguments.processes
    with contextlib.suppress(ValueError):
        count, index = (
            None if (text := flag_value(arguments.flags, name)) is None else int(text)
            for name in ("processes", "process")
        )
        found = cluster.detect(
            environ,
            processes=count,
            process=index,
            coordinator=flag_value(arguments.flags, "coordinator") or "",
        )
        return (0, 1) if found is None else (found.index, found.count)
    return 0, 1


def free_port() -> int:
    """A port of this machine on which nobody listens, above those that the system hands out to
    outgoing connections."""
    for port in random.sample(range(61440, 65536), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports taken")


def _restart_origin(workdir: str) -> str:
    committed = workdir and any(Path(workdir, "checkpoints").glob("*/COMMIT"))
    return "the last commit" if committed else "the beginning, for nothing was committed"


def _write_final_status(environ: Mapping[str, str], status: int) -> None:
    if path := environ.get(FINAL_STATUS_FILE_ENV):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{status}\n")


if __name__ == "__main__":
    sys.exit(main())
