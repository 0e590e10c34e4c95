"""Signals: a run that is asked to end finishes its step, saves, and says so by its exit status."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import ClassVar, Self

from jaxtrain.errors import INTERRUPTED, TRY_AGAIN

STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TRY_AGAIN, signal.SIGHUP: TRY_AGAIN}
"""Interrupted by a person, or told to try again later."""


class Stop:
    """Remembers the first signal that asks the run to end; Ctrl-C after it ends the run at once.
    Signals that are ignored (nohup) stay so.

    >>> with Stop() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop.status
    75
    """

    statuses: ClassVar = {int(number): status for number, status in STATUS.items()}
    """The exit status by the number of the signal."""
    names: ClassVar = {int(number): number.name for number in STATUS}

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._previous_wakeup = self._pipe = -1

    @property
    def status(self) -> int | None:
        """The exit status that the signal asks for, or None if none came."""
        return None if self._received is None else STATUS[self._received]

    @property
    def name(self) -> str:
        """What the signal is called, such as SIGTERM."""
        return "" if self._received is None else self._received.name

    @property
    def number(self) -> int:
        """The signal's number, or 0."""
        return 0 if self._received is None else int(self._received)

    def __enter__(self) -> Self:
        for number in STATUS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        # Python runs handlers between two of the main thread's own instructions, so not while XLA
        # compiles, and takes two signals that came meanwhile for one. The pipe hears of each as it
        # comes.
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._pipe)  # ends the thread
        for number, handler in self._previous.items():
            # What signal.signal itself gave.
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)

    def _watch(self, reader: int) -> None:
        asked = False
        while numbers := os.read(reader, 64):
            for number in numbers:
                if asked and number == signal.SIGINT:
                    # At once means at once: no handlers, no threads to wait for. What is committed
                    # stays committed.
                    _say_at_once()
                    os._exit(STATUS[signal.SIGINT])
                asked = asked or number in self._previous
        os.close(reader)


def _say_at_once() -> None:
    shown = b"\x1b[?25h\n" if os.isatty(2) else b""  # the live line hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, shown + b"jaxtrain: interrupted twice; nothing more is saved\n")
