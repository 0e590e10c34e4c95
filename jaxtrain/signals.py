"""Signals: a run that is asked to end finishes its step, saves, and says so by its exit status."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Self

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
"""Interrupted by a person, or told to try again later."""


class Stop:
    """Remembers the first signal that asks the run to end; a second Ctrl-C ends it at once.

    >>> with Stop() as stop:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     stop.status
    75
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def status(self) -> int | None:
        """The exit status that the signal asks for, or None if none came."""
        return None if self._received is None else STATUS[self._received]

    @property
    def name(self) -> str:
        """What the signal is called, such as SIGTERM."""
        return "" if self._received is None else self._received.name

    def __enter__(self) -> Self:
        for number in STATUS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself gave

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            # At once means at once: no handlers, no threads to wait for. What is committed stays committed.
            sys.stderr.write("\x1b[?25h\njaxtrain: interrupted twice; nothing more is saved\n")
            sys.stderr.flush()
            os._exit(STATUS[signal.SIGINT])
        if self._received is None:
            self._received = signal.Signals(number)
