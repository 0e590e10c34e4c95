"""Tokenizers that need no library: bytes, and the characters of a corpus.

N: tokens
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.text.protocol import digest, valid_text
from jaxtrain.errors import UserError

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Each byte of the UTF-8 text is a token; id 256 ends a document.

    >>> Bytes().encode("é").tolist(), Bytes().decode([104, 105, 256])
    ([195, 169], 'hi')
    """

    name = "bytes"
    vocabulary = 257
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = (256,)
    chat_template: str | None = None

    @property
    def special(self) -> Mapping[str, str]:
        """The end of a text, as it is written out."""
        return {"eos_token": END_OF_TEXT}

    @property
    def fingerprint(self) -> str:
        """Of its record."""
        return digest(self.record())

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The bytes of the text; `special` reads `<|endoftext|>` as 256."""
        parts = valid_text(text).split(END_OF_TEXT) if special else [valid_text(text)]
        ids = [np.frombuffer(part.encode(), np.uint8).astype(np.int32) for part in parts]
        return np.concatenate([ids[0], *(x for part in ids[1:] for x in (self.eos, part))]).astype(
            np.int32
        )

    def decode(self, ids_N: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD."""
        ids_N = checked_ids(ids_N, self.vocabulary, self.name)
        runs = np.split(ids_N, np.flatnonzero(ids_N == 256))
        texts = [
            run[run != 256].astype(np.uint8).tobytes().decode("utf-8", "replace")
            for run in (runs if special else [ids_N])
        ]
        return END_OF_TEXT.join(texts)

    def token_id(self, token: str) -> int | None:
        """The id of one byte, or of `<|endoftext|>`."""
        if token == END_OF_TEXT:
            return 256
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

    def record(self) -> dict[str, Any]:
        """Nothing but its kind."""
        return {"kind": "bytes"}


@dataclasses.dataclass(frozen=True)
class Characters:
    """Each character of a corpus is a token, numbered in the order of their code points, as in
    nanoGPT's character data; there is no token that ends a text.

    >>> tokenizer = Characters.of(["hello"])
    >>> tokenizer.characters, tokenizer.encode("hole").tolist()
    ('ehlo', [1, 3, 2, 0])
    >>> tokenizer.encode("help")
    Traceback (most recent call last):
    ...
    jaxtrain.errors.UserError: 'p' (U+0070) is none of the 4 characters of the tokenizer
    """

    characters: str
    name = "characters"
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if list(self.characters) != sorted(set(self.characters)):
            raise UserError("characters: each once, in the order of their code points")

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Characters":
        """The characters of all texts."""
        found: set[str] = set()
        for text in texts:
            found |= set(text)
        return cls("".join(sorted(found)))

    @property
    def vocabulary(self) -> int:
        """How many characters there are."""
        return len(self.characters)

    @property
    def special(self) -> Mapping[str, str]:
        """None."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Of its record."""
        return digest(self.record())

    @functools.cached_property
    def _codes(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The number of each character; `UserError` names one that the corpus does not have."""
        codes_N = _code_points(valid_text(text))
        ids_N = np.searchsorted(self._codes, codes_N)
        # one more, so that what lies behind the last has a place to be compared with
        unknown = np.append(self._codes, -1)[ids_N] != codes_N
        if unknown.any():
            code = int(codes_N[unknown.argmax()])
            raise UserError(
                f"{chr(code)!r} (U+{code:04X}) is none of the {self.vocabulary} characters of the"
                " tokenizer"
            )
        return ids_N.astype(np.int32)

    def decode(self, ids_N: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The characters of the ids."""
        ids_N = checked_ids(ids_N, self.vocabulary, self.name)
        return self._codes[ids_N].astype("<u4").tobytes().decode("utf-32-le")

    def token_id(self, token: str) -> int | None:
        """The number of one character."""
        place = self.characters.find(token)
        return place if len(token) == 1 and place >= 0 else None

    def record(self) -> dict[str, Any]:
        """Its characters."""
        return {"kind": "characters", "characters": self.characters}


def checked_ids(ids_N: Sequence[int] | np.ndarray, vocabulary: int, name: str) -> np.ndarray:
    """Ids as an integer array; `UserError` if one is not in the vocabulary."""
    array_N = np.asarray(ids_N, np.int64)
    outside = (array_N < 0) | (array_N >= vocabulary)
    if outside.any():
        raise UserError(
            f"token {array_N[outside][0]} is not in the vocabulary of {name}, 0..{vocabulary - 1}"
        )
    return array_N


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
