"""What a component's field may hold: its bounds, and whether it is an input of the compiled step.

Components are frozen dataclasses (or Linen modules). A field's annotation says everything that
flags, checks and sweeps need:

    learning_rate: Positive = 1e-3            # bounded, and an input of the step
    depth: Count = 12                         # bounded, and part of the program

A *traced* field changes neither shapes nor the program, so its value is fed to the compiled step
(see `hyper.py`) instead of being compiled in. A traced field may name the value at which it is
`off`: there it stays a constant, so what is switched off costs nothing.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon


@dataclasses.dataclass(frozen=True)
class Above:
    """The value must be greater than `limit`."""

    limit: float

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, or None.

        >>> Above(0).problem(-1)
        'must be > 0'
        """
        return None if value > self.limit else f"must be > {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The value must be an integer or number of at least `limit`."""

    limit: float

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        return None if value >= self.limit else f"must be >= {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Between:
    """The value must lie in [low, high], or in [low, high) if `open_above`."""

    low: float
    high: float
    open_above: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, or None.

        >>> Between(0, 1).problem(1.5)
        'must be in 0..1'
        """
        inside = self.low <= value < self.high or (value == self.high and not self.open_above)
        bounds = (
            f"{self.low:g} <= value < {self.high:g}"
            if self.open_above
            else f"in {self.low:g}..{self.high:g}"
        )
        return None if inside else f"must be {bounds}"


@dataclasses.dataclass(frozen=True)
class Traced:
    """Marks a field as an input of the compiled step; at `off` (if given) it stays a constant of
    the program."""

    off: float | None = None


Count = Annotated[int, AtLeast(1)]
Positive = Annotated[float, Above(0), Traced()]
NonNegative = Annotated[float, AtLeast(0), Traced(off=0.0)]
Probability = Annotated[float, Between(0, 1), Traced(off=0.0)]
DropRate = Annotated[float, Between(0, 1, open_above=True), Traced(off=0.0)]
Decay = Annotated[float, Between(0, 1, open_above=True), Traced()]
Length = Annotated[Horizon | float, Traced()]
"""A horizon as configured; the runner replaces it by a number of steps."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a component, with its annotation taken apart."""

    name: str
    type: Any
    marks: tuple[Any, ...]
    default: Any

    @property
    def traced(self) -> Traced | None:
        """The `Traced` mark, if there is one."""
        return next((mark for mark in self.marks if isinstance(mark, Traced)), None)

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None; None itself and non-numbers have no bounds."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return "must be finite"
        return next(
            (
                text
                for mark in self.marks
                if hasattr(mark, "problem") and (text := mark.problem(value))
            ),
            None,
        )


def is_component(value: Any) -> bool:
    """Whether `value` is a component: an instance of a dataclass (Linen modules are) other than a
    plain value such as a horizon."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Horizon)


def fields_of(component: Any) -> Iterator[Field]:
    """The fields of a component that are its own settings (Linen's `parent` and `name`, and private
    ones, are not).

    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Thing:
    ...     rate: Positive = 0.1
    >>> [(field.name, field.type.__name__, field.default) for field in fields_of(Thing())]
    [('rate', 'float', 0.1)]
    """
    cls = component if isinstance(component, type) else type(component)
    hints = typing.get_type_hints(cls, include_extras=True)
    linen = {"parent", "name"} if _is_linen(cls) else set()
    for field in dataclasses.fields(cls):
        if field.name.startswith("_") or field.name in linen or not field.init:
            continue
        annotation, marks = _unwrap(hints[field.name])
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        yield Field(field.name, annotation, marks, default)


def check(component: Any, name: str = "") -> None:
    """Raises `ValueError` if a field of `component`, or of one nested in it, is out of its
    bounds."""
    name = name or type(component).__name__
    for field in fields_of(component):
        value = getattr(component, field.name)
        if is_component(value):
            check(value, f"{name}.{field.name}")
        elif problem := field.problem(value):
            raise UserError(f"{name}.{field.name}={value}: {problem}")


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits marks from a type, also for `Annotated[...] | None`."""
    if typing.get_origin(annotation) is Annotated:
        base, *marks = typing.get_args(annotation)
        return base, tuple(marks)
    arguments = typing.get_args(annotation)
    if type(None) in arguments and len(arguments) == 2:
        base, marks = _unwrap(
            next(argument for argument in arguments if argument is not type(None))
        )
        return base | None, marks
    return annotation, ()


def _is_linen(cls: type) -> bool:
    return any(base.__module__.startswith("flax.linen") for base in cls.__mro__)
