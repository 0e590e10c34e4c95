"""Tokenizers by a short text, such as a flag holds: `bytes`, `characters`, `bpe:4096`, a
`tokenizer.json`, the folder of a model, or a SentencePiece `FILE.model`."""

from jaxtrain.data.text.plain_tokenizers import Bytes, Characters
from jaxtrain.data.text.protocol import TextStream, Tokenizer

__all__ = ["Bytes", "Characters", "TextStream", "Tokenizer", "open_tokenizer"]


def open_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a short text names.

    >>> open_tokenizer("bytes").vocabulary
    257
    """
    if spec == "bytes":
        return Bytes()
    raise NotImplementedError(spec)
