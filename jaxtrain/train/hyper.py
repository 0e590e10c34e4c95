"""Hyper-parameters as data: numbers that are inputs of the compiled step rather than constants in
it.

`collect` reads the traced fields (see `fields.py`) of a tree of components into a flat dict; it
goes into `TrainState.hyper` and is checkpointed. `bind` is the way back: inside the step, it
rebuilds the components around the traced values. So a rate can change while a run lives, and a
sweep is one program over stacked dicts.
"""

from collections.abc import Mapping
from typing import Any

from jaxtrain import fields
from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon


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
