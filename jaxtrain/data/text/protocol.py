"""What a tokenizer is: text to ids and back, who it is, and text that is shown while its ids still
arrive.

N: tokens
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtrain.errors import UserError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders give for bytes that are no UTF-8, such as half a character."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Compared and kept by `fingerprint`, made again anywhere by `record`."""

    @property
    def name(self) -> str:
        """What messages call it: `bytes`, or the file that it was read from."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many ids there are: every id is below it."""
        ...

    @property
    def bos(self) -> tuple[int, ...]:
        """What its own files put before every text; `()` if nothing (`encode` does not add it)."""
        ...

    @property
    def eos(self) -> tuple[int, ...]:
        """The ids that end a text; `()` if there is none. The first follows every document in
        training, and any of them ends a sample."""
        ...

    @property
    def special(self) -> Mapping[str, str]:
        """The texts of special tokens by their role, as chat templates know them (`bos_token`,
        `eos_token`, `pad_token`, ...)."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that renders conversations, if its files have one."""
        ...

    @property
    def fingerprint(self) -> str:
        """32 hex digits that differ between tokenizers that encode or decode differently."""
        ...

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """The ids of the bare text, int32 (N,), with neither `bos` nor `eos`.

        Who uses them adds these: data sources and `inference.embedding.embed` around every text,
        `inference.prompts.beginning` what stands before a prompt.

        With `special`, special tokens that are written out in the text become their ids, as in a
        rendered conversation; without, they are text like any other.
        """
        ...

    def decode(self, ids_N: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """The text of ids. Special tokens are written out with `special`, else left out; bytes
        that are no UTF-8 become U+FFFD."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one token as the vocabulary writes it, such as `<|im_end|>`; None if there is
        none."""
        ...

    def record(self) -> dict[str, Any]:
        """JSON from which `tokenizers.from_record` makes it again without its files."""
        ...


class TextStream:
    """Text as its ids arrive: never half a character, never a space too few or too many.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> stream = TextStream(Bytes())
    >>> [stream.push(byte) for byte in "aé".encode()], stream.flush()
    (['a', '', 'é'], '')

    All pieces and the `flush` at the end together are `decode` of all ids. An id is decoded with
    the few before it, because the spaces of many tokenizers depend on them.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._context: list[int] = []  # shown already
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is incomplete. An id that the
        tokenizer does not have is U+FFFD: the tables of models may have more rows."""
        if token >= self._tokenizer.vocabulary:
            return self.flush() + REPLACEMENT
        self._pending.append(int(token))
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        text = self._new_text() if self._pending else ""
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, special=self._special)
        both = self._tokenizer.decode([*self._context, *self._pending], special=self._special)
        return both[len(before) :]


def valid_text(text: str) -> str:
    """The text; `UserError` if it holds half a character, which no UTF-8 can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"text: holds half a character (U+{code:04X}) at {error.start}; it was no UTF-8"
        ) from error
    return text


def digest(value: Any) -> str:
    """32 hex digits of any JSON value.

    >>> digest({"a": 1}) == digest({"a": 1.5})
    False
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
