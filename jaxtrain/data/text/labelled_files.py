"""Texts with a label each: out of CSV, JSON lines and Parquet, or of a folder of .txt files for
each class."""

import codecs
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.data.text import documents
from jaxtrain.data.text.documents import WHOLE, Bad, Part
from jaxtrain.data.text.text_files import LINES, PARQUET, TextFile, find_files, text_file
from jaxtrain.errors import UserError
from jaxtrain.messages import Note, did_you_mean, one_line, printable

SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What files and folders of a split are called."""
_TABLES = {".csv": ",", ".tsv": "\t"}
"""What stands between the cells of a row."""
KEYS = ("text_key", "label_key")
"""The flags that name the columns."""
_ENDS = (*_TABLES, ".jsonl", ".ndjson", ".parquet")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text, its label as it is written, if the file tells it, and the row of the file."""

    text: str
    label: str | None
    row: int


class BadRow(Exception):
    """What is wrong with a row, without its place."""


@dataclasses.dataclass(frozen=True)
class LabelledFile:
    """A file, the split that its name says, and the label that its folder says of a plain text."""

    file: TextFile
    split: str = "all"
    label: str = ""


def find_labelled(path: str) -> tuple[list[LabelledFile], list[str]]:
    """The files that a path names, and what is to be said of those that were left out.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("ham", "spam"):
    ...     (folder / name).mkdir()
    ...     _ = (folder / name / "0.txt").write_text("words")
    >>> [each.label for each in find_labelled(str(folder))[0]]
    ['ham', 'spam']

    Files or folders called train, test, ... are the splits of those names; otherwise there is one,
    called all. `UserError` if there is nothing to read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = [LabelledFile(file) for file in find_files(path).files]
        plain = next((each.file.path for each in found if not _is_table(each.file)), None)
        if plain is not None:
            raise UserError(
                f"{printable(plain)}: is no CSV (.csv, .tsv), JSON lines (.jsonl) or Parquet, so"
                " nothing tells the labels; give one of those, or a folder that holds a folder of"
                " .txt files for each class"
            )
        return found, []
    files = [each for each in sorted(folder.rglob("*")) if each.is_file() and not _hidden(each)]
    chosen = [each for each in files if _is_table(text_file(str(each)))]
    in_classes = not chosen
    if in_classes:
        chosen = [each for each in files if each.suffix == ".txt" and each.parent != folder]
    if not chosen:
        raise UserError(
            f"{printable(str(folder))}: holds neither {', '.join(_ENDS)} files nor a folder of .txt"
            " files for each class"
        )
    left = len(files) - len(chosen)
    what = "1 other file is" if left == 1 else f"{left:,} other files are"
    notes: list[str] = [Note(f"{printable(str(folder))}: {what} left out")] if left else []
    return [_in_folder(each, folder, in_classes) for each in _split_alike(chosen, folder)], notes


def _is_table(file: TextFile) -> bool:
    return file.kind in (LINES, PARQUET) or _cells_end(file) is not None


def _cells_end(file: TextFile) -> str | None:
    name = file.path.lower()
    name = name.removesuffix(".gz").removesuffix(".zst") if file.compression else name
    return next((mark for end, mark in _TABLES.items() if name.endswith(end)), None)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _split_of(path: Path, folder: Path) -> str | None:
    first = path.relative_to(folder).parts[0]
    return SPLITS.get(first.partition(".")[0].lower())


def _split_alike(files: list[Path], folder: Path) -> list[Path]:
    """The files; `UserError` if only some of them are of a split, for nothing tells what the others
    are."""
    of_splits = [path for path in files if _split_of(path, folder)]
    if of_splits and len(of_splits) < len(files):
        other = next(path for path in files if not _split_of(path, folder))
        raise UserError(
            f"{printable(str(folder))}: {printable(str(of_splits[0].relative_to(folder)))} is of a"
            f" split, {printable(str(other.relative_to(folder)))} of none; name all of them train,"
            " validation or test, or none"
        )
    return files


def _in_folder(path: Path, folder: Path, in_classes: bool) -> LabelledFile:
    split = _split_of(path, folder)
    file = text_file(str(path))
    if not in_classes:
        return LabelledFile(file, split or "all")
    parts = path.relative_to(folder).parts[bool(split) :]
    if len(parts) < 2:
        raise UserError(
            f"{printable(str(path))}: lies in no folder of a class; put it into one, or remove it"
        )
    return LabelledFile(file, split or "all", parts[0])


def read_part(
    file: TextFile, text_key: str, label_key: str, part: Part = WHOLE
) -> Iterator[Labelled | Bad]:
    """The labelled texts of a file, or of a part of it, in order, and the rows that are none."""
    readers = {LINES: _lines, PARQUET: _parquet}
    keys = text_key, label_key
    with documents.reading(file):
        for row, value in readers.get(file.kind, _cells)(file, keys, part):
            try:
                yield _labelled(value, keys, row)
            except BadRow as fault:
                yield Bad(row, str(fault))


def read_texts(file: TextFile, text_key: str) -> Iterator[Labelled | Bad]:
    """The texts of a file, in order, whether or not it has labels, and the rows that are none."""
    readers = {LINES: _lines, PARQUET: _parquet}
    with documents.reading(file):
        for row, value in readers.get(file.kind, _cells)(file, (text_key,), WHOLE):
            try:
                yield _labelled(value, (text_key,), row)
            except BadRow as fault:
                yield Bad(row, str(fault))


def read_whole(file: TextFile) -> Iterator[Labelled | Bad]:
    """The text that a file is, whose folder tells the label."""
    for found in documents.read_part(file, documents.Format()):
        if isinstance(found, Bad):
            yield found
        elif found.text.strip():
            yield Labelled(found.text, None, found.row)
        else:
            yield Bad(found.row, "holds nothing but spaces")


def check_columns(file: TextFile, text_key: str, label_key: str) -> None:
    """`UserError` if a file of Parquet lacks one of the columns."""
    if file.kind == PARQUET:
        _open_parquet(file, (text_key, label_key)).close()


def _labelled(value: Mapping[str, Any] | BadRow, keys: tuple[str, ...], row: int) -> Labelled:
    if isinstance(value, BadRow):
        raise value
    for key, flag in zip(keys, KEYS, strict=False):
        if key not in value:
            names = ", ".join(map(repr, list(value)[:8])) or "none"
            raise BadRow(
                f"has no {key!r}, but {names}{did_you_mean(key, value)} (--data.{flag} names it)"
            )
    text, label_key = value[keys[0]], keys[-1]
    if not isinstance(text, str):
        raise BadRow(f"{keys[0]!r} is a {type(text).__name__}, no text")
    if not text.strip():
        raise BadRow(f"{keys[0]!r} is empty")
    label = value[label_key] if len(keys) > 1 else None
    try:
        f"{text}{label}".encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"holds half a character (U+{ord(error.object[error.start]):04X})") from None
    if len(keys) == 1:
        return Labelled(text, None, row)
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int):
        what = "null" if label is None else f"a {type(label).__name__} ({label!r:.40})"
        raise BadRow(f"{label_key!r} is {what}, no class: a class is a text or a whole number")
    if not str(label).strip():
        raise BadRow(f"{label_key!r} is empty")
    return Labelled(text, str(label), row)


Rows = Iterator[tuple[int, Mapping[str, Any] | BadRow]]


def _lines(file: TextFile, keys: tuple[str, ...], part: Part) -> Rows:
    for row, line in enumerate(documents.lines_of(file, part), start=part.row):
        if not line.strip():
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield row, BadRow(f"byte 0x{line[error.start]:02x} is no UTF-8")
            continue
        except (ValueError, RecursionError) as error:
            more = ", and begins an array: jq -c '.[]' takes it apart" * line.startswith(b"[")
            yield row, BadRow(f"is no JSON ({one_line(str(error))}){more}")
            continue
        what = "one JSON array" if isinstance(value, list) else f"a JSON {type(value).__name__}"
        wanted = " and ".join(map(repr, keys))
        yield (
            row,
            value
            if isinstance(value, dict)
            else BadRow(f"is {what}, not an object with {wanted} (jq -c '.[]' takes one apart)"),
        )


def _cells(file: TextFile, keys: tuple[str, ...], part: Part) -> Rows:
    assert part == WHOLE, part  # a line end may stand in quotes
    mark, name = _cells_end(file) or ",", printable(file.path)
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    with documents.open_bytes(file) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            row = error.object[: error.start].count(b"\n") + 1
            raise UserError(
                f"{name}:{row}: byte 0x{error.object[error.start]:02x} is no UTF-8; iconv -f LATIN1"
                " -t UTF-8 FILE makes UTF-8 of it, if it is Latin 1"
            ) from None
    if "\0" in text:
        row = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{name}:{row}: holds NUL bytes, so it is no CSV; give another file, or take them out"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        header = next(reader, [])
        if twice := next((key for key in keys if header.count(key) > 1), None):
            raise UserError(f"{name}: has {header.count(twice)} columns {twice!r}; rename one")
        for key, flag in zip(keys, KEYS, strict=False):
            if key not in header:
                columns = ", ".join(map(repr, header[:8])) or "nothing"
                raise UserError(
                    f"{name}: has no column {key!r}, but {columns}{did_you_mean(key, header)}; name"
                    f" it by --data.{flag} (the first line names the columns, with"
                    f" {'commas' if mark == ',' else 'tabs'} between)"
                )
        row = reader.line_num + 1
        for cells in reader:
            if cells:
                yield row, _row(header, cells)
            row = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: is no CSV ({one_line(str(error))})") from None


def _row(header: list[str], cells: list[str]) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(
            f"has {len(cells)} cells, the first line {len(header)}; a text that holds commas or"
            ' line ends stands in "quotes"'
        )
    return dict(zip(header, cells, strict=True))


def _parquet(file: TextFile, keys: tuple[str, ...], part: Part) -> Rows:
    import pyarrow

    table = _open_parquet(file, keys)
    row = 0
    try:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if part.start <= row and (part.stop is None or row < part.stop):
                batches = table.iter_batches(1024, row_groups=[group], columns=list(keys))
                values = (value for batch in batches for value in batch.to_pylist())
                yield from enumerate(values, start=row)
            row += rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{printable(file.path)}: cannot be read ({one_line(str(error))})"
        ) from error
    finally:
        table.close()


def _open_parquet(file: TextFile, keys: tuple[str, ...]) -> Any:
    table = documents.open_parquet(file, keys[0])
    names = table.schema_arrow.names
    missing = next((key for key in keys[1:] if key not in names), None)
    if missing is None:
        return table
    table.close()
    listed = ", ".join(map(repr, names[:8]))
    raise UserError(
        f"{printable(file.path)}: has no column {missing!r}, but"
        f" {listed}{did_you_mean(missing, names)}; name it by --data.label_key"
    )
