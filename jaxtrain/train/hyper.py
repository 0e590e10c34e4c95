"""Hyper-parameters as data: numbers that are inputs of the compiled step rather than constants in
it.

`collect` reads the traced fields (see `fields.py`) of a tree of components into a flat dict; it
goes into `TrainState.hyper` and is checkpointed. `bind` is the way back: inside the step, it
rebuilds the components around the traced values. So a rate can change while a run lives, and a
sweep is one program over stacked dicts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtrain import fields
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon

Rules = Mapping[str, Sequence[Sequence[Any]]]
"""The bounds of each number, as JSON."""
_BOUNDS = {kind.__name__: kind for kind in (fields.Above, fields.AtLeast, fields.Between)}
_STEPS = "Steps"
"""Stands for the rule that a length is a whole number of steps."""


def collect(component: Any, prefix: str = "") -> dict[str, float]:
    """Every traced field that is switched on, by its dotted name.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Thing:
    ...     rate: fields.Positive = 0.1
    ...     dropout: fields.DropRate = 0.0
    >>> collect(Thing(), "optimizer")
    {'optimizer.rate': 0.1}

    `UserError` if a field is out of bounds or a horizon was not yet turned into steps.
    """
    values: dict[str, float] = {}
    for field in fields.fields_of(component):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(component, field.name)
        if fields.is_component(value):
            values |= collect(value, name)
        elif field.traced is not None and value is not None and value != field.traced.off:
            if isinstance(value, Horizon):
                raise UserError(
                    f"{name}={value}: a horizon must be turned into steps first; give a number of"
                    " steps"
                )
            if problem := field.problem(value):
                raise UserError(f"{name}={value}: {problem}")
            values[name] = float(value)
    return values


def rules(component: Any, prefix: str = "") -> dict[str, list[list[Any]]]:
    """The bounds of every traced field by its dotted name, as JSON that `problem` takes.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Thing:
    ...     rate: fields.Positive = 0.1
    >>> rules(Thing(), "optimizer")
    {'optimizer.rate': [['Above', 0]]}
    """
    found: dict[str, list[list[Any]]] = {}
    for field in fields.fields_of(component):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(component, field.name)
        if fields.is_component(value):
            found |= rules(value, name)
        elif field.traced is not None:
            found[name] = list(_as_json(field))
    return found


def _as_json(field: fields.Field) -> Iterator[list[Any]]:
    for mark in field.marks:
        if type(mark).__name__ in _BOUNDS:
            yield [type(mark).__name__, *dataclasses.astuple(mark)]
    if fields.field_type(field.type).base in fields.LENGTHS:
        yield [_STEPS]


def problem(value: float, bounds: Sequence[Sequence[Any]]) -> str | None:
    """What is wrong with a value of a number that has these `rules`, or None.

    >>> problem(-1.0, [["Above", 0]]), problem(0.5, [["Above", 0]])
    ('must be > 0', None)
    """
    marks = [_BOUNDS[kind](*limits) for kind, *limits in bounds if kind in _BOUNDS]
    kind = fields.Length if [_STEPS] in [list(bound) for bound in bounds] else float
    return fields.problem(value, kind, [*marks, fields.Traced()])


def bind(component: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The same component with each field named in `values` replaced; names that belong to other
    components are left alone.

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Thing:
    ...     rate: fields.Positive = 0.1
    >>> bind(Thing(), {"optimizer.rate": 0.5}, "optimizer")
    Thing(rate=0.5)
    """
    changes: dict[str, Any] = {}
    for field in fields.fields_of(component):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(component, field.name)
        if name in values:
            changes[field.name] = values[name]
        elif fields.is_component(value) and (bound := bind(value, values, name)) is not value:
            changes[field.name] = bound
    return fields.replaced(component, changes)
