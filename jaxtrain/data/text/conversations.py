"""Conversations: rows of JSON lines as tokens, and which of them the model learns to say.

What is supervised is what the chat template marks itself, or else each turn of the assistant: what
the template adds to the conversation before it, up to the token that ends a text.

N: tokens
"""

import codecs
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.text import documents
from jaxtrain.data.text.chat_template import Message, Span, has_markers, render, rendered
from jaxtrain.data.text.documents import WHOLE, Bad, Part
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.data.text.text_files import LINES, TextFile, TextFiles, find_files
from jaxtrain.errors import UserError
from jaxtrain.messages import did_you_mean, one_line, printable

__all__ = ["Conversation", "Tokenized", "find_conversations", "marked", "render", "tokenized"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_WORDS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""ShareGPT's names of roles."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and the line that they stand in with its bytes."""

    messages: tuple[Message, ...]
    row: int
    size: int


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The ids of a conversation, and which of them are supervised."""

    ids_N: np.ndarray
    supervised_N: np.ndarray

    @property
    def share(self) -> float:
        """The share of supervised ids."""
        return float(self.supervised_N.mean()) if len(self.ids_N) else 0.0


class BadRow(Exception):
    """What is wrong with a row, without its place."""


def find_conversations(paths: str | Sequence[str]) -> TextFiles:
    """The files that paths name; `UserError` if one is none of JSON lines."""
    found = find_files(paths)
    for file in found.files:
        if file.kind != LINES:
            raise UserError(
                f"{printable(file.path)}: is {file.kind}; conversations are JSON lines: an object a"
                ' line, such as {"messages": [{"role": "user", "content": "..."}, ...]}'
            )
    return found


def read_part(file: TextFile, part: Part = WHOLE) -> Iterator[Conversation | Bad]:
    """The conversations of a file, or of a part of it, in order, and the rows that hold none.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "chat.jsonl"
    >>> _ = path.write_text('{"prompt": "Hi", "completion": "Ho"}')
    >>> [found] = read_part(TextFile(str(path), LINES))
    >>> [message["role"] for message in found.messages], found.row
    (['user', 'assistant'], 1)
    """
    with documents.reading(file):
        for row, line in enumerate(documents.lines_of(file, part), start=part.row):
            line = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
            if not line.strip():
                continue
            try:
                yield Conversation(messages_of(_object(line)), row, len(line))
            except BadRow as fault:
                yield Bad(row, str(fault))


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"byte 0x{line[error.start]:02x} is no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is no JSON ({one_line(str(error))})") from None
    if not isinstance(value, dict):
        raise BadRow(f"is a JSON {type(value).__name__}, not an object with messages")
    return value


def messages_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row, as {role, content}: of `messages`, of ShareGPT's `conversations`, or
    of a `prompt` and its `completion`.

    >>> messages_of(
    ...     {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    ... )
    ({'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'})

    `BadRow` for anything else, and if nobody would learn from it.
    """
    found = _listed(row)
    if not isinstance(found, list) or not found:
        raise BadRow("holds no messages")
    messages = tuple(_message(number, each) for number, each in enumerate(found, start=1))
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no turn of the assistant, so there is nothing to learn")
    return messages


def _listed(row: Mapping[str, Any]) -> Any:
    for key in ("messages", "conversations"):
        if key in row:
            return row[key]
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return prompt + completion
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    names = ", ".join(map(repr, sorted(row)[:8])) or "none"
    raise BadRow(
        "has neither 'messages' nor 'conversations', nor 'prompt' and 'completion', but"
        f" {names}{did_you_mean(next(iter(row), ''), ('messages', 'conversations'))}"
    )


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"message {number} is no object with role and content")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if role is None:
        raise BadRow(f"message {number} has no 'role', but {', '.join(map(repr, value))}")
    role = _OTHER_WORDS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        near = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise BadRow(f"message {number}: unknown role {role!r}; valid: {', '.join(ROLES)}{near}")
    if content is not None and not isinstance(content, str):
        raise BadRow(f"message {number}: its content is a {type(content).__name__}, no text")
    if not content and not value.get("tool_calls"):
        raise BadRow(f"message {number}: its content is empty")
    rest = {key: each for key, each in value.items() if key not in ("role", "from", "value")}
    return {"role": role, **rest, "content": content}


def tokenized(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> Tokenized:
    """A conversation as ids, with those that are supervised.

    `UserError` if the template refuses it, or writes a turn otherwise once another one follows it
    and marks nothing.
    """
    if has_markers(template):
        text, spans = rendered(template, messages, special=tokenizer.special)
        return _of_spans(tokenizer, text, spans, to_end_token=False)
    text, spans = _turns(template, messages, tokenizer.special)
    return _of_spans(tokenizer, text, spans, to_end_token=True)


def _turns(
    template: str, messages: Sequence[Message], special: Mapping[str, str]
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the turns of the assistant in it, found by rendering what
    comes before each of them."""
    text = render(template, messages, special=special)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise UserError(
                "begins with the assistant, and the chat template marks no turns: nothing tells"
                " where this one begins; put a message before it"
            )
        before = render(template, messages[:index], add_generation_prompt=True, special=special)
        whole = render(template, messages[: index + 1], special=special)
        if not (whole.startswith(before) and text.startswith(whole)):
            raise UserError(
                f"message {index + 1}: the chat template marks no turns, and writes what comes"
                " before this one otherwise once more follows, so nothing tells where it begins;"
                " give a template with {% generation %} markers (--data.template=FILE.jinja)"
            )
        spans.append((len(before), len(whole)))
    return text, spans


def _of_spans(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], *, to_end_token: bool
) -> Tokenized:
    ids_N = tokenizer.encode(text, special=True)
    supervised_N = np.zeros(len(ids_N), bool)
    for start, stop in spans:
        first = _token_at(tokenizer, text, ids_N, start)
        last = _token_at(tokenizer, text, ids_N, stop - 1)
        if to_end_token and tokenizer.eos:
            ends = np.flatnonzero(np.isin(ids_N[first : last + 1], tokenizer.eos))
            last = first + int(ends[-1]) if len(ends) else last
        supervised_N[first : last + 1] = True
    return Tokenized(ids_N, supervised_N)


def _token_at(tokenizer: Tokenizer, text: str, ids_N: np.ndarray, character: int) -> int:
    """The token that a character of the text is in.

    Most often a token begins there, and the text before it has the same ids alone. Otherwise the
    ids are decoded one by one from the first that differs.
    """
    before_N = tokenizer.encode(text[:character], special=True)
    shared = min(len(before_N), len(ids_N))
    differs = np.flatnonzero(before_N[:shared] != ids_N[:shared])
    place = int(differs[0]) if len(differs) else shared
    if place == len(before_N):
        return min(place, len(ids_N) - 1)
    # a token is longest where many bytes make it: whoever does not decode to the text stays here
    while place < len(ids_N) - 1:
        decoded = tokenizer.decode(ids_N[: place + 1], special=True)
        if not text.startswith(decoded) or len(decoded) > character:
            break
        place += 1
    return place


def marked(tokenizer: Tokenizer, found: Tokenized, *, colour: bool) -> str:
    """A conversation whose supervised parts stand out: green with `colour`, and within `{+ +}` in
    any case.

    >>> from jaxtrain.data.text.tokenizers import Bytes
    >>> ids_N = np.frombuffer(b"Q: A", np.uint8).astype(np.int32)
    >>> marked(Bytes(), Tokenized(ids_N, np.array([0, 0, 0, 1], bool)), colour=False)
    'Q: {+A+}'
    """
    edges = np.flatnonzero(np.diff(found.supervised_N)) + 1
    parts = []
    for start, stop in zip([0, *edges], [*edges, len(found.ids_N)], strict=True):
        if start == stop:
            continue
        text = tokenizer.decode(found.ids_N[start:stop], special=True)
        if found.supervised_N[start]:
            text = f"\x1b[32m{{+{text}+}}\x1b[0m" if colour else f"{{+{text}+}}"
        parts.append(text)
    return "".join(parts)
