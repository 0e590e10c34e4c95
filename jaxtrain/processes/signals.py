"""Stop signals: SIGINT, SIGTERM and SIGHUP ask a run to end. It says at once what it waits for,
finishes its step, saves, and exits with the status that belongs to the signal."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from jaxtrain.errors import INTERRUPTED, TRY_AGAIN
from jaxtrain.processes import heartbeat

EXIT_STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TRY_AGAIN, signal.SIGHUP: TRY_AGAIN}
"""The exit status of a run that a signal ended: a person interrupted it, or a scheduler will start
it again later."""

WAITS = {
    "starting": "ends before anything is trained",
    "joining": "ends before anything is trained",
    "data": "ends when the data is read, before anything is trained",
    "compiling": "waits for the compiler, which cannot be interrupted; nothing trained is lost",
    "training": "finishes the step and saves it",
    "evaluating": "finishes the evaluation, then saves",
    "saving": "finishes what is being saved",
    "ending": "is about to end",
}
"""What a run that is asked to end does before, by the phase that its heartbeats speak of."""
SAME_INTERRUPT_SECONDS = 0.5
"""Interrupts that follow one another faster are one Ctrl-C: `timeout`, shells and launchers send it
to a process and to its group, so that it comes twice within milliseconds."""


class StopSignals:
    """Remembers the stop signals that this process receives inside a `with` block. A signal that
    the process ignored before (nohup) stays ignored.

    >>> with StopSignals() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop.first, stop.status
    (<Signals.SIGTERM: 15>, 75)

    The first one is said on stderr when it comes, whatever the main thread does, with what the run
    waits for. With `exit_on_second_interrupt`, Ctrl-C after another stop signal ends the process at
    once; one that follows another within half a second is the same Ctrl-C. The supervisor sets it
    to False, because it must kill its workers before it exits, and each of them says its own line.
    """

    def __init__(self, *, exit_on_second_interrupt: bool = True) -> None:
        self.received: list[signal.Signals] = []
        """All stop signals so far, in the order in which they came; one Ctrl-C is there once."""
        self._interrupts = _Interrupts()
        self._exit_on_second_interrupt = exit_on_second_interrupt
        # The values are what `signal.signal` returned.
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._previous_wakeup = self._pipe = -1

    @property
    def first(self) -> signal.Signals | None:
        """The first stop signal, or None if none came."""
        return self.received[0] if self.received else None

    @property
    def status(self) -> int | None:
        """The exit status that belongs to the first signal, or None if none came."""
        return None if self.first is None else EXIT_STATUS[self.first]

    @property
    def name(self) -> str:
        """The name of the first signal, such as SIGTERM, or the empty string."""
        return "" if self.first is None else self.first.name

    @property
    def interrupted_again(self) -> bool:
        """Whether Ctrl-C came after another stop signal."""
        return signal.SIGINT in self.received[1:]

    def __enter__(self) -> Self:
        for number in EXIT_STATUS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._receive)
        if self._exit_on_second_interrupt:
            self._start_watcher()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._exit_on_second_interrupt:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._pipe)  # ends the watcher thread
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._interrupts.repeats(number):
            self.received.append(signal.Signals(number))

    def _start_watcher(self) -> None:
        """Starts a thread that reads every signal from a pipe.

        Python calls a handler only between two instructions of the main thread, so never while XLA
        compiles, and merges two signals that come meanwhile into one call. The pipe gets each
        signal when it comes.
        """
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(
            target=self._exit_at_second_interrupt, args=(reader,), name="signals", daemon=True
        ).start()

    def _exit_at_second_interrupt(self, reader: int) -> None:
        stop_requested = False
        interrupts = _Interrupts()
        while numbers := os.read(reader, 64):
            for number in numbers:
                if interrupts.repeats(number):
                    continue
                if stop_requested and number == signal.SIGINT:
                    # No handler runs and no thread is waited for: either may take minutes.
                    # Committed checkpoints stay.
                    _print_interrupted_again()
                    os._exit(EXIT_STATUS[signal.SIGINT])
                if number in self._previous_handlers and not stop_requested:
                    stop_requested = True
                    _print_received(signal.Signals(number))
        os.close(reader)


class _Interrupts:
    """Tells a new Ctrl-C from one that comes a second time on another way."""

    def __init__(self) -> None:
        self._last = -math.inf

    def repeats(self, number: int) -> bool:
        """Whether a signal that comes now is the same Ctrl-C as the last one that was new."""
        now = time.monotonic()
        if number != signal.SIGINT:
            return False
        if now - self._last < SAME_INTERRUPT_SECONDS:
            return True
        self._last = now
        return False


def _print_received(number: signal.Signals) -> None:
    # Written past Python's buffers: the main thread may hold their locks. The live line ends
    # without a newline.
    line = f"jaxtrain: {number.name}: {WAITS[heartbeat.phase()]}; Ctrl-C now ends it at once\n"
    with contextlib.suppress(OSError):
        os.write(2, (b"\n" if os.isatty(2) else b"") + line.encode())


def _print_interrupted_again() -> None:
    show_cursor = b"\x1b[?25h\n" if os.isatty(2) else b""  # the live line hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, show_cursor + b"jaxtrain: interrupted twice; nothing more is saved\n")
