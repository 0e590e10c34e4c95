"""What a text begins with, how much of it a model can see, and the text of the ids that it says.

Dims: N tokens of a text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain.data.text.protocol import TextStream, Tokenizer
from jaxtrain.errors import UserError

TEMPERATURE = 0.8
"""At which tokens are drawn, unless something else is asked for."""


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a text goes on from: what the tokenizer puts before every text, and the prompt.

    >>> from jaxtrain.data.text.tokenizers import Bytes, Characters
    >>> beginning(Bytes(), "ab"), beginning(Bytes(), ""), beginning(Characters("abc"), "")
    ([97, 98], [10], [0])

    If both are empty, a new line, or else what stands between documents, or else the first id.
    """
    ids = [*tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    if ids:
        return ids
    try:
        return tokenizer.encode("\n").tolist() or [*tokenizer.eos[:1]] or [0]
    except UserError:  # not every set of characters has one
        return [*tokenizer.eos[:1]] or [0]


def check_fits(ids: Sequence[int], room: int) -> None:
    """`UserError` for a prompt of more tokens than a model sees, unless `room` is 0."""
    if room and len(ids) > room:
        raise UserError(
            f"a prompt of {len(ids)} tokens is longer than the {room} positions that the model"
            f" learned; shorten it to {room} tokens at most"
        )


def room(model: Any, fields: Mapping[str, Any]) -> int:
    """How many tokens a model that was trained on such rows can see at once; 0 for any number.

    Learned positions beyond the end of the rows were never trained, so they do not count.
    """
    if model.positions != "learned":
        return 0
    lengths = [field.shape[0] - 1 for name, field in fields.items() if name == "tokens"]
    return min([model.max_length, *(length for length in lengths if length > 0)])


def ends(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text."""
    return [token for token in tokenizer.eos if token < model.vocabulary]


def text_of(tokenizer: Tokenizer, ids_N: Sequence[int]) -> str:
    """The text of ids, with U+FFFD for those that the tokenizer does not have.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> text_of(Bytes(), [104, 105, 300])
    'hi\ufffd'
    """
    stream = TextStream(tokenizer)
    return "".join(stream.push(token) for token in ids_N) + stream.flush()
