"""Which files a corpus is made of: files, folders and globs, in an order that is the same on every
machine, and one line for whatever is wrong with a path."""

import collections
import dataclasses
import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtrain.errors import UserError
from jaxtrain.messages import Note, did_you_mean_path, printable

TEXT, LINES, PARQUET = "plain text", "JSON lines", "Parquet"
_KINDS = {".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".parquet": PARQUET}
"""By the end of a name; every other file is plain text."""
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".parquet")
"""What is read of a folder, also with .gz or .zst behind it; files of other names may be anything,
such as the description of the data."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a corpus and how it is read."""

    path: str
    kind: str
    compression: str = ""


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """The files of a corpus, sorted, and what is to be said of those that were left out."""

    files: tuple[TextFile, ...]
    notes: tuple[str, ...] = ()


def find_files(paths: str | Sequence[str]) -> TextFiles:
    """The files that paths name: each a file, a folder (its `IN_FOLDERS` files at any depth) or a
    glob (`**` goes down).

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("b.txt", "a.jsonl", "notes.md"):
    ...     _ = (folder / name).write_text("words")
    >>> found = find_files(str(folder))
    >>> [(Path(file.path).name, file.kind) for file in found.files]
    [('a.jsonl', 'JSON lines'), ('b.txt', 'plain text')]
    >>> found.notes[0].removeprefix(str(folder))
    ': 1 other file is left out (1 .md); to read them, name them, e.g. by a glob'

    Paths keep their order, and the files of each are sorted by the code points of their parts.
    Hidden files are read only where they are named. `UserError` if nothing is found, if a link
    leads nowhere, or if a file would be read twice.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths or not all(paths):
        raise UserError("no text given; give a file, a folder or a glob such as 'texts/**/*.txt'")
    notes: list[str] = []
    files = [text_file(path) for each in paths for path in _expanded(each, notes)]
    _check_each(files)
    return TextFiles(tuple(files), tuple(notes))


def text_file(path: str) -> TextFile:
    """How a file is read, by the end of its name.

    >>> text_file("a/B.JSONL.gz")
    TextFile(path='a/B.JSONL.gz', kind='JSON lines', compression='gzip')
    """
    stem, end = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(end, "")
    end = os.path.splitext(stem)[1] if compression else end
    return TextFile(path, _KINDS.get(end, TEXT), compression)


def _expanded(given: str, notes: list[str]) -> list[str]:
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        return _in_folder(path, notes)
    if os.path.lexists(path):
        return [path]
    if not glob.has_magic(path):
        raise UserError(f"{printable(path)}: no such file or folder{did_you_mean_path(path) or ''}")
    found = sorted(glob.glob(path, recursive=True), key=_parts)
    files = [each for each in found if not os.path.isdir(each)]
    if files:
        if len(found) > len(files) and "**" not in path:
            left = next(each for each in found if os.path.isdir(each))
            notes.append(
                f"{printable(path)}: folders are left out, e.g. {printable(left)}; ** goes down"
            )
        return files
    if found:
        return [file for folder in found for file in _in_folder(folder, notes)]
    raise UserError(f"{printable(path)}: no file matches")


def _in_folder(folder: str, notes: list[str]) -> list[str]:
    files, others, hidden = [], collections.Counter[str](), 0
    for path in sorted(_walk(folder), key=_parts):
        if any(part.startswith(".") for part in Path(os.path.relpath(path, folder)).parts):
            hidden += 1
        elif path.lower().removesuffix(".gz").removesuffix(".zst").endswith(IN_FOLDERS):
            files.append(path)
        else:
            others[os.path.splitext(path)[1] or "without an ending"] += 1
    most_first = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count} {end}" for end, count in most_first[:4])
    if not files:
        most = most_first[0][0] if others else ""
        remedy = f"name them by a glob, e.g. '{folder}/**/*{most}'" if "." in most else ""
        remedy = remedy or "give files, another folder or a glob"
        held = f", only {named}" if others else ""
        raise UserError(
            f"{printable(folder)}: holds no {', '.join(IN_FOLDERS)} file{held}; {remedy}"
        )
    if count := others.total():
        what = "1 other file is" if count == 1 else f"{count} other files are"
        notes.append(
            Note(
                f"{printable(folder)}: {what} left out ({named}); to read them, name them, e.g. by"
                " a glob"
            )
        )
    if hidden:
        what = "1 hidden file is" if hidden == 1 else f"{hidden} hidden files are"
        notes.append(Note(f"{printable(folder)}: {what} left out"))
    return files


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(
            f"{printable(error.filename or folder)}: cannot be read ({error.strerror})"
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        # a link to a folder may lead round in a circle, or out of the corpus
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if links:
            where = printable(os.path.join(parent, min(links)))
            raise UserError(f"{where}: is a link to a folder; name that folder itself")
        yield from (os.path.join(parent, name) for name in names)


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _check_each(files: Sequence[TextFile]) -> None:
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        name = printable(file.path)
        try:
            status = os.stat(file.path)
        except OSError as error:
            words = {
                errno.ENOENT: "is a link to nothing",
                errno.ELOOP: "is a link that goes round in a circle",
            }
            what = words.get(error.errno or 0, f"cannot be read ({error.strerror})")
            raise UserError(f"{name}: {what}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: is no regular file")
        if not os.access(file.path, os.R_OK):
            raise UserError(f"{name}: cannot be read (Permission denied)")
        place = (status.st_dev, status.st_ino)
        if place in seen:
            raise UserError(
                f"{name}: is the same file as {printable(seen[place])}; name it once (a mixture"
                " gives sources more weight)"
            )
        seen[place] = file.path
