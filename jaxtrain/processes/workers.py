"""The worker processes of one supervisor: it starts them, observes them, collects their stacks, and
kills them together."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain.processes import failure, heartbeat

_REAP_SECONDS = 10.0
"""How long a killed process may take to be gone. One that waits in the kernel for a dead disk never
goes."""
_STACKS_SECONDS = 1.0


class Worker:
    """One process in a session of its own: a signal to its process group also reaches its children,
    and Ctrl-C reaches it only through the supervisor."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        folder: Path,
        log: Path | None,
        now: float,
    ) -> None:
        self.index = index
        self._heartbeat_file = folder / f"heartbeat-{index}"
        self._stacks_file = folder / f"stacks-{index}"
        own_environ = {
            heartbeat.HEARTBEAT_FILE_ENV: str(self._heartbeat_file),
            heartbeat.STACKS_FILE_ENV: str(self._stacks_file),
            heartbeat.SUPERVISOR_PID_ENV: str(os.getpid()),
        }
        self.remove_files()
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(open(log, "ab"))
            if output is not None:
                # Otherwise SIGKILL would lose the last lines of the log.
                own_environ["PYTHONUNBUFFERED"] = "1"
            # A session, not only a process group: a background group may be stopped for writing to
            # the terminal (TOSTOP), another session may not.
            self._process = subprocess.Popen(
                command,
                env={**environ, **own_environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._heartbeat = heartbeat.Heartbeat()
        self._observation = failure.Observation(index, now)
        self._signals_sent: set[int] = set()

    @property
    def workdir(self) -> str:
        """The run's folder, if the worker has sent it."""
        return self._heartbeat.workdir

    @property
    def supervisor_options(self) -> heartbeat.SupervisorOptions | None:
        """What the experiment asks of the supervisor, if the worker has sent it."""
        return self._heartbeat.options

    @property
    def alive(self) -> bool:
        """Whether the process lived at the last call of `observe`."""
        return self._observation.exit_status is None

    def remove_files(self) -> None:
        """Removes the heartbeat file and the stacks file."""
        for path in (self._heartbeat_file, self._stacks_file):
            path.unlink(missing_ok=True)

    def observe(self, now: float) -> failure.Observation:
        """What is known of the worker now."""
        if not self.alive:
            return self._observation
        # Before the heartbeat is read, so that the last one is not missed.
        exit_status = self._exit_status()
        latest = heartbeat.read(self._heartbeat_file)
        if latest is not None:
            if latest.counter != self._heartbeat.counter and latest.phase in heartbeat.PHASES:
                self._observation = dataclasses.replace(
                    self._observation, last_progress=now, phase=latest.phase, step=latest.step
                )
            self._heartbeat = latest
        stopped = exit_status is None and _is_stopped(self._process.pid)
        self._observation = dataclasses.replace(
            self._observation,
            stopped_since=(self._observation.stopped_since or now) if stopped else None,
            exit_status=exit_status,
            exit_time=None if exit_status is None else now,
        )
        return self._observation

    def _exit_status(self) -> int | None:
        """How the process exited, as in `subprocess`, or None. The process is not reaped: a zombie
        keeps its process id, so no other process can get that."""
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def extend_limits(self, seconds: float) -> None:
        """Ignores a time in which the supervisor did not observe the worker."""
        since = self._observation.stopped_since
        self._observation = dataclasses.replace(
            self._observation,
            last_progress=self._observation.last_progress + seconds,
            stopped_since=None if since is None else since + seconds,
        )

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process alone, and each signal once only."""
        if self.alive and number not in self._signals_sent:
            self._signals_sent.add(number)
            os.kill(self._process.pid, number)  # Popen.send_signal would reap the process first

    def kill(self) -> None:
        """Kills the process and its children, unless it is reaped. Only SIGKILL is sure to end a
        process that waits in a collective."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def request_stacks(self) -> bool:
        """Asks the process to write its stacks; returns whether it was asked. Before its first
        heartbeat it has no handler and the signal would kill it, and a stopped process would not
        answer."""
        able = (
            self.alive and self._heartbeat.counter > 0 and self._observation.stopped_since is None
        )
        if able:
            os.kill(self._process.pid, signal.SIGUSR2)
        return able

    def read_stacks(self) -> str:
        """The stacks that the process has written."""
        try:
            return self._stacks_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def wait(self, deadline: float) -> bool:
        """Reaps the process, which frees its process id; returns whether it was gone by
        `deadline`."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True


def collect_stacks(
    workers: Sequence[Worker],
    observations: Sequence[failure.Observation],
    headline: str,
    *,
    first_index: int = 0,
) -> str:
    """The stacks of all living workers, each under a line with the state of its worker; takes a
    second at most.

    `first_index` is the index of the first worker in the whole group.
    """
    asked = [worker for worker in workers if worker.request_stacks()]
    deadline, sizes = time.monotonic() + _STACKS_SECONDS, [-1]
    # The stacks are complete when every file has content and no longer grows.
    while time.monotonic() < deadline and not (
        all(sizes) and sizes == [len(worker.read_stacks()) for worker in asked]
    ):
        sizes = [len(worker.read_stacks()) for worker in asked]
        time.sleep(0.1)
    parts = [headline, ""]
    for worker, each in zip(workers, observations, strict=True):
        state = "alive" if each.exit_status is None else failure.describe_exit(each.exit_status)
        state = "stopped" if each.stopped_since is not None else state
        parts += [
            f"--- process {first_index + worker.index}: {state}, {each.activity}",
            worker.read_stacks() or "(no stacks)",
            "",
        ]
    return "\n".join(parts)


def kill_all(workers: Sequence[Worker]) -> list[int]:
    """Kills all workers and their children, and returns the indices of those that are not gone
    after ten seconds."""
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + _REAP_SECONDS
    return [worker.index for worker in workers if not worker.wait(deadline)]


def _is_stopped(process: int) -> bool:
    """Whether a signal has stopped the process; a debugger's stop does not count, and without /proc
    the answer is no."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
