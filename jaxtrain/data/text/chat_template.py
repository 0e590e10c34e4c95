"""Chat templates: the Jinja text of a tokenizer that writes a conversation as one text.

It comes with the weights of others, so it runs in Jinja's sandbox, with what the templates of
transformers find there and nothing else. What stands between its own `generation` markers is what
the model is to say.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain import extras
from jaxtrain.errors import UserError
from jaxtrain.messages import one_line

Message = Mapping[str, Any]
Span = tuple[int, int]
"""First character and the one past the last."""

OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
"""What the markers become on the way: characters of private use."""
_MARKER = re.compile(r"\{%-?\+?\s*generation\b")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    special: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """A conversation as the template writes it.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hi"}])
    'user: Hi\\n'

    With `add_generation_prompt` it ends where the assistant's turn begins. `special` are the texts
    of special tokens (`Tokenizer.special`), and `variables` whatever else the template may read.
    `UserError`, in one line, if it is no template, or refuses the conversation.
    """
    return rendered(
        template,
        messages,
        add_generation_prompt=add_generation_prompt,
        special=special,
        **variables,
    )[0]


def rendered(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    special: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """The same, and what stands between the template's `generation` markers; `tools` are the JSON
    schemas of what the model may call.

    >>> template = (
    ...     "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    ... )
    >>> rendered(template, [{"content": "ab"}, {"content": "c"}])
    ('ab;c;', [(0, 2), (3, 4)])
    """
    import jinja2

    # the same names as in transformers; what a conversation does not have is not there
    values: dict[str, Any] = {"documents": None} | dict(special or {}) | variables
    without_none = [_without_none(message) for message in messages]
    written = json.dumps({"messages": without_none, "tools": tools}, ensure_ascii=False)
    if OPEN in written or CLOSE in written:
        raise UserError(
            f"holds U+{ord(OPEN):X} or U+{ord(CLOSE):X}, which mean nothing; take it out"
        )
    plain, compiled = json.loads(written), _compiled(template)
    try:
        text = compiled.render(**plain, add_generation_prompt=add_generation_prompt, **values)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template says: {one_line(str(error))}") from error
    # what a template of others does with a message may fail in any way
    except Exception as error:
        raise UserError(
            f"the chat template fails: {type(error).__name__}: {one_line(str(error))}"
        ) from error
    return _unmarked(text)


def check(template: str) -> None:
    """`UserError` if it is no template.

    >>> check("{{ messages }}")
    """
    _compiled(template)


def has_markers(template: str) -> bool:
    """Whether a template marks what the model is to say.

    >>> has_markers("{%- generation %}x{% endgeneration %}"), has_markers("{{ x }}")
    (True, False)
    """
    return bool(_MARKER.search(template))


def _without_none(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _unmarked(text: str) -> tuple[str, list[Span]]:
    parts: list[str] = []
    spans: list[Span] = []
    length, start = 0, 0
    for part in re.split(f"([{OPEN}{CLOSE}])", text):
        if part == OPEN:
            start = length
        elif part == CLOSE:
            spans.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), [span for span in spans if span[0] < span[1]]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    extras.require("a chat template", "jinja2")
    import jinja2
    from jinja2 import ext, sandbox

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _marking()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is no Jinja template: line {error.lineno}:"
            f" {one_line(error.message or '')}"
        ) from error


@functools.cache
def _marking() -> Any:
    """Jinja's extension for the block `generation`, whose text it puts between two marks."""
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        """The block `generation`."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            """The nodes of one block."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked", [])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    return Generation


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own writes for HTML
    return json.dumps(value, **({"ensure_ascii": False, "indent": indent} | options))


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
