"""Pieces of a corpus: documents or parts of them, read many at once out of mapped files, and how
many bytes of text they are.

D: documents, P: pieces
"""

import bisect
import dataclasses
import functools

import numpy as np

from jaxtrain.data.text.token_cache import Tokens


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Places of a corpus: piece p is the `lengths_P[p]` tokens from `starts_P[p]` on.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> from jaxtrain.data.text.token_cache import in_memory
    >>> tokens = in_memory(["ab", "c"], Bytes())
    >>> documents_of(tokens).lengths_P.tolist(), within(tokens, 1, 4).lengths_P.tolist()
    ([3, 2], [2, 1])
    """

    starts_P: np.ndarray
    lengths_P: np.ndarray

    @functools.cached_property
    def tokens(self) -> int:
        """How many tokens they are together."""
        return int(self.lengths_P.sum())

    def merged(self) -> "Pieces":
        """The same tokens in as few pieces as possible: what follows without a gap is one."""
        if not len(self.starts_P):
            return self
        gaps = self.starts_P[1:] != self.starts_P[:-1] + self.lengths_P[:-1]
        first = np.concatenate([[0], np.flatnonzero(gaps) + 1])
        return Pieces(self.starts_P[first], np.add.reduceat(self.lengths_P, first))


def documents_of(tokens: Tokens, documents_D: np.ndarray | None = None) -> Pieces:
    """Documents as pieces: all, or those named."""
    starts_D, lengths_D = tokens.offsets_D1[:-1], np.diff(tokens.offsets_D1)
    if documents_D is None:
        return Pieces(starts_D, lengths_D)
    return Pieces(starts_D[documents_D], lengths_D[documents_D])


def within(tokens: Tokens, start: int, stop: int) -> Pieces:
    """The documents of the tokens start..stop; what lies beyond is cut off."""
    first = int(np.searchsorted(tokens.offsets_D1, start, side="right")) - 1
    last = int(np.searchsorted(tokens.offsets_D1, stop, side="left"))
    edges = np.clip(tokens.offsets_D1[first : last + 1], start, stop)
    lengths = np.diff(edges)
    return Pieces(edges[:-1][lengths > 0], lengths[lengths > 0])


class PieceReader:
    """Copies pieces of a corpus, thread-safe.

    A slice for each piece: of a row's tokens that is one copy of memory, which is 4 to 20 times
    faster than an index for every token.
    """

    def __init__(self, tokens: Tokens) -> None:
        # plain arrays over the same memory: slices of a memmap cost ten times as much
        self._shards = [shard.view(np.ndarray) for shard in tokens.shards]
        self._starts = np.cumsum([0, *map(len, self._shards)]).tolist()

    def copy(
        self, starts_P: np.ndarray, lengths_P: np.ndarray, out: np.ndarray, places_P: np.ndarray
    ) -> None:
        """Piece p goes to `out[places_P[p]:]`; `out` is flat."""
        starts, shards = self._starts, self._shards
        for start, length, place in zip(
            starts_P.tolist(), lengths_P.tolist(), places_P.tolist(), strict=True
        ):
            shard = bisect.bisect_right(starts, start) - 1
            while length:
                here = min(length, starts[shard + 1] - start)
                first = start - starts[shard]
                out[place : place + here] = shards[shard][first : first + here]
                start, place, length, shard = start + here, place + here, length - here, shard + 1


class TextBytes:
    """How many bytes of text lie before a place of a corpus.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> from jaxtrain.data.text.token_cache import in_memory
    >>> TextBytes(in_memory(["ab", "c"], Bytes())).before(np.arange(6)).tolist()
    [0.0, 1.0, 2.0, 2.0, 3.0, 3.0]

    Exact at the ends of documents; within one its bytes are spread evenly over its tokens of text
    (those of the beginning and the end have none), so that sums over whole documents are exact.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._offsets_D1 = tokens.offsets_D1
        self._head, tail = len(tokens.tokenizer.bos), len(tokens.tokenizer.eos[:1])
        text_D = np.maximum(np.diff(tokens.offsets_D1) - self._head - tail, 0)
        self._text_D, self._bytes_D = text_D, tokens.bytes_D
        self._before_D1 = np.concatenate([[0], np.cumsum(tokens.bytes_D)])

    def before(self, places_P: np.ndarray) -> np.ndarray:
        """Bytes of text before each place, float64 (P,)."""
        last = len(self._text_D) - 1
        d_P = np.minimum(np.searchsorted(self._offsets_D1, places_P, side="right") - 1, last)
        inside_P = np.clip(places_P - self._offsets_D1[d_P] - self._head, 0, self._text_D[d_P])
        share_P = inside_P / np.maximum(self._text_D[d_P], 1)
        # a document without a token of text has its bytes at its end
        whole_P = places_P >= self._offsets_D1[d_P + 1]
        share_P = np.where(whole_P, 1.0, share_P)
        return self._before_D1[d_P] + share_P * self._bytes_D[d_P]

    def predicted(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Bytes of the text of all tokens but the first of each piece, float64 (P,)."""
        stops_P = starts_P + lengths_P
        return self.before(stops_P) - self.before(np.minimum(starts_P + 1, stops_P))
