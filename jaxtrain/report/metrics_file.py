"""Writers: they write the numbers of a run to metrics.jsonl and to trackers.

`metrics.jsonl` is the complete record: it is written durably before a step is committed, and cut
back to the committed offset when a run resumes, so that no line is lost or repeated. Trackers
(`trackers.py`) hold copies to look at; `Writers` lets them fail without ending a run.
"""

import contextlib
import io
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.errors import UserError
from jaxtrain.messages import one_line

FIRST_KEYS = ("step", "split", "loss", "accuracy")
CLOCK_SUFFIXES = ("_seconds", "_per_second")
NON_FINITE = ("NaN", "Infinity", "-Infinity")


class Writer(Protocol):
    """Something that takes the numbers of a step."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Takes the values of one step of one split."""
        ...

    def rewind(self, step: int) -> None:
        """Drops what was written of steps after `step`, after which the run resumes."""
        ...

    def close(self) -> None:
        """Ends the writing; calling it twice is allowed."""
        ...


class AppendedLines:
    """A file of JSON objects, one a line, which is cut back when a run resumes.

    An `OSError` (a full disk) reaches the caller, so that no line is ever missing in silence.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.BufferedWriter(io.FileIO(self.path, "ab"))
        _sync_folder(self.path.parent)
        self._last_step = -1

    def append(self, step: int, line: Mapping[str, Any]) -> None:
        """Appends one line; the reader of `tail -f` sees it at once. `UserError` if `step` is
        smaller than the one before."""
        if step < self._last_step:
            raise UserError(
                f"{self.path}: step {step} after step {self._last_step}: steps must ascend"
            )
        with _named(self.path):
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        self._last_step = step

    def sync(self) -> int:
        """Makes every line so far durable; returns the byte offset to store in the commit of this
        step."""
        with _named(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def truncate(self, offset: int) -> None:
        """Cuts the file to the offset of the commit that the run resumes from.

        `UserError` if the file is shorter than that or the offset isn't the end of a line: then it
        isn't the file that was committed.
        """
        size = self.sync()
        if offset > size:
            raise UserError(
                f"{self.path}: {size} bytes, but the checkpoint was committed at {offset}; restore"
                " the file, or use a new --workdir"
            )
        with open(self.path, "rb") as file:
            file.seek(max(offset - 1, 0))
            if offset and file.read(1) != b"\n":
                raise UserError(
                    f"{self.path}: byte {offset} is not the end of a line; restore the file, or use"
                    " a new --workdir"
                )
        self._file.truncate(offset)
        self._last_step = -1
        self.sync()

    def close(self) -> None:
        """Makes all durable and closes the file."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                with _named(self.path):
                    self._file.close()


class JsonlWriter(AppendedLines):
    """Writes metrics.jsonl: one JSON object a line, appended to `path`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> writer = JsonlWriter(path)
    >>> writer.write(50, "train", {"examples_per_second": 9.5, "loss": 0.25})
    >>> print(path.read_text().strip())
    {"step": 50, "split": "train", "loss": 0.25, "examples_per_second": 9.5}
    >>> writer.close()

    Floats keep every bit; non-finite ones become the strings "NaN", "Infinity" and "-Infinity",
    which Python's `float` and JavaScript's `Number` read back. Clock keys come last.
    """

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line, see `append`."""
        line = {"step": int(step), "split": split} | {
            key: _json_number(values[key]) for key in sorted(values, key=_key_order)
        }
        self.append(step, line)

    def rewind(self, step: int) -> None:
        """Does nothing: this file is cut back by `truncate`, to an offset in bytes."""


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of the file: that of a write has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Writers:
    """The metrics file and any number of trackers; only the metrics file may fail the run.

    >>> import tempfile
    >>> writers = Writers(JsonlWriter(Path(tempfile.mkdtemp()) / "metrics.jsonl"))
    >>> writers.write(1, "train", {"loss": 0.5})
    >>> writers.sync()
    43
    >>> writers.close()

    A tracker that raises is counted in `failures` (by class name), and its first error is passed to
    `note`; it stays in use, as it may recover. `metrics` is None in a process that writes nothing:
    every process of a run calls the same methods, and only process 0 has a file.
    """

    def __init__(
        self,
        metrics: JsonlWriter | None,
        others: Sequence[Writer] = (),
        *,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.metrics = metrics
        self.others = tuple(others)
        self.failures: dict[str, int] = {}
        self._note = note or warn_on_stderr

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes to all, the metrics file first."""
        if self.metrics is not None:
            self.metrics.write(step, split, values)
        self._each("write", step, split, values)

    def sync(self) -> int:
        """See `JsonlWriter.sync`."""
        return 0 if self.metrics is None else self.metrics.sync()

    def resume(self, step: int, offset: int) -> None:
        """Drops from all writers what was written after `step`, whose commit stores `offset`."""
        if self.metrics is not None:
            self.metrics.truncate(offset)
        self._each("rewind", step)

    def close(self) -> None:
        """Closes all; the metrics file first."""
        try:
            if self.metrics is not None:
                self.metrics.close()
        finally:
            self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self.others:
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is not worth a run
                name = type(writer).__name__
                self.failures[name] = self.failures.get(name, 0) + 1
                if self.failures[name] == 1:
                    self._note(
                        f"{name}: {one_line(f'{type(error).__name__}: {error}')}; training goes on"
                        " without it"
                    )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, non-finite numbers restored; a missing file has none, a torn
    last line is left out.

    >>> read_metrics("/nonexistent/metrics.jsonl")
    []

    `UserError` if another line is not a JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return list(_parse(content, str(path)))


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file of samples (`step`, `prompt`, `text`), without those that are none.

    >>> read_samples("/nonexistent/samples.jsonl")
    []
    """
    found = []
    with contextlib.suppress(OSError):
        for line in Path(path).read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                kinds = {"step": int, "prompt": str, "text": str}
                if isinstance(values, dict) and all(
                    isinstance(values.get(name), kind) for name, kind in kinds.items()
                ):
                    found.append(values)
    return found


def is_clock(key: str) -> bool:
    """Whether a value comes from a clock, so that it differs between two runs that are otherwise
    equal in every bit.

    >>> is_clock("step_seconds"), is_clock("loss")
    (True, False)
    """
    return key.endswith(CLOCK_SUFFIXES)


def _parse(content: bytes, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            values = dict(json.loads(line).items())
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} is not a JSON object; remove it or restore the file"
            ) from error
        yield {
            key: float(value) if key != "split" and value in NON_FINITE else value
            for key, value in values.items()
        }


def _json_number(value: Any) -> int | float | str:
    try:
        return int(operator.index(value))
    except TypeError:
        number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _key_order(key: str) -> tuple[bool, int, str]:
    return is_clock(key), FIRST_KEYS.index(key) if key in FIRST_KEYS else len(FIRST_KEYS), key


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def warn_on_stderr(text: str) -> None:
    """Prints a warning to standard error: the default of `note`."""
    print(f"jaxtrain: warning: {text}", file=sys.stderr)
