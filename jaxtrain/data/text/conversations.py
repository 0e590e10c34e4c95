"""Conversations: rows of JSON lines as tokens, and which of them the model learns to say.

What is supervised is what the chat template marks itself, or else each turn of the assistant: what
the template adds to the conversation before it, up to the token that ends a text.

N: tokens
"""

import codecs
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

Tools = Sequence[Mapping[str, Any]] | None
"""What a template finds as `tools`: JSON schemas, as transformers has them."""
Writer = Callable[..., tuple[str, list[Span]]]
"""`rendered` with all but the messages and `add_generation_prompt`."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, the line that they stand in with its bytes, and what tools the model has."""

    messages: tuple[Message, ...]
    row: int
    size: int
    tools: Tools = None


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
                found = _object(line)
                yield Conversation(messages_of(found), row, len(line), _tools(found))
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

    A `system` beside them stands in front. `BadRow` for anything else, and if nobody would learn
    from it.
    """
    found = _listed(row)
    if not isinstance(found, list) or not found:
        raise BadRow("holds no messages")
    messages = tuple(_message(number, each) for number, each in enumerate(found, start=1))
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no turn of the assistant, so there is nothing to learn")
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise BadRow("has turns of the assistant of weight 0 only, so there is nothing to learn")
    return (*_system(row, messages[0]), *messages)


def _system(row: Mapping[str, Any], first: Message) -> tuple[Message, ...]:
    """The message that `system` beside the others makes."""
    text = row.get("system")
    if text is None or text == "":
        return ()
    if not isinstance(text, str):
        raise BadRow(f"its 'system' is a {type(text).__name__}, no text")
    if first["role"] not in ("system", "developer"):
        return ({"role": "system", "content": text},)
    if first["content"] != text:
        raise BadRow("its 'system' and its message 1 are two different system messages; keep one")
    return ()


def _tools(row: Mapping[str, Any]) -> Tools:
    tools = row.get("tools")
    if tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        return tools
    raise BadRow("its 'tools' are no list of objects; write the JSON schema of each, as no text")


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
    weights = (0, 1) if role == "assistant" else (0,)
    if (weight := value.get("weight")) is not None and weight not in weights:
        valid = "0 (it is not learned) or 1" if role == "assistant" else "0 (it is not learned)"
        raise BadRow(f"message {number}: weight {weight!r} of {role} is unknown; valid: {valid}")
    rest = {key: each for key, each in value.items() if key not in ("role", "from", "value")}
    return {"role": role, **rest, "content": content}


def tokenized(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message], tools: Tools = None
) -> Tokenized:
    """A conversation as ids, with those that are supervised: none of a message of `weight` 0.

    `UserError` if the template refuses it, does not write the tools that there are, or writes a
    turn otherwise once another one follows it, where that hides what is supervised.
    """
    if tools and "tools" not in template:
        raise UserError(
            "has tools, which the chat template does not write; give a template that does"
            " (--data.template=FILE.jinja), or take them out"
        )
    left_out = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") == 0
    ]
    plain = [{key: message[key] for key in message if key != "weight"} for message in messages]
    write = functools.partial(rendered, template, special=tokenizer.special, tools=tools)
    if has_markers(template):
        text, spans = _marked_parts(write, plain, left_out)
        return _of_spans(tokenizer, text, spans, to_end_token=False)
    text, spans = _turns(write, plain, left_out)
    return _of_spans(tokenizer, text, spans, to_end_token=True)


def _marked_parts(
    write: Writer, messages: Sequence[Message], left_out: Sequence[int]
) -> tuple[str, list[Span]]:
    """The text of a conversation, and what is marked in it, but in the messages that are left out:
    what a message is the first to bring."""
    text, spans = write(messages)
    dropped: list[Span] = []
    for index in left_out:
        before = write(messages[:index])[1] if index else []
        whole = write(messages[: index + 1])[1]
        if spans[: len(whole)] != whole or whole[: len(before)] != before:
            raise UserError(
                f"message {index + 1}: has weight 0, and the chat template marks what comes before"
                " otherwise once more follows, so nothing tells which marks are its own; give"
                " another template (--data.template=FILE.jinja), or take the weight out"
            )
        dropped += whole[len(before) :]
    return text, [span for span in spans if span not in dropped]


def _turns(
    write: Writer, messages: Sequence[Message], left_out: Collection[int]
) -> tuple[str, list[Span]]:
    """The text of a conversation, and the turns of the assistant in it, found by rendering what
    comes before each of them."""
    text, _ = write(messages)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index in left_out:
            continue
        if index == 0:
            raise UserError(
                "begins with the assistant, and the chat template marks no turns: nothing tells"
                " where this one begins; put a message before it"
            )
        before, _ = write(messages[:index], add_generation_prompt=True)
        whole, _ = write(messages[: index + 1])
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
