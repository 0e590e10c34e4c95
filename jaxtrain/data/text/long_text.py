"""Long texts in pieces that together have exactly the ids of the whole: a library needs a hundred
times the memory of a text, and two processes can share one.

N: tokens
"""

import codecs
import itertools
import os
import re

import numpy as np

from jaxtrain.data.text.protocol import Tokenizer

LONG = 1 << 20
"""Characters from which a text is cut."""
_NEAR = 512
"""How many characters on each side of a cut decide whether it changes an id."""
_TRIES = 32
_CANDIDATES = (
    re.compile(r"(?<=\S\n)(?=\S)"),
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(r"(?s)(?=.)"),
)
"""Where to cut, best first: between lines, between words, anywhere."""
_MARGIN = 1 << 20


def encode_long(
    tokenizer: Tokenizer, text: str, *, before: str = "", length: int = LONG
) -> np.ndarray:
    """`tokenizer.encode(text)`, a piece at a time; `before` is the character that the text goes on
    from, if it is itself a part.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> encode_long(Bytes(), "one two three", length=5).tolist() == list(b"one two three")
    True
    """
    pieces, start = [], 0
    while start < len(text) or not pieces:
        cut = find_cut(tokenizer, text, start + length)
        piece = text[start:cut]
        ids_N = _encode_after(tokenizer, text[start - 1] if start else before, piece)
        # only where it was cut, and there it was looked at before
        assert ids_N is not None, (tokenizer.name, piece[:80])
        pieces.append(ids_N)
        start = len(text) if cut is None else cut
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def find_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """The first good place at or behind `start` at which the text can be cut without changing an
    id; None if it is best left whole from there on."""
    while _NEAR < start < len(text) - _NEAR:
        for pattern in _CANDIDATES:
            found = pattern.finditer(text, start, min(start + _MARGIN, len(text) - _NEAR))
            for match in itertools.islice(found, _TRIES):
                if keeps_ids(tokenizer, text, match.start()):
                    return match.start()
        start += _MARGIN
    return None


def keeps_ids(tokenizer: Tokenizer, text: str, cut: int) -> bool:
    """Whether the two sides of a cut have the ids of the whole, as its neighbourhood tells."""
    left, right = text[max(cut - _NEAR, 0) : cut], text[cut : cut + _NEAR]
    after_N = _encode_after(tokenizer, text[cut - 1], right)
    return after_N is not None and np.array_equal(
        tokenizer.encode(left + right), np.concatenate([tokenizer.encode(left), after_N])
    )


def _encode_after(tokenizer: Tokenizer, before: str, text: str) -> np.ndarray | None:
    """The ids of a text behind a character, so that none takes it for the head of a document; None
    if they are one with those of the character."""
    if not before:
        return tokenizer.encode(text)
    head_N, both_N = tokenizer.encode(before), tokenizer.encode(before + text)
    if not np.array_equal(both_N[: len(head_N)], head_N):
        return None
    return both_N[len(head_N) :]


def file_cuts(tokenizer: Tokenizer, path: str, part_bytes: int) -> list[int]:
    """The bytes at which a file of UTF-8 can be cut into parts of about that size, for any of which
    `encode_long` gives the ids of the whole; none if it is no UTF-8, or holds NUL bytes."""
    size = os.path.getsize(path)
    if size <= part_bytes or not _is_text(path):
        return []
    cuts, at = [], part_bytes
    with open(path, "rb") as stream:
        while at < size - part_bytes // 2:
            begin = max(at - 4 * _NEAR - 4, 0)
            stream.seek(begin)
            window = stream.read(at - begin + _MARGIN)
            # the ends of the window may be parts of a character
            head = next(place for place in range(4) if window[place] & 0xC0 != 0x80)
            text = window[head:].decode(errors="ignore")
            start = len(window[head : at - begin].decode(errors="ignore"))
            cut = find_cut(tokenizer, text, start)
            if cut is None:
                at += _MARGIN
                continue
            cuts.append(begin + head + len(text[:cut].encode()))
            at = cuts[-1] + part_bytes
    return cuts


def character_before(path: str, start: int) -> str:
    """The character that ends at byte `start` of a file of UTF-8; empty at its head."""
    with open(path, "rb") as stream:
        stream.seek(max(start - 4, 0))
        return stream.read(min(start, 4)).decode(errors="ignore")[-1:]


def _is_text(path: str) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as stream:
        try:
            while chunk := stream.read(1 << 20):
                if "\0" in decoder.decode(chunk):
                    return False
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
