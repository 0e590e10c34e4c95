"""Shards of tokens: one job makes one shard, in this process or in another, whole or not at all.

A shard is `NAME.ids.npy` (the ids), `NAME.documents.npy` (what `Column` says of each document) and,
written last, `NAME.json` with their checksums. Its name is the digest of all that it was made of,
so a shard that is there is the right one.

D: documents
"""

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import durable_files
from jaxtrain.data.text.documents import Bad, Part, bad_words, place
from jaxtrain.data.text.formats import Format
from jaxtrain.data.text.protocol import Tokenizer, digest
from jaxtrain.data.text.text_files import TextFile
from jaxtrain.errors import UserError
from jaxtrain.messages import printable

METHOD = 2
"""One more whenever the same files would give other shards, so that none of before is taken."""
CHANGED = "{}: changed while it was read; start again when nothing writes to it"
_SAID = ("bad", "bad_count", "marks", "labels")
"""What the summary of a shard says of each unit besides its size."""
_KEPT_BAD = 20
"""How many broken documents of a shard are named; all are counted."""


class Column(enum.IntEnum):
    """What is known of each document, as int64."""

    TOKENS = 0
    BYTES = 1
    ROW = 2
    UNIT = 3


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or a part of one, that a shard holds; `digest` is that of the whole file."""

    file: TextFile
    part: Part
    digest: str
    identity: tuple[int, ...]
    size: int

    @property
    def key(self) -> str:
        """What its tokens depend on besides tokenizer and format."""
        kind = (self.file.kind, self.file.compression)
        return digest([self.digest, *kind, *dataclasses.astuple(self.part)])


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to be made; units that `taken` names are copied: key -> (shard, first and last id,
    first and last document, and what its summary says of it)."""

    name: str
    units: tuple[Unit, ...]
    taken: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Job":
        """What `as_json` was made of."""
        units = tuple(
            Unit(
                TextFile(**unit["file"]),
                Part(**unit["part"]),
                unit["digest"],
                tuple(unit["identity"]),
                unit["size"],
            )
            for unit in value["units"]
        )
        return cls(value["name"], units, value["taken"])


class Damaged(Exception):
    """A shard that is not what it was; the text says how."""


def identity_of(path: str) -> tuple[int, ...]:
    """What the system knows of a file that changes when its contents do."""
    status = os.stat(path)
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def shard_name(tokenizer: str, how: Format, units: Sequence[Unit]) -> str:
    """The name of a shard, from the fingerprint of the tokenizer, the format and the units."""
    return digest([METHOD, tokenizer, *how.identity, [unit.key for unit in units]])


def make_shard(
    folder: Path,
    job: Job,
    tokenizer: Tokenizer,
    how: Format,
    *,
    stop_at_bad: bool,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Tokenises the units of a job and writes the shard durably; its summary.

    `report` is told the bytes of each unit that is done. `UserError` at a broken document, with
    `stop_at_bad`, and where a file changes meanwhile.
    """
    ids: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    units: list[dict[str, Any]] = []
    dtype = id_dtype(how.num_ids(tokenizer.vocabulary))
    for number, unit in enumerate(job.units):
        if unit.key in job.taken:
            made = _take(folder, job.taken[unit.key])
        else:
            made = _tokenize(unit, tokenizer, how, stop_at_bad=stop_at_bad)
        ids.append(np.concatenate([np.zeros(0, dtype), *made.ids]).astype(dtype, copy=False))
        made.rows_D4[:, Column.UNIT] = number
        rows.append(made.rows_D4)
        units.append(
            {
                "key": unit.key,
                "tokens": len(ids[-1]),
                "documents": len(made.rows_D4),
                **made.said,
            }
        )
        report(unit.size)
    arrays = {
        "ids": np.concatenate([np.zeros(0, dtype), *ids]),
        "documents": np.concatenate([np.zeros((0, len(Column)), np.int64), *rows]),
    }
    summary = {"name": job.name, "method": METHOD, "units": units, "files": {}}
    for kind, array in arrays.items():
        _write_array(shard_file(folder, job.name, kind), array)
        summary["files"][kind] = _checksum(shard_file(folder, job.name, kind))
    durable_files.write_json(folder / f"{job.name}.json", summary)
    return summary


@dataclasses.dataclass
class _Made:
    ids: list[np.ndarray]
    rows_D4: np.ndarray
    said: dict[str, Any]
    """What the summary of the shard says of the unit."""


def _tokenize(unit: Unit, tokenizer: Tokenizer, how: Format, *, stop_at_bad: bool) -> _Made:
    file, part = unit.file, unit.part
    if identity_of(file.path) != unit.identity:
        raise UserError(CHANGED.format(printable(file.path)))
    ids: list[np.ndarray] = []
    rows: list[tuple[int, ...]] = []
    bad: list[list[Any]] = []
    labels: list[str] = []
    bad_count = marks = 0
    for one in how.encoded(file, part, tokenizer):
        if isinstance(one, Bad):
            if stop_at_bad:
                raise UserError(bad_words(file, one.row, one.why, how.noun))
            bad_count += 1
            if len(bad) < _KEPT_BAD:
                bad.append([one.row, one.why])
            continue
        ids += one.ids
        rows.append((sum(map(len, one.ids)), one.size, one.row, 0))
        marks += one.marks
        labels += [] if one.label is None else [one.label]
    if identity_of(file.path) != unit.identity:
        raise UserError(CHANGED.format(printable(file.path)))
    rows_D4 = np.array(rows, np.int64).reshape(-1, len(Column))
    said = {"bad": bad, "bad_count": bad_count, "marks": marks, "labels": labels}
    return _Made(ids, rows_D4, said)


def _take(folder: Path, taken: Sequence[Any]) -> _Made:
    """The tokens of a unit out of an older shard, which its maker has verified."""
    name, first, last, first_row, last_row, said = taken
    ids = np.load(shard_file(folder, name, "ids"), mmap_mode="r", allow_pickle=False)
    rows = np.load(shard_file(folder, name, "documents"), mmap_mode="r", allow_pickle=False)
    rows_D4 = np.array(rows[first_row:last_row])
    return _Made([np.array(ids[first:last])], rows_D4, said)


def shard_file(folder: Path, name: str, kind: str) -> Path:
    """The file of a shard's `ids` or `documents`."""
    return folder / f"{name}.{kind}.npy"


def read_summary(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a shard; None if it is not there, or not whole."""
    try:
        summary = json.loads((folder / f"{name}.json").read_bytes())
        whole = summary["name"] == name and summary["method"] == METHOD
        whole = whole and {*summary["files"]} == {"ids", "documents"}
        return summary if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(folder: Path, summary: Mapping[str, Any]) -> None:
    """Reads a shard whole; `Damaged` if a byte is not the one that was written."""
    for kind, (size, checksum) in summary["files"].items():
        path = shard_file(folder, summary["name"], kind)
        try:
            found = _checksum(path)
        except OSError as error:
            raise Damaged(f"{path.name}: cannot be read ({error.strerror})") from error
        if found != [size, checksum]:
            why = "checksum mismatch" if found[0] == size else f"{found[0]} bytes, not {size}"
            raise Damaged(f"{path.name}: {why}")


def shard_identity(folder: Path, name: str) -> list[list[int]]:
    """What the system knows of a shard's files; `OSError` if one is not there."""
    return [list(identity_of(str(shard_file(folder, name, kind)))) for kind in ("ids", "documents")]


def open_arrays(folder: Path, summary: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a shard, mapped into memory, and its documents."""
    ids, rows_D4 = (
        np.load(shard_file(folder, summary["name"], kind), mmap_mode="r", allow_pickle=False)
        for kind in ("ids", "documents")
    )
    return ids, rows_D4


def unit_ranges(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Where each unit of a shard lies, as `Job.taken` has it."""
    first = first_row = 0
    for unit in summary["units"]:
        last, last_row = first + unit["tokens"], first_row + unit["documents"]
        said = {key: unit[key] for key in _SAID if key in unit}
        yield unit["key"], [summary["name"], first, last, first_row, last_row, said]
        first, first_row = last, last_row


def id_dtype(vocabulary: int) -> np.dtype:
    """What ids are kept as: uint16 up to 65,536 of them.

    >>> id_dtype(65_536), id_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def remove_shard(folder: Path, name: str) -> None:
    """Deletes a shard, its summary first."""
    for path in (
        folder / f"{name}.json",
        *(shard_file(folder, name, k) for k in ("ids", "documents")),
    ):
        path.unlink(missing_ok=True)


def _write_array(path: Path, array: np.ndarray) -> None:
    # Two processes may make the same shard for two corpora that share a file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        durable_files.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), found]


def bad_notes(units: Sequence[tuple[TextFile, Mapping[str, Any]]], noun: str) -> list[str]:
    """What is said of the documents that were left out: how many, and the first of each kind."""
    total, first = 0, dict[str, str]()
    for file, unit in units:
        total += unit["bad_count"]
        for row, why in unit["bad"]:
            first.setdefault(why.split("(")[0].strip(), place(file, row))
    if not total:
        return []
    what = f"1 {noun} is" if total == 1 else f"{total:,} {noun}s are"
    kinds = ", ".join(f"{where} {kind}" for kind, where in list(first.items())[:4])
    return [f"{what} left out, broken or empty, e.g. {kinds}"]
