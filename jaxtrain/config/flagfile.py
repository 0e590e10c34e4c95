"""`--flagfile=FILE`: flags from a file, one a line, as absl has it. This is the configuration file
of a run.

Blank lines and lines that start with `#` or `//` say nothing; a file may name others. What comes
later overrides what a file said: the command line after it, the lines of a file after the one that
it names. Every mistake is told with its file and line.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from jaxtrain import messages
from jaxtrain.errors import UserError

LARGEST = 2**20
"""Bytes; a file of flags is never so long, a data set or a checkpoint is."""
_FLAG = re.compile(r"--?flagfile(?:=(.*))?", re.DOTALL)
_OPPOSITES = {frozenset(pair) for pair in itertools.combinations(("steps", "epochs", "tokens"), 2)}
"""Flags of which the later replaces the other."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument, and where it was read."""

    text: str
    files: tuple[str, ...] = ()
    """The files that it came through, outermost first; none for the command line."""
    place: str = ""
    """FILE:LINE, or nothing for the command line."""

    @property
    def name(self) -> str:
        """The name of the flag, without dashes and value."""
        return self.text.lstrip("-").partition("=")[0]


def expand(argv: Sequence[str]) -> list[Argument]:
    """The arguments with those of the files in their places, without what later ones override.

    >>> [argument.text for argument in expand(["--steps=3", "--seed", "1"])]
    ['--steps=3', '--seed', '1']

    `UserError`, naming file and line, for a file that cannot be read or a line that is no flag.
    """
    found: list[Argument] = []
    rest = iter(argv)
    for text in rest:
        if text == "--":
            found += [Argument(text), *map(Argument, rest)]
            break
        if match := _FLAG.fullmatch(text):
            path = next(rest, "") if match[1] is None else match[1]
            found += _lines_of(path, (), "")
        else:
            found.append(Argument(text))
    return [
        argument
        for index, argument in enumerate(found)
        if not any(_overrides(later, argument) for later in found[index + 1 :])
    ]


def _overrides(later: Argument, earlier: Argument) -> bool:
    """Whether an argument replaces one that a file said. Two in one file, or one before the file
    and one in it, contradict each other instead."""
    if not earlier.files or later.files[: len(earlier.files)] == earlier.files:
        return False
    if not later.text.startswith("-"):
        return False
    one, other = earlier.name, later.name
    return one in (other, f"no{other}") or other == f"no{one}" or {one, other} in _OPPOSITES


def _lines_of(path: str, above: tuple[str, ...], place: str) -> Iterator[Argument]:
    file = os.path.expanduser(path)
    before = f"{place}: " if place else ""
    if not file or file.startswith("-"):
        raise UserError(f"{before}--flagfile: needs a value, e.g. --flagfile=FILE")
    if os.path.realpath(file) in map(os.path.realpath, above):
        raise UserError(f"{before}--flagfile={messages.printable(path)}: includes itself")
    for number, line in enumerate(_read(file, f"{before}--flagfile={messages.printable(path)}"), 1):
        here, text = f"{messages.printable(file)}:{number}", line.strip()
        if not text or text.startswith(("#", "//")):
            continue
        _check(text, here)
        if match := _FLAG.fullmatch(text):
            yield from _lines_of(match[1] or "", (*above, file), here)
        else:
            yield Argument(text, (*above, file), here)


def _read(file: str, flag: str) -> list[str]:
    if os.path.isdir(file):
        raise UserError(f"{flag}: is a directory, not a file of flags")
    content = b""
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        near = messages.did_you_mean_path(file)
        raise UserError(f"{flag}: no such file{near}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{messages.printable(file)}:{line}: not valid UTF-8") from None
    except (OSError, ValueError) as error:  # a NUL in its name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag}: cannot read ({reason})") from None
    if len(content) > LARGEST:
        raise UserError(f"{flag}: is larger than {messages.bytes_text(LARGEST)}; no flags")
    return text.split("\n")


def _check(text: str, here: str) -> None:
    """Refuses what other formats, or the shell, would understand and a file of flags does not."""
    bare = text.split("#")[0].strip()
    if not text.startswith("-"):
        found = re.fullmatch(r"([\w.]+)\s*(?::\s|=)\s*(.*)", bare)
        if found is None:  # what it says is not repeated: it may be any file, a key for instance
            raise UserError(f"{here}: is no flag; write one flag a line, --name=value")
        flag = f"--{found[1]}={found[2].strip(chr(34) + chr(39) + ',')}"
        raise UserError(f"{here}: {messages.shown(text)} is no flag; write {flag}")
    name, equals, value = bare.partition("=")
    if text == "--":
        raise UserError(f"{here}: '--' has no meaning in a file of flags; remove it")
    if bare != text and re.search(r"\s#", text):
        raise UserError(f"{here}: a comment needs a line of its own; write {bare}")
    if re.search(r"\s-", text):
        raise UserError(f"{here}: {messages.shown(text)} holds several flags; write one a line")
    if len(parts := name.split()) > 1 or name != name.strip() or value != value.strip():
        joined = f"{parts[0]}={value.strip() or parts[-1]}"
        raise UserError(f"{here}: {messages.shown(text)} holds blanks; write {joined}")
    if equals and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        raise UserError(f"{here}: quotes are part of a value here; write {name}={value[1:-1]}")
