"""One setting's value as text and as JSON: strict readers, exact writers, and messages that say
what would have been right.

Numbers are plain ASCII decimals: an optional minus, no plus, no underscores, no hexadecimal, no
blanks. Integers take no exponent and no point, floats must be finite, `none` is the absent value of
an optional, tuples are separated by commas with no empty item.
"""

import math
import re
import types
import typing
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

from jaxtrain.errors import UserError
from jaxtrain.horizon import Horizon
from jaxtrain.messages import did_you_mean, is_number, shown

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_MEANT = {
    "yes": "true",
    "y": "true",
    "on": "true",
    "t": "true",
    "no": "false",
    "n": "false",
    "off": "false",
    "f": "false",
}
_LARGEST = 2**63 - 1


def readable(kind: Any) -> bool:
    """Whether a field of this type can be a flag.

    >>> readable(tuple[int, ...]), readable(float | None), readable(typing.Callable)
    (True, True, False)
    """
    kind, _ = _marked(_base(kind)[0], ())
    if kind in (bool, int, float, str, Horizon) or typing.get_origin(kind) is Literal:
        return True
    return typing.get_origin(kind) is tuple and all(
        item is Ellipsis or readable(item) for item in typing.get_args(kind)
    )


def read(text: str, kind: Any, marks: Sequence[Any] = ()) -> Any:
    """The value that `text` means for a field of type `kind` with these bounds.

    >>> read("3,5", tuple[int, ...]), read("none", float | None), str(read("5%", Horizon))
    ((3, 5), None, '5%')

    `ValueError` whose text is the problem alone, without the flag's name and value.
    """
    base, optional = _base(kind)
    base, marks = _marked(base, marks)
    if optional and text.lower() == "none":
        return None
    tail = ", or none" if optional else ""
    if base is bool:
        return _read_bool(text)
    if base is int:
        return _read_int(text, marks, tail)
    if base is float:
        return _read_float(text, marks, tail)
    if base is Horizon:
        return _read_horizon(text, marks, tail)
    if typing.get_origin(base) is Literal:
        return _read_choice(text, typing.get_args(base))
    if typing.get_origin(base) is tuple:
        return _read_tuple(text, typing.get_args(base), marks)
    return _read_string(text)


def text(value: Any) -> str:
    """A value as it would be typed; `read` gives the same value back.

    >>> text((1e-3, None, True)), text(Horizon(2.5, "epochs")), text((("bias", 0.0),))
    ('1e-3,none,true', '2.5epochs', 'bias=0')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, Horizon):
        return f"{Decimal(repr(value.value)):f}".removesuffix(".0") + (
            "%" if value.unit == "percent" else value.unit
        )
    if isinstance(value, tuple):
        return ",".join(
            f"{item[0]}={text(item[1])}" if isinstance(item, tuple) else text(item)
            for item in value
        )
    return str(value)


def to_json(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, horizons as text, floats in full."""
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return text(value) if isinstance(value, Horizon) else value


def from_json(value: Any, kind: Any, marks: Sequence[Any] = ()) -> Any:
    """The value that `to_json` wrote for a field of type `kind`.

    >>> from_json([1, 2], tuple[int, ...])
    (1, 2)

    `ValueError` if the JSON has another type or is out of bounds: nothing is converted but lists,
    horizons and whole floats.
    """
    base, optional = _base(kind)
    base, marks = _marked(base, marks)
    if value is None and optional:
        return None
    items = typing.get_args(base) if typing.get_origin(base) is tuple else ()
    if items and isinstance(value, list):
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise UserError(f"has {len(value)} items; expected {len(items)}")
        wanted = [items[0]] * len(value) if items[-1] is Ellipsis else items
        return tuple(
            from_json(item, item_kind, marks) for item, item_kind in zip(value, wanted, strict=True)
        )
    if base is Horizon and isinstance(value, str):
        return _read_horizon(value, marks, "")
    if typing.get_origin(base) is Literal:
        return (
            _read_choice(value, typing.get_args(base))
            if isinstance(value, str)
            else _one_of(value, typing.get_args(base))
        )
    if base in (float, Horizon) and isinstance(value, int | float) and not isinstance(value, bool):
        return _within(float(value), marks)
    if items or type(value) is not base:
        raise UserError(f"is a {type(value).__name__}; expected {describe(kind, marks)}")
    return _within(value, marks) if base is int else value


def describe(kind: Any, marks: Sequence[Any] = ()) -> str:
    """What a field takes, in words.

    >>> describe(float | None), describe(Literal["auto", "yes"]), describe(tuple[int, int])
    ('float or none', 'auto|yes', 'int,int')
    """
    base, optional = _base(kind)
    base, marks = _marked(base, marks)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        words = "|".join(str(argument) for argument in arguments)
    elif origin is tuple:
        names = ["..." if item is Ellipsis else _item_name(item) for item in arguments]
        words = ",".join(names)
    else:
        words = {Horizon: "steps, epochs or %", bool: "true|false", str: "text"}.get(
            base, getattr(base, "__name__", str(base))
        )
        words = f"{words} {rule}" if (rule := _rule(marks)) else words
    return f"{words} or none" if optional else words


def _item_name(kind: Any) -> str:
    pair = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    return f"PATTERN={describe(pair[1])}" if pair else describe(kind)


def _base(kind: Any) -> tuple[Any, bool]:
    """The type without `None`, and whether there was one; a horizon or number reads as a
    horizon."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    arguments = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    base = (
        arguments[0]
        if len(arguments) == 1
        else Horizon
        if set(arguments) == {Horizon, float}
        else kind
    )
    base = float if set(arguments) == {int, float} else base
    return base, len(arguments) < len(typing.get_args(kind))


def _marked(kind: Any, marks: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    if typing.get_origin(kind) is not Annotated:
        return kind, marks
    base, *more = typing.get_args(kind)
    return base, (*marks, *more)


def _rule(marks: Sequence[Any]) -> str:
    """The bounds in words (`> 0`), read off the marks' own messages."""
    for mark in marks:
        if hasattr(mark, "problem") and (problem := mark.problem(-math.inf)):
            return problem.removeprefix("must be ").removeprefix("an integer ")
    return ""


def _within(value: Any, marks: Sequence[Any]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError("must be finite")
    for mark in marks:
        if hasattr(mark, "problem") and (problem := mark.problem(value)):
            raise UserError(problem)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(f"must be at most {_LARGEST}")
    return value


def _read_bool(text: str) -> bool:
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    meant = _MEANT.get(text.lower())
    raise UserError(
        "not a boolean; valid: true, false" + (f"; did you mean {meant!r}?" if meant else "")
    )


def _read_int(text: str, marks: Sequence[Any], tail: str) -> int:
    if _INTEGER.fullmatch(text):
        # 50 digits are out of any bounds already, and quick to convert
        return _within(int(text[:50]), marks)
    rule = f"must be an integer {_rule(marks)}".rstrip() + tail
    raise UserError(rule + _hint(text, int, marks))


def _read_float(text: str, marks: Sequence[Any], tail: str) -> float:
    if is_number(text):
        return _within(float(text), marks)
    rule = _rule(marks)
    example = "1e-3" if rule == "> 0" else "0.1"
    raise UserError(
        f"not a number; expected a float {rule}".rstrip()
        + f", e.g. {example}{tail}"
        + _hint(text, float, marks)
    )


def _hint(text: str, kind: type, marks: Sequence[Any]) -> str:
    """What was probably meant by a number written in a way that is not ours: 1_000, +5, 0x10, 1e3,
    0,1."""
    for convert in (
        lambda: int(text, 0),
        lambda: float(text),
        lambda: float(text.replace(",", ".")),
    ):
        try:
            value = convert()
            if kind is int and value != int(value):
                continue
            near = _shortest(float(value)) if kind is float else int(_within(kind(value), marks))
            return f"; did you mean {near}?"
        except (ValueError, OverflowError):
            continue
    return ""


def _read_horizon(text: str, marks: Sequence[Any], tail: str) -> Horizon:
    expected = f"not a horizon; expected e.g. 200, 200steps, 2epochs or 5%{tail}"
    if re.match(r"-[0-9.]", text):
        raise UserError("must be >= 0")
    if not text.isascii() or text != text.strip():
        raise UserError(expected)
    try:
        horizon = Horizon.parse(text)
    except OverflowError:
        raise UserError("must be finite") from None
    except ValueError as error:
        problem = str(error).removeprefix(f"{text!r}: ")
        raise UserError(expected if problem.startswith("not a horizon") else problem) from None
    _within(horizon.value, marks)
    return horizon


def _read_choice(text: str, choices: Sequence[Any]) -> Any:
    by_text = {str(choice): choice for choice in choices}
    if text in by_text:
        return by_text[text]
    raise UserError(f"unknown; valid: {', '.join(by_text)}{did_you_mean(text, by_text)}")


def _one_of(value: Any, choices: Sequence[Any]) -> Any:
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    raise UserError(f"unknown; valid: {', '.join(str(choice) for choice in choices)}")


def _read_tuple(text: str, items: Sequence[Any], marks: Sequence[Any]) -> tuple[Any, ...]:
    if text == "" and items[-1] is Ellipsis:
        return ()
    parts = text.split(",")
    if items[-1] is not Ellipsis and len(parts) != len(items):
        raise UserError(f"has {len(parts)} items; expected {len(items)}, separated by a comma")
    wanted = [items[0]] * len(parts) if items[-1] is Ellipsis else items
    values = []
    for position, (part, kind) in enumerate(zip(parts, wanted, strict=True), 1):
        if part == "":
            raise UserError(
                f"item {position} is empty; separate items by one comma, with none at the end"
            )
        try:
            values.append(
                _read_pair(part, typing.get_args(kind))
                if typing.get_origin(kind) is tuple
                else read(part, kind, marks)
            )
        except ValueError as problem:
            raise UserError(f"item {position} ({shown(part)}): {problem}") from None
    return tuple(values)


def _read_pair(part: str, items: Sequence[Any]) -> tuple[str, Any]:
    """A rule, `PATTERN=VALUE`; the last `=` divides, for a pattern may hold one."""
    pattern, equals, value = part.rpartition("=")
    if not equals or not pattern:
        raise UserError(
            "not a rule; expected PATTERN=VALUE, e.g."
            f" {'head/kernel=fsdp:-' if items[1] is str else 'bias=0'}"
        )
    return pattern, read(value, items[1])


def _read_string(text: str) -> str:
    if "\0" in text:
        raise UserError("must not hold a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("not valid UTF-8")
    return text


def _shortest(value: float) -> str:
    """The shortest usual way to write a float exactly: 1e-3 rather than 0.001."""
    plain = repr(value).removesuffix(".0")
    if not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1e6:
        return plain
    sign, digits, exponent = Decimal(plain).normalize().as_tuple()
    head = "".join(map(str, digits))
    scientific = (
        f"{'-' * sign}{head[0]}{'.' * (len(head) > 1)}{head[1:]}e{exponent + len(head) - 1}"
    )
    return min(scientific, plain, key=len)
