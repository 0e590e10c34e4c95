"""Windows: the text as one long row of tokens, cut into rows of one length, whatever documents end
where.

Row r holds T + 1 tokens from place r * stride on, of which the last T are to be predicted. With a
stride of T, the default, each token but the very first is predicted once an epoch; with a stride of
1 each place is the beginning of a row, so that a shuffled epoch, of T passes over the text, draws
random places as nanoGPT does.

N: rows, T: tokens to predict, P: pieces, D: documents
"""

from collections.abc import Mapping

import jax
import numpy as np

from jaxtrain.data.table import ArrayTable, Table
from jaxtrain.data.text.pieces import PieceReader, Pieces, TextBytes
from jaxtrain.data.text.token_cache import Tokens
from jaxtrain.errors import UserError

WHOLE = 2**28
"""How many values a table has at most that is whole in memory, and may live on the device."""


class Windows:
    """The table of the windows over some pieces of a corpus, which follow one another.

    Fields: `tokens` (T + 1,), int32, or where the table is `whole` the corpus's own uint16 or
    uint32, so that it is small on the device; `bytes` float32 (), the UTF-8 bytes of the text to
    predict; and where the last row is not full, or `weighted` says so, `weight` float32 (T + 1,), 0
    for the padding behind its end and for the first token, which is not predicted.
    """

    arrays = None
    class_names = None

    def __init__(
        self,
        tokens: Tokens,
        pieces: Pieces,
        length: int,
        stride: int | None = None,
        *,
        weighted: bool = False,
    ) -> None:
        self._tokens, self._pieces = tokens, pieces.merged()
        self._length, self._stride = length, stride or length
        if self._pieces.tokens < 2:
            raise UserError(f"{self._pieces.tokens} tokens; there must be 2 or more to predict one")
        self._ends_P = np.cumsum(self._pieces.lengths_P)
        targets = self._pieces.tokens - 1
        self._rows = 1 + max(0, -(-(targets - length) // self._stride))
        self.weighted = weighted or is_ragged(self._pieces, length, stride)
        self._reader, self._text = PieceReader(tokens), TextBytes(tokens)
        self.tokenizer = tokens.tokenizer
        self.num_classes = tokens.tokenizer.vocabulary

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of a row."""
        fields = {
            "tokens": jax.ShapeDtypeStruct((self._length + 1,), np.dtype("int32")),
            "bytes": jax.ShapeDtypeStruct((), np.dtype("float32")),
        }
        if self.weighted:
            fields["weight"] = jax.ShapeDtypeStruct((self._length + 1,), np.dtype("float32"))
        return fields

    def __len__(self) -> int:
        return self._rows

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`."""
        starts_N = np.asarray(indices, np.int64) * self._stride
        sizes_N = np.minimum(self._length + 1, self._pieces.tokens - starts_N)
        rows = {
            "tokens": np.zeros((len(starts_N), self._length + 1), np.int32),
            "bytes": np.zeros(len(starts_N), np.float32),
        }
        row_P, pieces = self._cut(starts_N, sizes_N)
        first_P = np.concatenate([[0], np.cumsum(pieces.lengths_P)[:-1]])
        begin_N = np.cumsum(sizes_N) - sizes_N
        places_P = row_P * (self._length + 1) + first_P - begin_N[row_P]
        self._reader.copy(pieces.starts_P, pieces.lengths_P, rows["tokens"].reshape(-1), places_P)
        rows["bytes"][:] = self._bytes(row_P, pieces, first_P - begin_N[row_P], len(starts_N))
        if self.weighted:
            place_T1 = np.arange(self._length + 1)
            rows["weight"] = ((place_T1 > 0) & (place_T1 < sizes_N[:, None])).astype(np.float32)
        return rows

    def _cut(self, starts_N: np.ndarray, sizes_N: np.ndarray) -> tuple[np.ndarray, Pieces]:
        """The pieces of the corpus that rows are made of, and the row of each."""
        ends_P, stops_N = self._ends_P, starts_N + sizes_N
        first_N = np.searchsorted(ends_P, starts_N, side="right")
        counts_N = np.searchsorted(ends_P, stops_N, side="left") - first_N + 1
        row_P = np.repeat(np.arange(len(starts_N)), counts_N)
        piece_P = np.arange(len(row_P)) + (first_N - np.cumsum(counts_N) + counts_N)[row_P]
        begin_P = ends_P[piece_P] - self._pieces.lengths_P[piece_P]
        start_P = np.maximum(starts_N[row_P], begin_P)
        length_P = np.minimum(stops_N[row_P], ends_P[piece_P]) - start_P
        return row_P, Pieces(self._pieces.starts_P[piece_P] + start_P - begin_P, length_P)

    def _bytes(
        self, row_P: np.ndarray, pieces: Pieces, place_P: np.ndarray, rows: int
    ) -> np.ndarray:
        """The bytes of the text to predict in each row: all but that of its first token."""
        stops_P = pieces.starts_P + pieces.lengths_P
        firsts_P = pieces.starts_P + (place_P == 0)
        bytes_P = self._text.before(stops_P) - self._text.before(np.minimum(firsts_P, stops_P))
        return np.bincount(row_P, bytes_P, rows)

    def where(self, index: int) -> str:
        """Where a row begins, for messages."""
        _, pieces = self._cut(np.array([index * self._stride]), np.array([1]))
        place = int(pieces.starts_P[0])
        document = int(np.searchsorted(self._tokens.offsets_D1, place, side="right")) - 1
        return f"{self._tokens.place(document)}, token {place - self._tokens.offsets_D1[document]}"

    def whole(self) -> ArrayTable:
        """The same table in memory; the rows share the memory of the text where they overlap."""
        size = (self._rows - 1) * self._stride + self._length + 1
        flat = np.zeros(max(size, self._pieces.tokens), self._tokens.dtype)
        places_P = self._ends_P - self._pieces.lengths_P
        self._reader.copy(self._pieces.starts_P, self._pieces.lengths_P, flat, places_P)
        rows = np.lib.stride_tricks.sliding_window_view(flat, self._length + 1)
        arrays = {"tokens": rows[:: self._stride][: self._rows]}
        # the text before every place at once, instead of a search for each row
        before = np.zeros(len(flat) + 1)
        for start, length, place in zip(
            self._pieces.starts_P, self._pieces.lengths_P, places_P, strict=True
        ):
            at = self._text.before(np.arange(start, start + length + 1))
            before[place : place + length + 1] = before[place] + at - at[0]
        before[self._pieces.tokens :] = before[self._pieces.tokens]
        first_N = np.arange(self._rows) * self._stride
        stop_N = np.minimum(first_N + self._length + 1, self._pieces.tokens)
        arrays["bytes"] = (before[stop_N] - before[first_N + 1]).astype(np.float32)
        if self.weighted:
            weight = np.ones((self._rows, self._length + 1), np.float32)
            weight[:, 0] = 0
            weight[-1, self._pieces.tokens - (self._rows - 1) * self._stride :] = 0
            arrays["weight"] = weight
        return ArrayTable(arrays, self.num_classes, origin=self._origin(), tokenizer=self.tokenizer)

    def _origin(self) -> str:
        return self._tokens.place(0).rpartition(":")[0] or "text"


def is_ragged(pieces: Pieces, length: int, stride: int | None = None) -> bool:
    """Whether the last window over some pieces is not full.

    >>> pieces = Pieces(np.array([0]), np.array([7]))
    >>> is_ragged(pieces, 3), is_ragged(pieces, 4)
    (False, True)
    """
    rest = pieces.tokens - 1 - length
    return rest < 0 or rest % (stride or length) != 0


def windows(
    tokens: Tokens,
    pieces: Pieces,
    length: int,
    stride: int | None = None,
    *,
    weighted: bool = False,
) -> Table:
    """The windows over some pieces of a corpus, whole in memory where they are small.

    >>> from jaxtrain.data.text.pieces import documents_of
    >>> from jaxtrain.data.text.token_cache import in_memory
    >>> from jaxtrain.data.text.tokenizers import Characters
    >>> tokens = in_memory(["abcdefg"], Characters("abcdefg"))
    >>> rows = windows(tokens, documents_of(tokens), length=3).read(np.arange(2))
    >>> rows["tokens"].tolist(), rows["bytes"].tolist()
    ([[0, 1, 2, 3], [3, 4, 5, 6]], [3.0, 3.0])

    `UserError` if there are fewer than 2 tokens.
    """
    table = Windows(tokens, pieces, length, stride, weighted=weighted)
    return table.whole() if len(table) * (length + 1) <= WHOLE else table
