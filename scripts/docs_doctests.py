"""Griffe's extension for mkdocs.yml: doctests in docstrings become fenced blocks, since bare `>>>`
would be nested quotations in Markdown."""

import textwrap
from typing import Any

import griffe


def fenced(text: str) -> str:
    """Markdown with each doctest, up to the blank line that ends it, in a fence.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2\\n\\nDone.").split("\\n\\n")
    ['Adds.', '```pycon\\n>>> 1 + 1\\n2\\n```', 'Done.']
    """
    blocks = textwrap.dedent(text).split("\n\n")
    return "\n\n".join(
        f"```pycon\n{block}\n```" if block.lstrip().startswith(">>>") else block for block in blocks
    )


class Doctests(griffe.Extension):
    """Applies `fenced` to every docstring when it has been read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
