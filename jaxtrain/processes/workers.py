"""The workers of one supervisor: processes that are started, looked at, asked, and ended
together."""

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
"""How long a killed process may take to be gone; one that waits for a dead disk in the kernel takes
for ever."""
_DUMP_SECONDS = 1.0


class Worker:
    """One process, in a session of its own, so that a signal to its group also reaches its children
    and Ctrl-C reaches it only through us."""

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
        self._pulse, self._stacks = folder / f"pulse-{index}", folder / f"stacks-{index}"
        paths = {
            heartbeat.PULSE: str(self._pulse),
            heartbeat.STACKS: str(self._stacks),
            heartbeat.SUPERVISED: str(os.getpid()),
        }
        self.forget()
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(open(log, "ab"))
            if output is not None:
                # the last words of a killed process are those one wants
                paths["PYTHONUNBUFFERED"] = "1"
            # Not only a group: a background group may be stopped for writing to the terminal
            # (TOSTOP), another session may not.
            self._process = subprocess.Popen(
                command,
                env={**environ, **paths},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._beat = heartbeat.Beat()
        self._seen = failure.Observation(index, now)
        self._received: set[int] = set()

    @property
    def workdir(self) -> str:
        """The run's folder, if the worker has told it."""
        return self._beat.workdir

    @property
    def wishes(self) -> tuple[int, float | None] | None:
        """How often the run may be restarted, and after how many seconds it counts as hung, if the
        worker has told it."""
        return (
            None
            if self._beat.max_restarts is None
            else (self._beat.max_restarts, self._beat.hang_seconds)
        )

    @property
    def alive(self) -> bool:
        """Whether the process had not ended when it was last looked at."""
        return self._seen.status is None

    def forget(self) -> None:
        """Removes the files through which the worker spoke."""
        for path in (self._pulse, self._stacks):
            path.unlink(missing_ok=True)

    def observe(self, now: float) -> failure.Observation:
        """What is known of the worker now."""
        if self.alive:
            status = self._status()  # before the pulse, so that a last beat is not missed
            beat = heartbeat.read(self._pulse)
            if (
                beat is not None
                and beat.counter != self._beat.counter
                and beat.phase in heartbeat.PHASES
            ):
                self._seen = dataclasses.replace(
                    self._seen, beat_at=now, phase=beat.phase, step=beat.step
                )
            self._beat = beat or self._beat
            since = (
                None
                if status is not None or not _is_stopped(self._process.pid)
                else self._seen.stopped_since or now
            )
            self._seen = dataclasses.replace(
                self._seen,
                stopped_since=since,
                status=status,
                ended_at=None if status is None else now,
            )
        return self._seen

    def _status(self) -> int | None:
        """How the process ended, as `subprocess` has it, or None. It is not reaped: as a zombie it
        keeps its number, which no stranger can get."""
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def forgive(self, seconds: float) -> None:
        """Leaves out of account a time in which nobody looked."""
        since = self._seen.stopped_since
        self._seen = dataclasses.replace(
            self._seen,
            beat_at=self._seen.beat_at + seconds,
            stopped_since=None if since is None else since + seconds,
        )

    def send(self, number: int) -> None:
        """Sends a signal to the process alone, once."""
        if self.alive and number not in self._received:
            self._received.add(number)
            os.kill(self._process.pid, number)  # Popen's own way would reap it first

    def kill(self) -> None:
        """Kills the process and its children, until it is reaped; no other signal is sure to end
        one that waits in a collective."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def ask_for_stack(self) -> bool:
        """Asks the process to write its stacks; it must have a pulse, for without its handler the
        signal would end it, and not be stopped."""
        asked = self.alive and self._beat.counter > 0 and self._seen.stopped_since is None
        if asked:
            os.kill(self._process.pid, signal.SIGUSR2)
        return asked

    def stacks(self) -> str:
        """What the process wrote when it was asked."""
        try:
            return self._stacks.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def wait(self, until: float) -> bool:
        """Whether the process is gone by the time `until`; it is reaped then, and its number may be
        given to another."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True


def dump_stacks(
    workers: Sequence[Worker], seen: Sequence[failure.Observation], headline: str, *, first: int = 0
) -> str:
    """The stacks of all workers that live, each under a line that says how it is; takes a second at
    most.

    `first` is the index that the first of them has in the whole group.
    """
    asked = [worker for worker in workers if worker.ask_for_stack()]
    until, sizes = time.monotonic() + _DUMP_SECONDS, [-1]
    # A dump is whole when it has begun and no longer grows.
    while time.monotonic() < until and not (
        all(sizes) and sizes == [len(worker.stacks()) for worker in asked]
    ):
        sizes = [len(worker.stacks()) for worker in asked]
        time.sleep(0.1)
    parts = [headline, ""]
    for worker, each in zip(workers, seen, strict=True):
        state = "alive" if each.status is None else failure.cause(each.status)
        state = "stopped" if each.stopped_since is not None else state
        parts += [
            f"--- process {first + worker.index}: {state}, {each.doing}",
            worker.stacks() or "(no stacks)",
            "",
        ]
    return "\n".join(parts)


def end(workers: Sequence[Worker]) -> list[int]:
    """Kills all workers and their children, and returns those that did not die of it."""
    for worker in workers:
        worker.kill()
    until = time.monotonic() + _REAP_SECONDS
    return [worker.index for worker in workers if not worker.wait(until)]


def _is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal; a debugger's stop is none. Unknown where there is
    no /proc."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
