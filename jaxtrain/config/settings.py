"""Settings: every field of a run and of its components that a flag can set, with the words that
document it.

A field's documentation is the string literal right under it. Python drops such strings, so they are
read from the source with `ast`; classes without a source file simply have none.
"""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

from jaxtrain import config
from jaxtrain.config import values
from jaxtrain.config.step_options import StepOptions
from jaxtrain.fields import Field, fields_of, is_component


@dataclasses.dataclass(frozen=True)
class Setting:
    """One flag-to-be: a field at its place in the run."""

    name: str
    field: Field
    value: Any
    help: str


def of_run(run: config.Run) -> list[Setting]:
    """Every field of the run and of its components that can be a flag, the run's own first.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> [setting.name for setting in of_run(run)][:3]
    ['steps', 'epochs', 'tokens']
    """
    own = [
        setting
        for setting in of_component(run, "")
        if any(isinstance(mark, config.Group) for mark in setting.field.marks)
    ]
    # What a run shares with every recipe comes last: steps and batch size are what people look for.
    shared = {field.name for field in fields_of(StepOptions)}
    own.sort(key=lambda setting: setting.name in shared)
    return own + [
        setting
        for family in config.FAMILIES
        for setting in of_component(getattr(run, family), f"{family}.")
    ]


def of_component(component: Any, prefix: str = "") -> Iterator[Setting]:
    """The settings of one component and of those nested in it, their names starting with
    `prefix`."""
    if not is_component(component):
        return
    docs = field_docs(type(component))
    for field in fields_of(component):
        value, name = getattr(component, field.name), f"{prefix}{field.name}"
        if is_component(value):
            yield from of_component(value, f"{name}.")
        elif values.readable(field.type):
            yield Setting(name, field, value, docs.get(field.name, ""))


def field_docs(cls: type) -> dict[str, str]:
    """The help of each field of a class, inherited ones included, each on one line.

    >>> from jaxtrain.config import Run
    >>> field_docs(Run)["seed"]
    'The root of every random stream of the run.'
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _fields_in(_definition(base))
    return docs


def summary(cls: type) -> str:
    """The first sentence of a class's own docstring, or nothing.

    >>> from jaxtrain.fields import Above
    >>> summary(Above)
    'The value must be greater than `limit`'
    """
    definition = _definition(cls)
    doc = ast.get_docstring(definition) if definition is not None else None
    return re.split(r"(?<!\bal)\. (?=[A-Z`])", " ".join((doc or "").split("\n\n")[0].split()))[
        0
    ].rstrip(".")


def _fields_in(definition: ast.ClassDef | None) -> dict[str, str]:
    body = definition.body if definition is not None else []
    docs = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _definition(cls: type) -> ast.ClassDef | None:
    return _classes(cls.__module__).get(cls.__qualname__.replace("<locals>.", ""))


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Every class in a module's source by its qualified name."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if (
        file is None
        or not file.endswith(".py")
        or module.split(".")[0] in sys.stdlib_module_names
        or module.startswith("flax.")
    ):
        return {}
    try:
        with open(file, "rb") as source:
            tree = ast.parse(importlib.util.decode_source(source.read()))
    except (OSError, SyntaxError):
        return {}
    found: dict[str, ast.ClassDef] = {}
    _collect(tree, "", found)
    return found


def _collect(node: ast.AST, prefix: str, found: dict[str, ast.ClassDef]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
            _collect(child, f"{prefix}{child.name}.", found)
