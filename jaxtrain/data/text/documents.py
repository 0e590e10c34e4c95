"""Documents: one text after the other out of plain text, JSON lines and Parquet, each with its
place, and words for every one that is broken.

A large file is read in parts, which several processes share; a part says where it begins and which
line that is, so that messages name the line of the file.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from jaxtrain import extras
from jaxtrain.data.text.text_files import LINES, PARQUET, TEXT, TextFile, find_files
from jaxtrain.errors import UserError
from jaxtrain.messages import did_you_mean, one_line, printable

CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Format:
    """How the documents of a corpus are found in its files."""

    key: str = "text"
    """The field of JSON lines, or the column of Parquet."""
    separator: str = ""
    """What stands between the documents of plain text; empty: a file is one document."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its place: the line on which it begins, from 1, or the row of Parquet, from 0."""

    text: str
    row: int


@dataclasses.dataclass(frozen=True)
class Bad:
    """A document that cannot be used, its place, and why."""

    row: int
    why: str


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a file: bytes start..stop, or rows of Parquet; all of it where stop is None.

    `begins` and `ends` are false where plain text without a separator is cut: then the document
    goes on in the next part.
    """

    start: int = 0
    stop: int | None = None
    row: int = 1
    begins: bool = True
    ends: bool = True


WHOLE = Part()


def documents(
    paths: str | Sequence[str], *, key: str = "text", separator: str = "", bad: str = "error"
) -> Iterator[tuple[str, Document]]:
    """Every document of a corpus with its file, in the one order that it has everywhere.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> [(document.text, document.row) for _, document in documents(str(folder))]
    [('one', 1), ('two', 2)]

    `UserError` names file and line of a document that is broken or empty; with `bad="skip"` it is
    left out.
    """
    for file in find_files(paths).files:
        for document in read_part(file, Format(key, separator)):
            if isinstance(document, Document):
                yield file.path, document
            elif bad == "error":
                raise UserError(bad_words(file, document.row, document.why))


def bad_words(file: TextFile, row: int, why: str, noun: str = "document") -> str:
    """The line about a document that is broken, with what can be done about it."""
    return f"{place(file, row)}: {why}{skipping(noun)}"


def skipping(noun: str) -> str:
    """How such a line ends, where something would be left."""
    return f"; mend it, or leave such {noun}s out with bad=skip"


def place(file: TextFile, row: int) -> str:
    """Where a document stands, in words: `corpus.jsonl:17`, or `corpus.parquet, row 17`."""
    name = printable(file.path)
    return f"{name}, row {row}" if file.kind == PARQUET else f"{name}:{row}"


def read_part(file: TextFile, how: Format, part: Part = WHOLE) -> Iterator[Document | Bad]:
    """The documents of a file, or of a part of it, in order, and those that are broken.

    `UserError` where the file itself cannot be read on, such as one that was cut off.
    """
    readers = {TEXT: _read_text, LINES: _read_lines, PARQUET: _read_parquet}
    with reading(file):
        yield from readers[file.kind](file, how, part)


@contextlib.contextmanager
def reading(file: TextFile) -> Iterator[None]:
    """Whatever keeps a file from being read, as `UserError`."""
    try:
        yield
    except EOFError as error:
        raise UserError(
            f"{printable(file.path)}: is cut off ({one_line(str(error))}); fetch it again"
        ) from error
    except (OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or one_line(str(error))
        raise UserError(f"{printable(file.path)}: cannot be read ({why})") from error


def open_bytes(file: TextFile) -> IO[bytes] | gzip.GzipFile:
    """The bytes of a file, unpacked."""
    if file.compression == "gzip":
        return gzip.open(file.path, "rb")
    if file.compression == "zstd":
        extras.require(f"{printable(file.path)}", "pyarrow")
        import pyarrow

        return pyarrow.input_stream(file.path, compression="zstd")
    return open(file.path, "rb")


def _read_bytes(file: TextFile, part: Part) -> bytes:
    with open_bytes(file) as stream:
        if part.start:
            stream.seek(part.start)
        return stream.read() if part.stop is None else stream.read(part.stop - part.start)


def _read_text(file: TextFile, how: Format, part: Part) -> Iterator[Document | Bad]:
    data = _read_bytes(file, part)
    if part.start == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    if not how.separator:
        yield _of_plain(data, part.row, part.start)
        return
    begin, row = 0, part.row
    pattern = separator_pattern(how.separator)
    places = [match.span() for match in pattern.finditer(data)]
    for start, stop in [*places, (len(data), len(data))]:
        text = data[begin:start]
        # the lines around a separator belong to it
        inner = text.lstrip(b"\r\n")
        line = row + text[: len(text) - len(inner)].count(b"\n")
        outermost = part.start + begin == 0 or start == len(data)
        inner = inner.rstrip(b"\r\n")
        if inner or not outermost:
            yield _of_plain(inner, line, part.start + begin)
        row += data[begin:stop].count(b"\n")
        begin = stop


def _of_plain(data: bytes, row: int, start: int) -> Document | Bad:
    """A document of plain text; JSON and Parquet say of a NUL that it is meant, this cannot."""
    found = _decoded(data, row, start)
    if isinstance(found, Document) and "\0" in found.text:
        return Bad(row + data[: data.index(0)].count(b"\n"), "holds NUL bytes, so it is no text")
    return found


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """What is searched for in the bytes of a file: the separator as it is, but of newlines alone
    as many or more.

    >>> separator_pattern("\\\\n\\\\n").split(b"a\\n\\n\\nb\\r\\n\\r\\nc")
    [b'a', b'b', b'c']

    `\\n`, `\\r` and `\\t` may be written with a backslash, as a shell passes them on.
    """
    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator.replace(written, meant)
    if not separator.strip("\r\n"):
        return re.compile(rb"(?:\r?\n){%d,}" % max(separator.count("\n"), 1))
    return re.compile(re.escape(separator.encode()))


def _decoded(data: bytes, row: int, start: int = 0) -> Document | Bad:
    if not data:
        return Bad(row, "is empty")
    try:
        return Document(data.decode(), row)
    except UnicodeDecodeError as error:
        row += data[: error.start].count(b"\n")
        utf16 = start == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        more = " (UTF-16? iconv -f UTF-16 -t UTF-8 makes UTF-8 of it)" if utf16 else ""
        return Bad(row, f"byte 0x{data[error.start]:02x} is no UTF-8{more}")


def _read_lines(file: TextFile, how: Format, part: Part) -> Iterator[Document | Bad]:
    row, blank = part.row - 1, 0
    for line in lines_of(file, part):
        row += 1
        if row == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.lstrip().startswith(b"["):
                raise UserError(
                    f"{printable(file.path)}: is one JSON array; write an object a line: jq -c"
                    " '.[]' FILE > FILE.jsonl"
                )
        if not line.strip():
            blank = blank or row
            continue
        if blank:  # at the end of a file they are nothing, but not in the middle
            yield Bad(blank, "is a blank line")
            blank = 0
        yield _of_line(line, row, how.key)
    if blank and part.stop is not None:
        yield Bad(blank, "is a blank line")
    if row == 0 and part.start == 0:
        yield Bad(1, "is empty")


def lines_of(file: TextFile, part: Part) -> Iterator[bytes]:
    """The lines of a part of a file, without their ends."""
    left = None if part.stop is None else part.stop - part.start
    with open_bytes(file) as stream:
        if part.start:
            stream.seek(part.start)
        begun: list[bytes] = []  # a line that is longer than a chunk
        while chunk := stream.read(CHUNK if left is None else min(CHUNK, left)):
            left = None if left is None else left - len(chunk)
            first, *others = chunk.split(b"\n")
            begun.append(first)
            if others:
                yield b"".join(begun)
                yield from others[:-1]
                begun = [others[-1]]
        if rest := b"".join(begun):
            yield rest


def _of_line(line: bytes, row: int, key: str) -> Document | Bad:
    decoded = _decoded(line, row)
    if isinstance(decoded, Bad):
        return decoded
    try:
        value = json.loads(decoded.text)
    except (ValueError, RecursionError) as error:
        return Bad(row, f"is no JSON ({one_line(str(error))})")
    if not isinstance(value, dict):
        return Bad(row, f"is {_type_of(value)}, not an object with the key {key!r}")
    if key not in value:
        names = ", ".join(map(repr, sorted(value)[:8]))
        if any(isinstance(value.get(chat), list) for chat in ("messages", "conversations")):
            chats = "these are conversations: --data=conversations reads them"
            return Bad(row, f"has no key {key!r}, but {names}; {chats}")
        near = did_you_mean(key, value)
        texts = [name for name, held in value.items() if isinstance(held, str)]
        taken = f"; take it by key={texts[0]}" if texts and not near else ""
        return Bad(row, f"has no key {key!r}, but {names or 'none'}{near}{taken}")
    return _text_of(value[key], row, key)


def _text_of(value: Any, row: int, key: str) -> Document | Bad:
    if not isinstance(value, str):
        return Bad(row, f"{key!r} is {_type_of(value)}, no text")
    if not value:
        return Bad(row, f"{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Bad(row, f"{key!r} holds half a character (U+{ord(value[error.start]):04X})")
    return Document(value, row)


def _type_of(value: Any) -> str:
    words = {type(None): "null", dict: "an object", list: "an array", bool: "true or false"}
    return words.get(type(value), "a number" if isinstance(value, int | float) else "a text")


def _read_parquet(file: TextFile, how: Format, part: Part) -> Iterator[Document | Bad]:
    import pyarrow

    table = open_parquet(file, how.key)
    row = 0
    try:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if part.start <= row and (part.stop is None or row < part.stop):
                batches = table.iter_batches(1024, row_groups=[group], columns=[how.key])
                values = (value for batch in batches for value in batch.column(0).to_pylist())
                for place_in_group, value in enumerate(values):
                    yield _of_cell(value, row + place_in_group, how.key)
            row += rows
        if row == 0:
            yield Bad(0, "is empty")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{printable(file.path)}: cannot be read ({one_line(str(error))})"
        ) from error
    finally:
        table.close()


def _of_cell(value: Any, row: int, key: str) -> Document | Bad:
    if isinstance(value, bytes):
        return _decoded(value, row)
    return _text_of(value, row, key)


def open_parquet(file: TextFile, key: str) -> Any:
    """A Parquet file that has the column; `UserError` if it is none, or lacks it."""
    extras.require(printable(file.path), "pyarrow")
    import pyarrow
    from pyarrow import parquet

    if file.compression:
        raise UserError(f"{printable(file.path)}: Parquet is compressed inside; unpack this file")
    try:
        table = parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{printable(file.path)}: is no Parquet ({one_line(str(error))}); fetch it again"
        ) from error
    names = table.schema_arrow.names
    if key in names:
        kind = str(table.schema_arrow.field(key).type)
        if "string" in kind or "binary" in kind:
            return table
        table.close()
        raise UserError(f"{printable(file.path)}: column {key!r} is {kind}, no text")
    table.close()
    listed = ", ".join(map(repr, names[:8]))
    raise UserError(
        f"{printable(file.path)}: has no column {key!r}, but {listed}{did_you_mean(key, names)}"
    )


@dataclasses.dataclass(frozen=True)
class Survey:
    """A file before it is read: what its contents are, and the parts that it is read in."""

    digest: str
    size: int
    parts: tuple[Part, ...]


def survey(file: TextFile, how: Format, part_bytes: int) -> Survey:
    """Reads a file once: SHA-256 of its contents, and where it is cut into parts of about that
    many bytes: between documents.

    Plain text without a separator is one document and one part here; `token_cache` cuts it.
    """
    if file.kind == PARQUET:
        parts = _row_parts(file, how.key, part_bytes)
        return Survey(*_hashed(file), parts=parts)
    if file.compression or (file.kind == TEXT and not how.separator):
        return Survey(*_hashed(file), parts=(WHOLE,))
    pattern = re.compile(rb"\n") if file.kind == LINES else separator_pattern(how.separator)
    size = os.path.getsize(file.path)
    cuts = []
    with open(file.path, "rb") as stream:
        at = part_bytes
        while at < size:
            # a line ends wherever a newline is; of "-----" only a scan tells which three are "---"
            known = at if file.kind == LINES else (cuts or [0])[-1]
            found = _search(stream, pattern, known, at)
            if found is None or found >= size:
                break
            cuts.append(found)
            at = found + part_bytes
    edges: list[int | None] = [0, *cuts, None]
    rows = _rows_at(file.path, cuts)
    parts = tuple(
        Part(start or 0, stop, row)
        for start, stop, row in zip(edges[:-1], edges[1:], rows, strict=True)
    )
    return Survey(*_hashed(file), parts=parts)


def parts_of_one(path: str, cuts: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a file that is one document, cut at these bytes."""
    edges: list[int | None] = [0, *cuts, None]
    rows = _rows_at(path, cuts)
    return tuple(
        Part(start or 0, stop, row, begins=not start, ends=stop is None)
        for start, stop, row in zip(edges[:-1], edges[1:], rows, strict=True)
    )


def file_digest(path: str) -> str:
    """SHA-256 of a file's contents, as `Survey` has it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _search(stream: IO[bytes], pattern: re.Pattern[bytes], known: int, at: int) -> int | None:
    """Where the first match that ends behind `at` ends, of those that a scan from `known` finds:
    the head of the file, or the end of a match. None if there is none."""
    length = CHUNK
    while True:
        stream.seek(known)
        window = stream.read(length)
        is_last, settled = len(window) < length, 0
        for match in pattern.finditer(window):
            # what follows may be of the match, too: a newline, even one of two bytes
            if not is_last and match.end() + 2 > len(window):
                break
            settled = match.end()
            if known + settled > at:
                return known + settled
        if is_last:
            return None
        known, length = known + settled, CHUNK if settled else 2 * length


def _hashed(file: TextFile) -> tuple[str, int]:
    return file_digest(file.path), os.path.getsize(file.path)


def _rows_at(path: str, cuts: Sequence[int]) -> list[int]:
    """The number of the line at the head of each part."""
    rows, at = [1], 0
    with open(path, "rb") as stream:
        for cut in cuts:
            row = rows[-1]
            while chunk := stream.read(min(CHUNK, cut - at)):
                at += len(chunk)
                row += chunk.count(b"\n")
            rows.append(row)
    return rows


def _row_parts(file: TextFile, key: str, part_bytes: int) -> tuple[Part, ...]:
    with open_parquet(file, key) as table:
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        parts, start, row, size = [], 0, 0, 0
        for group in groups:
            row, size = row + group.num_rows, size + group.total_byte_size
            if size >= part_bytes:
                parts.append(Part(start, row, start))
                start, size = row, 0
        if row > start or not parts:
            parts.append(Part(start, None, start))
    return tuple(parts)
