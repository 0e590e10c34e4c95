"""`python -m jaxtrain list [FAMILY ...]`: every named component, and how it differs from the
defaults of its class."""

import importlib
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtrain import messages
from jaxtrain.cli.command import Command, refuse_flags
from jaxtrain.errors import UserError

FAMILIES = {
    "models": "jaxtrain.models",
    "data": "jaxtrain.data",
    "tasks": "jaxtrain.tasks",
    "optimizers": "jaxtrain.optimizers",
    "schedules": "jaxtrain.schedules",
    "augment": "jaxtrain.augment",
}
"""Where each family has its table of names."""


def run(families: Sequence[str]) -> int:
    """Prints the named components of the families, or of all, a line each."""
    refuse_flags("list", families)
    for family in families:
        if family not in FAMILIES:
            raise UserError(
                f"list {messages.printable(family)}: unknown; valid:"
                f" {', '.join(FAMILIES)}{messages.did_you_mean(family, FAMILIES)}"
            )
    for family in dict.fromkeys(families or FAMILIES):
        names: Mapping[str, Any] = importlib.import_module(FAMILIES[family]).NAMES
        print(f"{family}  (--{'data' if family == 'data' else family.removesuffix('s')}=NAME)")
        width = max(map(len, names), default=0)
        said = ""
        for name, component in names.items():
            words, changed = _described(component)
            if words != said:  # once for all sizes of one class
                print(_wrapped(words, "  "))
            said = words
            print(
                _wrapped(f"{name.ljust(width)}  {', '.join(changed)}".rstrip(), "    ", width + 2)
            )
    return 0


def _wrapped(text: str, margin: str, hanging: int = 2) -> str:
    """A text on lines that fit the terminal, at most 100 columns."""
    columns = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.fill(
        text,
        columns,
        initial_indent=margin,
        subsequent_indent=margin + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _described(component: Any) -> tuple[str, list[str]]:
    """What a component is, and how it differs from its class's defaults."""
    from jaxtrain.config import settings, values

    cls = component if isinstance(component, type) else type(component)
    own = [] if isinstance(component, type) else settings.of_component(component)
    changed = [
        f"{setting.name}={values.text(setting.value)}"
        for setting in own
        if setting.value != setting.field.default
    ]
    words = settings.summary(cls) or cls.__name__
    return words, changed


COMMAND = Command("[FAMILY ...]", f"every named component: {', '.join(FAMILIES)}", run)
