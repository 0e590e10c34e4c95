"""Tokens of text files, made once and kept: memory-mapped ids, where each document begins, and how
many bytes of text it was.

D: documents
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtrain.data.text.protocol import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a corpus, in the order of its documents.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> tokens = in_memory(["ab", "c"], Bytes())
    >>> len(tokens), tokens.read(0, 5).tolist(), tokens.offsets_D1.tolist()
    (5, [97, 98, 256, 99, 256], [0, 3, 5])
    >>> tokens.bytes_D.tolist()
    [2, 1]

    Document d is `read(offsets_D1[d], offsets_D1[d + 1])`: `tokenizer.bos`, its text, and the first
    of `tokenizer.eos`, where the tokenizer has them. `bytes_D` counts the UTF-8 bytes of its text.
    """

    shards: tuple[np.ndarray, ...]
    """The ids, uint16 or uint32, in files that are mapped into memory; `read` hides where one ends."""
    offsets_D1: np.ndarray
    bytes_D: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str
    """Of the tokenizer and of the contents of all files: changes when any token may."""
    modified_ns: int | None
    """When the newest of the files was changed."""
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    file_D: np.ndarray | None = None
    row_D: np.ndarray | None = None

    @functools.cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *map(len, self.shards)]).tolist()

    def __len__(self) -> int:
        return int(self.offsets_D1[-1])

    @property
    def dtype(self) -> np.dtype:
        """uint16 where every id fits, else uint32."""
        return id_dtype(self.tokenizer.vocabulary)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids of places start..stop; not to be written to, for it may be the file itself."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        starts, parts = self._starts, []
        shard = max(bisect.bisect_right(starts, start) - 1, 0)
        while start < stop:
            end = min(stop, starts[shard + 1])
            parts.append(self.shards[shard][start - starts[shard] : end - starts[shard]])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def place(self, document: int) -> str:
        """Where a document stands, for messages: `corpus.jsonl:17`."""
        if self.file_D is None or self.row_D is None:
            return f"document {document}"
        return f"{self.files[self.file_D[document]]}:{self.row_D[document]}"


def open_tokens(
    paths: str | Sequence[str],
    tokenizer: str | Tokenizer,
    *,
    cache_dir: str | Path | None = None,
    key: str = "text",
    separator: str = "",
    bad: str = "error",
    processes: int = 0,
) -> Tokens:
    """The tokens of files, folders and globs: read from the cache, or made now and kept there.

    `tokenizer` is one, or its short text (`tokenizers.open_tokenizer`); `key` the field of JSON lines
    or the column of Parquet; `separator` what stands between documents of plain text (empty: a
    file is one document); `bad` is `error` or `skip`: what happens to broken or empty documents,
    which are counted in `notes`. `processes` 0 is one a CPU. `UserError` names file and line.
    """
    raise NotImplementedError


def in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """The tokens of a few texts, without files and cache: for tests, and for what is small."""
    dtype = id_dtype(tokenizer.vocabulary)
    documents = [
        np.concatenate([tokenizer.bos, tokenizer.encode(text), tokenizer.eos[:1]]).astype(dtype)
        for text in texts
    ]
    ids = np.concatenate([np.zeros(0, dtype), *documents])
    return Tokens(
        shards=(ids,),
        offsets_D1=np.cumsum([0, *map(len, documents)], dtype=np.int64),
        bytes_D=np.array([len(text.encode()) for text in texts], np.int64),
        tokenizer=tokenizer,
        fingerprint=f"{tokenizer.fingerprint}-{ids.tobytes().hex()[:32]}",
        modified_ns=None,
    )


def id_dtype(vocabulary: int) -> np.dtype:
    """What ids are kept as: uint16 up to 65,536 of them.

    >>> id_dtype(65_536), id_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
