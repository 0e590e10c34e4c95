"""Packing: whole documents side by side in rows of one length, with as little padding as best fit
leaves.

A row holds T + 1 tokens. A document of at most so many is never cut; of a longer one every further
piece begins with the last token of the piece before, which is context there and not predicted
again. So every token is predicted exactly once an epoch, but for the first one of each document.

Best fit decreasing: the longest pieces first, each into the row with the least room that still
takes it, or else into a new one. Pieces of one length, and rows with one room, are alike, so they
are placed in bulk: a plan costs a sort of the pieces and some operations for each length there is.

R: rows, P: pieces, D: documents, L: lengths of pieces, from 0
"""

import bisect
import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain import durable_files
from jaxtrain.data.table import Table, load
from jaxtrain.data.text.pieces import PieceReader, Pieces, TextBytes
from jaxtrain.data.text.token_cache import Tokens
from jaxtrain.data.text.windows import WHOLE
from jaxtrain.messages import Note, counted

METHOD = 1
"""One more whenever the same documents would be packed otherwise: the order of an epoch hangs on
it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pieces make each row: row r is the pieces `first_R1[r]` to `first_R1[r + 1]`."""

    first_R1: np.ndarray
    starts_P: np.ndarray
    lengths_P: np.ndarray
    capacity: int
    """Tokens of a row, T + 1."""
    cut: int
    """How many documents were longer than a row."""

    def __len__(self) -> int:
        return len(self.first_R1) - 1

    @property
    def fill(self) -> float:
        """The share of all places that holds tokens."""
        return int(self.lengths_P.sum()) / (len(self) * self.capacity)

    def note(self, part: str, documents: int) -> str:
        """What is said of it once."""
        cut = (
            f"; {self.cut:,} longer than a row {'is' if self.cut == 1 else 'are'} cut"
            if self.cut
            else ""
        )
        return Note(
            f"{part}: {counted(documents, 'document')} packed into {counted(len(self), 'row')} of"
            f" {counted(self.capacity, 'token')}, {100 * self.fill:.2f}% full{cut}"
        )


def plan(documents: Pieces, capacity: int) -> Plan:
    """How documents are packed into rows of `capacity` tokens; the same for the same lengths.

    >>> documents = Pieces(np.array([0, 3, 5, 9]), np.array([3, 2, 4, 1]))
    >>> found = plan(documents, 5)
    >>> found.first_R1.tolist(), found.lengths_P.tolist(), found.fill
    ([0, 2, 4], [4, 1, 3, 2], 1.0)
    """
    pieces = cut(documents, capacity)
    row_P = best_fit(pieces.lengths_P, capacity)
    order_P = np.argsort(row_P, kind="stable")  # in a row, as they lie in the corpus
    counts_R = np.bincount(row_P)
    return Plan(
        np.concatenate([[0], np.cumsum(counts_R)]),
        pieces.starts_P[order_P],
        pieces.lengths_P[order_P].astype(np.int32),
        capacity,
        int((documents.lengths_P > capacity).sum()),
    )


def cut(documents: Pieces, capacity: int) -> Pieces:
    """Documents in pieces of at most `capacity` tokens, each further one with the token before it.

    >>> cut(Pieces(np.array([0, 2]), np.array([2, 7])), 4)
    Pieces(starts_P=array([0, 2, 5]), lengths_P=array([2, 4, 4]))
    """
    starts_D, lengths_D = documents.starts_P, documents.lengths_P
    step = capacity - 1
    counts_D = np.where(lengths_D > 1, -(-(lengths_D - 1) // step), lengths_D)
    ends_D = np.cumsum(counts_D)
    of_P = np.repeat(np.arange(len(starts_D)), counts_D)
    number_P = np.arange(len(of_P)) - (ends_D - counts_D)[of_P]
    starts_P = starts_D[of_P] + number_P * step
    stops_D = starts_D + lengths_D
    return Pieces(starts_P, np.minimum(stops_D[of_P] - starts_P, capacity))


def best_fit(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece by best fit decreasing, int64 (P,).

    >>> best_fit(np.array([3, 2, 4, 1]), 5).tolist()
    [1, 1, 0, 0]
    """
    narrow = np.uint16 if capacity < 2**16 else np.int64  # of 16 bits the sort is linear
    order_P = np.argsort(lengths_P.astype(narrow), kind="stable")
    counts_L = np.bincount(lengths_P, minlength=capacity + 1)
    ends_L = np.cumsum(counts_L)
    rows = _Rows(capacity, len(lengths_P))
    for length in np.flatnonzero(counts_L)[::-1].tolist():
        rows.place(order_P[ends_L[length] - counts_L[length] : ends_L[length]], length)
    return rows.row_P


class _Rows:
    """Rows by the room that they have left."""

    def __init__(self, capacity: int, pieces: int) -> None:
        self.row_P = np.empty(pieces, np.int64)
        self._capacity, self._count = capacity, 0
        self._by_room: dict[int, list[np.ndarray]] = {}
        self._rooms: list[int] = []  # ascending

    def place(self, pieces: np.ndarray, length: int) -> None:
        """Places pieces of one length, one after the other."""
        while len(pieces):
            index = bisect.bisect_left(self._rooms, length)
            if index == len(self._rooms):
                room, rows = (
                    self._capacity,
                    self._new(-(-len(pieces) // (self._capacity // length))),
                )
            else:
                room = self._rooms.pop(index)
                parts = self._by_room.pop(room)
                rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            # The row that took a piece has less room than before, so it is also the best for the
            # next one, until it is full.
            each = room // length
            taken = min(len(pieces), each * len(rows))
            full, rest = divmod(taken, each)
            used = full + (rest > 0)
            self.row_P[pieces[:taken]] = np.repeat(rows[:used], each)[:taken]
            self._add(room - each * length, rows[:full])
            self._add(room - rest * length, rows[full:used])
            self._add(room, rows[used:])
            pieces = pieces[taken:]

    def _new(self, count: int) -> np.ndarray:
        self._count += count
        return np.arange(self._count - count, self._count)

    def _add(self, room: int, rows: np.ndarray) -> None:
        if room == 0 or not len(rows):
            return
        if room not in self._by_room:
            self._by_room[room] = []
            bisect.insort(self._rooms, room)
        self._by_room[room].append(rows)


def kept_plan(folder: Path, name: str, make: Callable[[], Plan]) -> Plan:
    """The plan that was kept under a name, or the one that `make` gives, which is kept; a file that
    is damaged is made anew."""
    path = folder / f"{name}.npz"
    names = [field.name for field in dataclasses.fields(Plan)]
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        # opened here: np.load leaves a file open that is no archive
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found: Any = {name: arrays[name] for name in names}
        numbers = {name: int(found[name]) for name in ("capacity", "cut")}
        return Plan(**(found | numbers))
    made = make()
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a cache that only others may write is as good
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **{name: getattr(made, name) for name in names})
            durable_files.publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return made


class Packed:
    """The table of the rows of a plan.

    Fields: `tokens` int32 (T + 1,); `segments` int32 (T + 1,), 1, 2, ... by the documents of the
    row, 0 for padding; `weight` float32 (T + 1,), 0 for padding and for the first token of each
    piece, which is not predicted; `bytes` float32 (), the UTF-8 bytes of the text to predict.
    """

    arrays = None
    class_names = None

    def __init__(self, tokens: Tokens, planned: Plan) -> None:
        self._tokens, self._plan = tokens, planned
        self._reader, self._text = PieceReader(tokens), TextBytes(tokens)
        self.tokenizer = tokens.tokenizer
        self.num_classes = tokens.tokenizer.vocabulary

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of a row."""
        size = (self._plan.capacity,)
        return {
            "tokens": jax.ShapeDtypeStruct(size, np.dtype("int32")),
            "segments": jax.ShapeDtypeStruct(size, np.dtype("int32")),
            "weight": jax.ShapeDtypeStruct(size, np.dtype("float32")),
            "bytes": jax.ShapeDtypeStruct((), np.dtype("float32")),
        }

    def __len__(self) -> int:
        return len(self._plan)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`."""
        indices, size = np.asarray(indices), self._plan.capacity
        first_R, stop_R = self._plan.first_R1[indices], self._plan.first_R1[indices + 1]
        counts_R = stop_R - first_R
        row_P = np.repeat(np.arange(len(indices)), counts_R)
        number_P = np.arange(len(row_P)) - (np.cumsum(counts_R) - counts_R)[row_P]
        piece_P = first_R[row_P] + number_P
        starts_P = self._plan.starts_P[piece_P]
        lengths_P = self._plan.lengths_P[piece_P].astype(np.int64)
        filled_R = np.bincount(row_P, lengths_P, len(indices)).astype(np.int64)
        before_P = np.cumsum(lengths_P) - lengths_P  # then without the rows before
        places_P = row_P * size + before_P - (np.cumsum(filled_R) - filled_R)[row_P]
        tokens = np.zeros((len(indices), size), np.int32)
        self._reader.copy(starts_P, lengths_P, tokens.reshape(-1), places_P)
        # a segment 0 at the end of every row stands for its padding
        ends_R = np.cumsum(counts_R)
        numbers = np.insert(number_P + 1, ends_R, 0)
        lengths = np.insert(lengths_P, ends_R, size - filled_R)
        segments = np.repeat(numbers.astype(np.int32), lengths).reshape(tokens.shape)
        weight = (segments > 0).astype(np.float32)
        weight.reshape(-1)[places_P] = 0
        bytes_P = self._text.predicted(starts_P, lengths_P)
        return {
            "tokens": tokens,
            "segments": segments,
            "weight": weight,
            "bytes": np.bincount(row_P, bytes_P, len(indices)).astype(np.float32),
        }

    def where(self, index: int) -> str:
        """Where the first document of a row stands, for messages."""
        start = self._plan.starts_P[self._plan.first_R1[index]]
        document = int(np.searchsorted(self._tokens.offsets_D1, start, side="right")) - 1
        return self._tokens.place(document)


def packed(tokens: Tokens, planned: Plan) -> Table:
    """The rows of a plan, whole in memory where they are small.

    >>> from jaxtrain.data.text.pieces import documents_of
    >>> from jaxtrain.data.text.token_cache import in_memory
    >>> from jaxtrain.data.text.tokenizers import Characters
    >>> tokens = in_memory(["abc", "ab"], Characters("abc"))
    >>> rows = packed(tokens, plan(documents_of(tokens), 6)).read(np.arange(1))
    >>> rows["tokens"].tolist(), rows["segments"].tolist(), rows["weight"].tolist()
    ([[0, 1, 2, 0, 1, 0]], [[1, 1, 1, 2, 2, 0]], [[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    """
    table = Packed(tokens, planned)
    return load(table) if 3 * len(table) * planned.capacity <= WHOLE else table
