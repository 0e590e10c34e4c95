"""The live line: how far a run is, on one line that never wraps; plain lines where there is no
terminal.

    ⠙ 1,240/2,000 ━━━━━━━━╸─────  loss 0.0312 ▇▅▄▃▂▁  accuracy 99.10%  48.2k ex/s  1.2 GB  MFU 41.3%
    0:12 left

Nothing here may end a run: output that can't be written (a closed pipe, a terminal that is gone) is
dropped in silence.
"""

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from jaxtrain.messages import bytes_text
from jaxtrain.report.metrics_file import is_clock
from jaxtrain.report.terminal.tables import clean, duration_text, rate_text, value_text

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SPARKS = "▁▂▃▄▅▆▇█"
TICK_SECONDS = 0.2
NOT_SHOWN_AS_METRIC = ("loss", "learning_rate", "grad_norm", "epoch", "tokens")
"""Values that the line doesn't show as the metric beside the loss."""


class Progress:
    """Shows a run's progress on `stream` (standard output by default).

    >>> progress = Progress(2000, live=False, plain_seconds=0)
    >>> progress.start()
    >>> progress.update(
    ...     200, {"loss": 0.3124, "accuracy": 0.912}, per_second=48210.0, eta_seconds=34
    ... )
    step 200/2,000  loss 0.3124  accuracy 91.20%  48.2k examples/s  0:34 left
    >>> progress.evaluation(200, "validation", {"loss": 0.298, "accuracy": 0.93}, best=True)
    step 200  validation  loss 0.2980  accuracy 93.00%  best so far
    >>> progress.stop()

    `live` is found out by default: a terminal that isn't dumb. Without it at most one line every
    `plain_seconds` is printed, and always that of the last step. `quiet` shows nothing: for the
    processes of a run other than the first. Methods take plain numbers: nothing here waits for a
    device.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        plain_seconds: float = 2.0,
        quiet: bool = False,
        unit: str = "examples",
    ) -> None:
        self.total_steps = total_steps
        self.plain_seconds = plain_seconds
        self.console = make_console(stream)
        self.console.quiet = quiet
        # Not `console.is_terminal`: FORCE_COLOR makes that true for files as well.
        self.live = (
            self.console.file.isatty() and not self.console.is_dumb_terminal
            if live is None
            else live
        ) and not quiet
        self._line = _Line(total_steps, self.console.encoding.startswith("utf"), unit)
        self._display: Live | None = None
        self._printed = -float("inf")
        self._lock = threading.RLock()
        self._stopped = threading.Event()

    def start(self, step: int = 0, phase: str = "compiling") -> None:
        """Begins at `step`; until the first `update` the live line says what is going on, such as
        `compiling`."""
        self._line.begin(step, phase)
        if self.live and self._display is None:
            self._display = Live(
                self._line, console=self.console, auto_refresh=False, vertical_overflow="crop"
            )
            self._ignoring_errors(self._display.start)
            self._stopped.clear()
            # Rich's own refresh thread would print a traceback when the terminal goes away.
            threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def update(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        per_second: float | None = None,
        eta_seconds: float | None = None,
        memory_bytes: float | None = None,
        mfu: float | None = None,
        seen: int | None = None,
    ) -> None:
        """Takes the numbers of a step; what is None isn't shown. `per_second` and `seen`, those so
        far, count units, `mfu` is in 0..1."""
        speed = {
            "per_second": per_second,
            "memory_bytes": memory_bytes,
            "mfu": mfu,
            "seen": seen,
        }
        self._line.set(step, values, speed, eta_seconds)
        now = time.monotonic()
        if self._display is None and (
            now - self._printed >= self.plain_seconds or step >= self.total_steps
        ):
            self._printed = now
            self._print(Text(self._line.plain()))

    def phase(self, text: str) -> None:
        """Says what the run does besides stepping, such as `evaluating`; an empty text or the next
        `update` ends it."""
        self._line.phase = clean(text)

    def line(self, text: str, *, style: str = "") -> None:
        """Prints a note above the live line; control characters in it are made visible."""
        self._print(Text(clean(text), style=style))

    def evaluation(
        self, step: int, split: str, values: Mapping[str, float], *, best: bool = False
    ) -> None:
        """Prints the result of an evaluation above the live line."""
        shown = [
            f"{clean(key)} {value_text(key, value)}"
            for key, value in values.items()
            if not is_clock(key)
        ]
        text = Text("  ").join(
            [Text(f"step {step:,}"), Text(clean(split), style="bold"), *map(Text, shown)]
        )
        self._print(text.append("  best so far", style="green") if best else text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Prints a text of a language model above the live line, behind a bar at its left; the
        prompt is bold."""
        bar = "│" if self.console.encoding.startswith("utf") else "|"
        shown = Text("  ").join([Text(f"step {step:,}"), Text("sample", style="bold")])
        marked = Text(clean(prompt.expandtabs(4)), style="bold")
        marked.append(clean(text.expandtabs(4)), style="not bold")
        for line in marked.split("\n", allow_blank=True):
            shown.append("\n").append(f"  {bar} ", style="dim").append_text(line)
        self._print(shown)

    def show(self, renderable: Any) -> None:
        """Prints a table or panel (see `tables.py`) above the live line."""
        self._print(renderable)

    def stop(self) -> None:
        """Leaves the line as it is and frees the terminal; calling it twice is allowed."""
        display, self._display = self._display, None
        if display is not None:
            self._stopped.set()
            self._line.phase = ""
            self._line.stopped = True
            with self._lock:
                self._ignoring_errors(display.refresh)
                self._ignoring_errors(display.stop)

    def _tick(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            display = self._display
            with self._lock:
                if display is not None and not self._stopped.is_set():
                    self._ignoring_errors(display.refresh)

    def _print(self, renderable: Any) -> None:
        with self._lock:
            self._ignoring_errors(
                self.console.print,
                renderable,
                soft_wrap=isinstance(renderable, Text) and not self.live,
            )

    def _ignoring_errors(self, action: Any, *arguments: Any, **options: Any) -> None:
        try:
            action(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - a failed drawing must not end a run
            self.last_error = error


def make_console(stream: TextIO | None = None) -> Console:
    """A rich console that survives its stream: nothing written to it raises, whatever became of the
    other end."""
    stream = sys.stdout if stream is None else stream
    width = (
        None
        if stream is not None and _is_terminal(stream)
        else int(os.environ.get("COLUMNS") or 100)
    )
    return Console(
        file=cast(TextIO, _SafeStream(stream)),
        width=width,
        highlight=False,
        markup=False,
        emoji=False,
    )


class _SafeStream:
    """A text stream that accepts everything, and drops it once the stream behind it is broken."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def isatty(self) -> bool:
        return self._stream is not None and _is_terminal(self._stream)

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no file")
        return self._stream.fileno()

    def _call(self, method: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except UnicodeEncodeError:
            self._call(method, *(text.encode("ascii", "replace").decode() for text in arguments))
        except (OSError, ValueError):
            broken, self._stream = self._stream, None
            _redirect_to_devnull(broken)


def _redirect_to_devnull(stream: TextIO) -> None:
    """Points the stream's descriptor at /dev/null; else Python fails at exit (status 120) when it
    flushes what is left in the buffer."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        pass


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError, OSError):
        return False


class _Line:
    """The numbers of the line, and how they are drawn in the width that there is."""

    def __init__(self, total_steps: int, unicode: bool, unit: str) -> None:
        self.total_steps = total_steps
        self.unicode, self._unit = unicode, unit
        self.phase = ""
        self.stopped = False
        self._began = time.monotonic()
        self._losses: deque[float] = deque(maxlen=200)
        self._step, self._parts, self._eta, self._eta_set = 0, {}, None, 0.0

    def begin(self, step: int, phase: str) -> None:
        self._step, self.phase, self.stopped, self._began = (
            step,
            clean(phase),
            False,
            time.monotonic(),
        )

    def set(
        self,
        step: int,
        values: Mapping[str, float],
        speed: Mapping[str, float | None],
        eta_seconds: float | None,
    ) -> None:
        self._step, self.phase, self._eta, self._eta_set = step, "", eta_seconds, time.monotonic()
        if "loss" in values:
            self._losses.append(values["loss"])
        metric = next(
            (key for key in values if key not in NOT_SHOWN_AS_METRIC and not is_clock(key)), None
        )
        shown = {
            key: f"{clean(key)} {value_text(key, values[key])}"
            for key in ("loss", metric)
            if key is not None and key in values
        }
        rate, memory, mfu = speed["per_second"], speed["memory_bytes"], speed["mfu"]
        seen = speed.get("seen")
        shown["seen"] = "" if seen is None else f"{rate_text(seen)} {self._unit}"
        shown["rate"] = "" if rate is None else f"{rate_text(rate)} {self._unit}/s"
        shown["memory"] = "" if memory is None else bytes_text(memory)
        shown["mfu"] = "" if mfu is None else f"MFU {100 * mfu:.1f}%"
        self._parts = {key: text for key, text in shown.items() if text}

    def plain(self) -> str:
        left = (
            []
            if self._eta is None or self._step >= self.total_steps
            else [f"{duration_text(self._eta)} left"]
        )
        return "  ".join(
            [f"step {self._step:,}/{self.total_steps:,}", *self._parts.values(), *left]
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(options.max_width)

    def draw(self, width: int) -> Text:
        """One line of at most `width` columns; what matters least leaves first."""
        now = time.monotonic()
        parts: list[tuple[str, str, str]] = [
            ("mark", self._spinner(now), "green" if self._step >= self.total_steps else "cyan")
        ]
        parts.append(("step", f"{self._step:,}/{self.total_steps:,}", "bold"))
        parts += [(key, text, "bold" if key == "loss" else "") for key, text in self._parts.items()]
        parts.append(("left", self._time_text(now), "cyan"))
        parts = [part for part in parts if part[1]]
        # In the order in which they go when the terminal is narrow.
        for key in (
            "mfu",
            "memory",
            "rate",
            *(key for key in self._parts if key != "loss"),
            "left",
            "loss",
            "mark",
        ):
            if sum(len(text) + 1 + (key != "mark") for key, text, _ in parts) - 1 > width:
                parts = [part for part in parts if part[0] != key]
        used = sum(len(text) + 1 + (key != "mark") for key, text, _ in parts)
        spark, bar = self._split(width - used)
        line = Text(no_wrap=True, overflow="crop", end="")
        for key, text, style in parts:
            line.append(text, style).append(" " if key == "mark" else "  ")
            if key == "step" and bar:
                line.append_text(self._bar(bar)).append("  ")
            if key == "loss" and spark:
                line.append(self._sparkline(spark), "cyan").append("  ")
        line.rstrip()
        line.truncate(width)
        return line

    def _split(self, room: int) -> tuple[int, int]:
        """How many columns the sparkline and the bar take of `room`; neither if that is too few to
        say anything."""
        spark = (
            min(12, len(self._losses))
            if self.unicode and len(self._losses) > 2 and room >= 24
            else 0
        )
        room -= spark + 2 if spark else 0
        bar = min(24, room - 3)
        return spark, bar if bar >= 6 else 0

    def _spinner(self, now: float) -> str:
        if self._step >= self.total_steps:
            return "✓" if self.unicode else "+"
        frames = SPINNER if self.unicode else "|/-\\"
        return (
            ("■" if self.unicode else "*")
            if self.stopped
            else frames[int(now / TICK_SECONDS) % len(frames)]
        )

    def _time_text(self, now: float) -> str:
        if self.phase:
            return (
                f"{self.phase} {duration_text(now - self._began)}"
                if self.phase == "compiling"
                else self.phase
            )
        if self._step >= self.total_steps or self.stopped:
            return duration_text(now - self._began)
        return (
            ""
            if self._eta is None
            else f"{duration_text(max(self._eta - (now - self._eta_set), 0))} left"
        )

    def _bar(self, width: int) -> Text:
        done = min(max(self._step / max(self.total_steps, 1), 0.0), 1.0) * width
        full = int(done)
        if not self.unicode:
            return Text("#" * full + "." * (width - full))
        half = "╸" if done - full >= 0.5 else ""
        return Text("━" * full + half, "cyan").append("─" * (width - full - len(half)), "dim")

    def _sparkline(self, width: int) -> str:
        """The losses so far, averaged into `width` columns; a non-finite one is a cross."""
        losses = list(self._losses)
        edges = [len(losses) * column // width for column in range(width + 1)]
        means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        finite = [mean for mean in means if abs(mean) < float("inf")]
        low, span = (
            min(finite, default=0.0),
            (max(finite, default=0.0) - min(finite, default=0.0)) or 1.0,
        )
        return "".join(
            SPARKS[int((mean - low) / span * 7.99)] if abs(mean) < float("inf") else "×"
            for mean in means
        )
