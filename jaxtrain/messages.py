"""The words of messages: how names, values and sizes are shown, and the nearest of the names or
numbers that would have been right."""

import contextlib
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_FLOAT = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like `word`, whatever its case, or None if none is much like it.

    >>> nearest("adamW", ["adam", "adamw", "sgd"])
    'adamw'
    """
    by_lower = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def likeness(word: str, other: str) -> float:
    """How alike two names are, whatever their case, from 0 to 1.

    >>> likeness("Adam", "adam"), round(likeness("adam", "adamw"), 2)
    (1.0, 0.89)
    """
    return difflib.SequenceMatcher(None, other.lower(), word.lower()).ratio()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'adamw'?`, or nothing."""
    match = nearest(word, known)
    return "" if match is None else f"; did you mean {match!r}?"


def did_you_mean_path(path: str) -> str:
    """The end of a message about a missing path: the nearest name in its folder, if one is near."""
    parent = Path(path).parent
    if Path(path).is_symlink():
        return "; it is a link to nothing"
    readable = parent.is_dir() and os.access(parent, os.R_OK)
    match = nearest(Path(path).name, os.listdir(parent) if readable else [])
    if match is None:
        return ""
    return f"; in {printable(str(parent))}: {printable(match)}; did you mean it?"


def nearest_divisors(whole: int, value: int) -> str:
    """The divisors of `whole` next to `value`, in words.

    >>> nearest_divisors(32, 3), nearest_divisors(32, 100)
    ('2 or 4', '32')
    """
    small = [number for number in range(1, int(whole**0.5) + 1) if whole % number == 0]
    divisors = sorted({*small, *(whole // number for number in small)})
    below = [number for number in divisors if number <= value][-1:]
    above = [number for number in divisors if number > value][:1]
    return " or ".join(map(str, below + above))


def nearest_multiples(of: int, value: int) -> str:
    """The positive multiples of `of` next to `value`, which is none itself, in words.

    >>> nearest_multiples(8, 10), nearest_multiples(8, 3)
    ('8 or 16', '8')
    """
    below = value // of * of
    return " or ".join(str(number) for number in (below, below + of) if number > 0)


def shown(text: str) -> str:
    """A typed value as messages show it: numbers as they are, anything else quoted, on one line,
    not endless."""
    short = text if len(text) <= 80 else text[:60] + "..." + text[-10:]
    return short if is_number(text) else repr(short)


def printable(name: str) -> str:
    """A path or name as messages show it: as it is, or quoted if it would break the line.

    >>> printable("runs/a b"), printable("runs/a\\nb")
    ('runs/a b', "'runs/a\\\\nb'")
    """
    return name if name.isprintable() else repr(name)


def print_out(text: str) -> None:
    """Prints what was asked for, such as help. A reader that has seen enough (`| head`) is no
    error; `OSError` if the output cannot be written otherwise."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is still buffered must not raise again when Python closes the stream.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def open_standard_streams() -> None:
    """Gives a process whose standard streams were closed (`>&-`) streams that lead nowhere: a file
    that is opened later must not become its output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class Note(str):
    """A line that tells something and warns of nothing; `warn` labels it so."""


def warn(text: str) -> None:
    """One line of warning on stderr, or a `Note`."""
    label = "note" if isinstance(text, Note) else "warning"
    # a pipe that nobody reads any more; a warning is not worth a run
    with contextlib.suppress(OSError):
        print(f"jaxtrain: {label}: {text}", file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural but for one.

    >>> counted(1, "document"), counted(1200, "row")
    ('1 document', '1,200 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    """A message of any length and shape as one line of at most 200 characters.

    >>> one_line("it\\n  broke")
    'it broke'
    """
    return " ".join(text.split())[:200]


def is_number(text: str) -> bool:
    """Whether `text` is a plain decimal number, or one of the words for numbers that are not
    finite.

    >>> is_number("-1.5e3"), is_number("nan"), is_number("1_000")
    (True, True, False)
    """
    return bool(_FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text))


def bytes_text(size: float) -> str:
    """Bytes in decimal units, as NVIDIA and disks count them.

    >>> bytes_text(999), bytes_text(1_234_567), bytes_text(141e9)
    ('999 B', '1.2 MB', '141 GB')
    """
    return scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def scaled(number: float, units: Sequence[str]) -> str:
    """A number in the largest of the units, each a thousand of the one before, that it fills.

    >>> scaled(36_500_000, ("", "k", "M"))
    '36.5 M'
    """
    if not math.isfinite(number):
        return f"{number} {units[0]}"
    index = 0
    while abs(number) >= 999.5 and index < len(units) - 1:
        number, index = number / 1000, index + 1
    whole = (index == 0 and number == int(number)) or abs(number) >= 99.95
    return f"{number:.{0 if whole else 1}f} {units[index]}"
