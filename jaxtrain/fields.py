"""What a component's field may hold: its bounds, and whether it is an input of the compiled step.

Components are frozen dataclasses (or Linen modules). A field's annotation says everything that
flags, checks and sweeps need, as marks within `Annotated`:

    learning_rate: Positive = 1e-3            # bounded, and an input of the step
    depth: Count = 12                         # bounded, and part of the program
    token: Annotated[str, Secret()] = ""      # never written down

A *traced* field changes neither shapes nor the program, so its value is fed to the compiled step
(see `hyper.py`) instead of being compiled in. A traced field may name the value at which it is
`off`: there it stays a constant, so what is switched off costs nothing.

`problem` is the one place where bounds are checked: flags, components and run.json all ask it.
"""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon, Steps, TokenCount, Unit

_LARGEST = 2**63 - 1
_UNIONS = (typing.Union, types.UnionType)
_TEXTS = (str, str | None, tuple[str, ...])
LENGTHS = (Horizon | float, float | Horizon)
_SECRET_NAME = re.compile(r"(?:^|[._])(?:token|key|secret|password)$")


class Bound:
    """A rule that a number must keep."""

    @property
    def rule(self) -> str:
        """The rule in words, such as `> 0`."""
        raise NotImplementedError

    @property
    def must_be(self) -> str:
        """What an error says that the number must be."""
        return self.rule

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the rule."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Above(Bound):
    """The value must be greater than `limit`."""

    limit: float

    @property
    def rule(self) -> str:
        return f"> {self.limit:g}"

    def holds(self, value: float) -> bool:
        return value > self.limit


@dataclasses.dataclass(frozen=True)
class AtLeast(Bound):
    """The value must be at least `limit`; `whole` has the error say that it must be an integer,
    too."""

    limit: float
    whole: bool = False

    @property
    def rule(self) -> str:
        return f">= {self.limit:g}"

    @property
    def must_be(self) -> str:
        return f"an integer {self.rule}" if self.whole else self.rule

    def holds(self, value: float) -> bool:
        return value >= self.limit


@dataclasses.dataclass(frozen=True)
class Between(Bound):
    """The value must lie in [low, high], or in [low, high) if `open_above`; the limits of `whole`
    numbers are written out in full.

    >>> Between(0, 1).rule, Between(0, 2**32 - 1, whole=True).rule
    ('in 0..1', '0..4294967295')
    """

    low: float
    high: float
    open_above: bool = False
    whole: bool = False

    @property
    def rule(self) -> str:
        if self.whole:
            return f"{self.low}..{self.high}"
        limits = f"{self.low:g} <= value < {self.high:g}"
        return limits if self.open_above else f"in {self.low:g}..{self.high:g}"

    def holds(self, value: float) -> bool:
        return self.low <= value < self.high or (value == self.high and not self.open_above)


@dataclasses.dataclass(frozen=True)
class Traced:
    """Marks a field as an input of the compiled step; at `off` (if given) it stays a constant of
    the program."""

    off: float | None = None


@dataclasses.dataclass(frozen=True)
class Secret:
    """Marks a text that is never written down, and may come from the environment instead of the
    command line. A text whose name ends in token, key, secret or password is one without the mark,
    for a mark is easily forgotten."""


@dataclasses.dataclass(frozen=True)
class Public:
    """Marks a text that is no secret, although its name ends like one."""


@dataclasses.dataclass(frozen=True)
class NamedFiles:
    """Marks a tuple of pairs whose items are NAME=FILES, and no rules."""


@dataclasses.dataclass(frozen=True)
class Free:
    """Marks a field of a component that may differ from the run that goes on; a line says so. Of
    others a difference needs --allow_config_change."""


Count = Annotated[int, AtLeast(1)]
Positive = Annotated[float, Above(0), Traced()]
NonNegative = Annotated[float, AtLeast(0), Traced(off=0.0)]
Probability = Annotated[float, Between(0, 1), Traced(off=0.0)]
DropRate = Annotated[float, Between(0, 1, open_above=True), Traced(off=0.0)]
Decay = Annotated[float, Between(0, 1, open_above=True), Traced()]
Length = Annotated[Horizon | float, Traced()]
"""A horizon as configured; the runner replaces it by a number of steps."""


class FieldType(typing.NamedTuple):
    """A field's annotation taken apart: its type without None, whether None is allowed, and its
    marks."""

    base: Any
    optional: bool
    marks: tuple[Any, ...]

    @property
    def origin(self) -> Any:
        """`tuple` for `tuple[int, ...]`, `Literal` for `Literal["a"]`; the type itself
        otherwise."""
        origin = typing.get_origin(self.base)
        return self.base if origin in (None, *_UNIONS) else origin

    @property
    def items(self) -> tuple[Any, ...]:
        """The types of a tuple's items, as written, or the choices of a literal."""
        return typing.get_args(self.base)

    @property
    def rule(self) -> str:
        """The first bound in words, or nothing."""
        return next((mark.rule for mark in self.marks if isinstance(mark, Bound)), "")

    def item_types(self, count: int) -> Sequence[Any]:
        """The types of a tuple's `count` items; of a bare `tuple` nothing is known."""
        if not self.items:
            return [Any] * count
        return [self.items[0]] * count if self.items[-1] is Ellipsis else self.items


def field_type(annotation: Any, marks: Sequence[Any] = ()) -> FieldType:
    """Takes a type apart, however None and marks are nested; `marks` are added.

    >>> field_type(Count | None, ["more"])
    FieldType(base=<class 'int'>, optional=True, marks=('more', AtLeast(limit=1, whole=False)))
    """
    optional, marks = False, tuple(marks)
    while True:
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is Annotated:
            annotation, marks = arguments[0], (*marks, *arguments[1:])
        elif types.NoneType in arguments and typing.get_origin(annotation) in _UNIONS:
            rest = tuple(argument for argument in arguments if argument is not types.NoneType)
            annotation, optional = typing.Union[rest], True  # noqa: UP007 - of a variable length
        else:
            return FieldType(annotation, optional, marks)


def problem(value: Any, annotation: Any, marks: Sequence[Any] = ()) -> str | None:
    """What is wrong with a value of this type, by its marks' bounds, or None. Numbers must also be
    finite and fit 64 bits, or float32 if they are inputs of the step; of tuples each item is
    checked.

    >>> problem(-1.0, Positive), problem((3, 0), tuple[Count, ...]), problem(None, Count | None)
    ('must be > 0', 'item 2 (0): must be >= 1', None)
    """
    wanted = field_type(annotation, marks)
    if isinstance(value, tuple) and wanted.origin is tuple:
        items = zip(value, wanted.item_types(len(value)), strict=False)
        found = (problem(item, item_type, wanted.marks) for item, item_type in items)
        return next(
            (
                f"item {position} ({value[position - 1]}): {wrong}"
                for position, wrong in enumerate(found, 1)
                if wrong
            ),
            None,
        )
    if isinstance(value, Horizon):
        unit = _unit_problem(value)
        plain = tuple(mark for mark in wanted.marks if not isinstance(mark, Traced))
        return unit or problem(value.value, float, (*plain, AtLeast(0)))
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "must be finite"
    bounds = [mark for mark in wanted.marks if isinstance(mark, Bound)]
    broken = next((bound for bound in bounds if not bound.holds(float(value))), None)
    if broken is not None:
        return f"must be {broken.must_be}"
    if wanted.base in LENGTHS and value != int(value) and not isinstance(value, Steps):
        return _not_whole(float(value))
    too_large = isinstance(value, int) and abs(value) > _LARGEST
    if too_large:
        return f"must be at most {_LARGEST}"
    traced = any(isinstance(mark, Traced) for mark in wanted.marks)
    return _problem_in_float32(float(value), bounds) if traced else None


def _unit_problem(horizon: Horizon) -> str | None:
    units = typing.get_args(Unit)
    if horizon.unit not in units:
        return f"the unit {horizon.unit!r} is none of {', '.join(units)}"
    if not _is_real(horizon.value):
        return f"its value must be a number, not {_kind(horizon.value)}"
    if not math.isfinite(horizon.value):
        return "must be finite"
    if horizon.unit == "steps" and horizon.value != int(horizon.value):
        return _not_whole(horizon.value)
    if horizon.unit == "tokens" and horizon.value != int(horizon.value):
        return "must be a whole number of tokens"
    return "must be at most 100%" if horizon.unit == "percent" and horizon.value > 100 else None


def _not_whole(steps: float) -> str:
    percent = f"{100 * steps:g}" if 0 < steps < 1 else "5"
    return (
        f"steps must be a whole number; for a part of the run write e.g. {percent}% (in Python"
        f' Horizon({percent}, "percent"))'
    )


def _problem_in_float32(value: float, bounds: Sequence[Bound]) -> str | None:
    """What becomes of a number that the step computes with."""
    smallest, largest = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
    if abs(value) < smallest and value != 0:
        # there are smaller ones, but processors take them for 0
        return f"is 0 in float32, which the step computes in; must be at least {smallest:.2g}"
    if abs(value) > largest:
        return f"is too large for float32, which the step computes in; must be < {largest:.2g}"
    single = float(np.float32(value))
    broken = next((bound for bound in bounds if not bound.holds(single)), None)
    if broken is None:
        return None
    return f"is {single:g} in float32, which the step computes in; must be {broken.must_be} there"


def misfit(value: Any, annotation: Any) -> str | None:
    """How a value from Python is of another type than its annotation says, or None; what is no type
    of flags fits anything, and so does an array.

    >>> misfit("1e-3", Positive), misfit(None, Count | None), misfit("bias", tuple[str, ...])
    ('must be a number, not a str', None, "must be a tuple, such as ('bias',)")
    """
    wanted = field_type(annotation)
    if isinstance(value, np.integer) and wanted.base is int:
        # Flax and JSON know no others.
        return f"must be a whole number of Python, not {_kind(value)}; write int({value})"
    if hasattr(value, "dtype") and not isinstance(value, np.generic):
        several = wanted.base in _TYPES and getattr(value, "size", 1) != 1
        return f"must be {_TYPES[wanted.base][0]}, not {value.size} of them" if several else None
    if value is None:
        known = wanted.origin in (*_TYPES, Literal, tuple) or wanted.base in LENGTHS
        return None if wanted.optional or not known else "must not be None"
    if wanted.origin is Literal:
        choices = ", ".join(map(str, wanted.items))
        return None if value in wanted.items else f"must be one of {choices}"
    if wanted.origin is tuple:
        return _tuple_misfit(value, wanted)
    if wanted.base in LENGTHS and not isinstance(value, Horizon):
        return None if _is_real(value) else f"must be steps or {_HORIZON}, not {_kind(value)}"
    if wanted.base not in _TYPES:
        return None
    words, fits = _TYPES[wanted.base]
    # Who brings a rate that changes over the steps brings it where Optax takes it.
    schedule = "; a function of the step is the run's schedule=, a factor of the rate"
    remedy = schedule if callable(value) and wanted.base is float else ""
    return None if fits(value) else f"must be {words}, not {_kind(value)}{remedy}"


def _tuple_misfit(value: Any, wanted: FieldType) -> str | None:
    if not isinstance(value, tuple):
        meant = _as_tuple(value, wanted)
        return f"must be a tuple, {f'not {_kind(value)}' if meant is None else f'such as {meant}'}"
    if wanted.items and wanted.items[-1] is not Ellipsis and len(value) != len(wanted.items):
        meant = _as_tuple(value[0], wanted) if len(value) == 1 else None
        example = "" if meant is None else f", such as {meant}"
        return f"must have {len(wanted.items)} items{example}"
    for position, (item, kind) in enumerate(
        zip(value, wanted.item_types(len(value)), strict=True), 1
    ):
        if wrong := misfit(item, kind):
            return f"item {position} ({item!r}): {wrong}"
    return None


def _as_tuple(value: Any, wanted: FieldType) -> tuple[Any, ...] | None:
    """A tuple that somebody may have meant by a value that is none; None if that cannot be told.

    >>> rules = field_type(tuple[tuple[str, float], ...])
    >>> _as_tuple("bias", rules), _as_tuple({"bias": 0.0}, rules), _as_tuple("bias=0.5", rules)
    ((('bias', 1.0),), (('bias', 0.0),), (('bias', 0.5),))
    """
    first = field_type(wanted.items[0]) if wanted.items else None
    rules = first is not None and first.origin is tuple
    if isinstance(value, Mapping) and rules:
        return tuple(value.items())
    if not isinstance(value, str | int | float):
        return None
    if first is not None and rules:
        pair = _as_tuple(value, first) if isinstance(value, str) else None
        return None if pair is None else (pair,)
    if not wanted.items or wanted.items[-1] is Ellipsis:
        return (value,)
    if not isinstance(value, str):
        return (value,) * len(wanted.items)
    # as flags have it, PATTERN=VALUE
    pattern, equals, text = value.rpartition("=")
    number = field_type(wanted.items[-1]).base in (float, int)
    if not equals:
        return value, 1.0 if number else "VALUE"
    with contextlib.suppress(ValueError):
        return pattern, float(text) if number else text
    return pattern, 1.0


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return f"a{'n' * (type(value).__name__[0] in 'aeiou')} {type(value).__name__}"


_HORIZON = 'a horizon such as Horizon(5, "percent")'
_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    int: ("a whole number", _is_whole),
    TokenCount: ("a whole number", _is_whole),
    float: ("a number", _is_real),
    int | float: ("a number", _is_real),
    str: ("a text", lambda value: isinstance(value, str)),
    Horizon: (_HORIZON, lambda value: isinstance(value, Horizon)),
}
"""What Python may give to a field of a type that flags have, too."""


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

    @property
    def secret(self) -> bool:
        """Whether the value must not be written down: a text that is marked so, or named like one
        and not marked as public."""
        if any(isinstance(mark, Secret) for mark in self.marks):
            return True
        public = any(isinstance(mark, Public) for mark in self.marks)
        return self.type in _TEXTS and not public and named_like_a_secret(self.name)

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        return problem(value, self.type, self.marks)

    def misfit(self, value: Any) -> str | None:
        """How `value` is of another type, or None."""
        return misfit(value, self.type)


def named_like_a_secret(name: str) -> bool:
    """Whether a name ends in a word for a secret.

    >>> named_like_a_secret("logger_token"), named_like_a_secret("model.num_tokens")
    (True, False)
    """
    return bool(_SECRET_NAME.search(name))


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
    hints = _type_hints(cls)
    linen = {"parent", "name"} if _is_linen(cls) else set()
    for field in dataclasses.fields(cls):
        if field.name.startswith("_") or field.name in linen or not field.init:
            continue
        wanted = field_type(hints[field.name])
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        annotation = wanted.base | None if wanted.optional else wanted.base
        yield Field(field.name, annotation, wanted.marks, default)


def _type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a class; what cannot be found, such as a name that is imported for type
    checkers only, is Any."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return {
            field.name: Any if isinstance(field.type, str) else field.type
            for field in dataclasses.fields(cls)
        }


def replaced(component: Any, changes: Mapping[str, Any]) -> Any:
    """The same component with other values in some fields; a Linen module is cloned, for it knows
    more than its fields."""
    if not changes:
        return component
    if hasattr(component, "clone"):
        return component.clone(**changes)
    return dataclasses.replace(component, **changes)


def out_of_bounds(component: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every field of `component`, and of those nested in it, that is out of its bounds, or in a
    component of jaxtrain's own of another type: its dotted name, its value and what is wrong."""
    # What others annotate, for themselves, need not be exact.
    exact = type(component).__module__.startswith("jaxtrain.")
    for field in fields_of(component):
        name, value = f"{prefix}{field.name}", getattr(component, field.name)
        if exact and not is_component(value) and (wrong := field.misfit(value)):
            yield name, value, wrong
        elif is_component(value):
            yield from out_of_bounds(value, f"{name}.")
        elif wrong := field.problem(value):
            yield name, value, wrong


def check(component: Any, name: str = "") -> None:
    """Raises `UserError` if a field of `component`, or of one nested in it, is out of its
    bounds."""
    for where, value, wrong in out_of_bounds(component, f"{name or type(component).__name__}."):
        raise UserError(f"{where}={value}: {wrong}")


def _is_linen(cls: type) -> bool:
    return any(base.__module__.startswith("flax.linen") for base in cls.__mro__)
