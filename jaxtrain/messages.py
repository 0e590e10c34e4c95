"""The words of error messages: how names and values are shown, and the nearest of the names that
would have been right."""

import difflib
import re
from collections.abc import Iterable

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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'adamw'?`, or nothing."""
    match = nearest(word, known)
    return "" if match is None else f"; did you mean {match!r}?"


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


def one_line(path: str) -> str:
    """A path or name as messages show it: as it is, or quoted if it would break the line."""
    return path if path.isprintable() else repr(path)


def is_number(text: str) -> bool:
    """Whether `text` is a plain decimal number, or one of the words for numbers that are not
    finite.

    >>> is_number("-1.5e3"), is_number("nan"), is_number("1_000")
    (True, True, False)
    """
    return bool(_FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text))
