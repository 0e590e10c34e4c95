"""One setting's value as text and as JSON: strict readers, exact writers, and messages that say
what would have been right.

`FORMATS`, at the end, has a row for each type. Numbers are plain ASCII decimals: an optional minus,
no plus, no underscores, no hexadecimal, no blanks. Integers take no exponent and no point, floats
must be finite, `none` is the absent value of an optional, tuples are separated by commas with no
empty item.
"""

import contextlib
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from jaxtrain.config import other_toolkits
from jaxtrain.errors import UserError
from jaxtrain.fields import FieldType, NamedFiles, field_type, problem
from jaxtrain.horizon import Horizon, TokenCount
from jaxtrain.messages import did_you_mean, is_number, shown

EvaluationSets = tuple[tuple[str, Any], ...] | Mapping[str, Any]
"""Sets by name: each a split of the run's data, as text, or in Python a data source."""
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_MEANT = {"yes": "true", "y": "true", "on": "true", "t": "true"}
_MEANT |= {"no": "false", "n": "false", "off": "false", "f": "false", "none": "false"}
_SCALES = {"k": 1000, "K": 1000, "M": 10**6, "m": 10**6, "%": Decimal("0.01")}
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_MEANT_HORIZONS = (
    (r"never|no|off|none|false", "0"),
    (r"(?:every[ _-]?|per[ _-]?)?epoch(?:ly)?", "1epochs"),
    (r"(?:every[ _-]?)?step", "1"),
    (r"([0-9.]+)[ _]*(?:e|ep|eps|epoch|epochs)", r"\1epochs"),
    (r"([0-9]+)[ _]*(?:s|st|step|steps|it|its|iters|iterations|batches|ba)", r"\1"),
    (r"([0-9.]+)[ _]*(?:%|percent|pct)", r"\1%"),
    (r"([0-9]+)k", r"\g<1>000"),
    (r"([0-9]{1,3}),([0-9]{3})", r"\1\2"),
    (r"([0-9]+)_([0-9]+)", r"\1\2"),
    (r"([0-9]+)\.0+", r"\1"),
)
"""What people write for a horizon, and how it is written."""


def readable(annotation: Any) -> bool:
    """Whether a field of this type can be a flag.

    >>> readable(tuple[int, ...]), readable(float | None), readable(typing.Callable)
    (True, True, False)
    """
    wanted = field_type(annotation)
    if wanted.origin is tuple:
        return all(item is Ellipsis or readable(item) for item in wanted.items)
    return wanted.origin in FORMATS


def read(text: str, annotation: Any, marks: Sequence[Any] = ()) -> Any:
    """The value that `text` means for a field of this type with these bounds.

    >>> read("3,5", tuple[int, ...]), read("none", float | None), str(read("5%", Horizon))
    ((3, 5), None, '5%')

    `UserError` whose text is the problem alone, without the flag's name and value.
    """
    wanted = field_type(annotation, marks)
    if wanted.optional and text.lower() == "none":
        return None
    return _within_bounds(FORMATS[wanted.origin].parse(text, wanted), wanted)


def text(value: Any) -> str:
    """A value as it would be typed; `read` gives the same value back.

    >>> text((1e-3, None, True)), text(Horizon(2.5, "epochs")), text((("bias", 0.0),))
    ('1e-3,none,true', '2.5epochs', 'bias=0')
    """
    return "none" if value is None else _format_of(value).show(value)


def to_json(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, horizons as text, floats in full."""
    return _format_of(value).dump(value)


def from_json(value: Any, annotation: Any, marks: Sequence[Any] = ()) -> Any:
    """The value that `to_json` wrote for a field of this type.

    >>> from_json([1, 2], tuple[int, ...])
    (1, 2)

    `UserError` if the JSON has another type or is out of bounds: nothing is converted but lists,
    horizons and whole floats.
    """
    wanted = field_type(annotation, marks)
    if value is None and wanted.optional:
        return None
    return _within_bounds(FORMATS[wanted.origin].load(value, wanted), wanted)


def describe(annotation: Any, marks: Sequence[Any] = ()) -> str:
    """What a field takes, in words.

    >>> describe(float | None), describe(Literal["auto", "yes"]), describe(tuple[int, int])
    ('float or none', 'auto|yes', 'int,int')
    """
    return _describe(field_type(annotation, marks))


def _describe(wanted: FieldType) -> str:
    takes = FORMATS[wanted.origin].takes
    said = takes(wanted) if callable(takes) else f"{takes} {wanted.rule}".rstrip()
    return f"{said} or none" if wanted.optional else said


def _within_bounds(value: Any, wanted: FieldType) -> Any:
    if wrong := problem(value, wanted.base, wanted.marks):
        raise UserError(wrong)
    return value


def _same(value: Any) -> Any:
    return value


def _load_same(value: Any, wanted: FieldType) -> Any:
    if type(value) is not wanted.origin:
        raise _wrong_type(value, wanted)
    return value


def _wrong_type(value: Any, wanted: FieldType) -> UserError:
    return UserError(f"is a {type(value).__name__}; expected {_describe(wanted)}")


def _read_bool(text: str, wanted: FieldType) -> bool:
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    meant = _MEANT.get(text.lower())
    raise UserError(
        "not a boolean; valid: true, false" + (f"; did you mean {meant!r}?" if meant else "")
    )


def _show_bool(value: bool) -> str:
    return str(value).lower()


def _read_int(text: str, wanted: FieldType) -> int:
    if _INTEGER.fullmatch(text):
        # 50 digits are out of any bounds already, and quick to convert
        return int(text[:50])
    rule = f"must be an integer {wanted.rule}".rstrip()
    raise UserError(rule + _or_none(wanted) + _hint(text, int, wanted))


def _read_float(text: str, wanted: FieldType) -> float:
    if is_number(text):
        return float(text)
    example = "1e-3" if wanted.rule == "> 0" else "0.1"
    expected = f"not a number; expected a float {wanted.rule}".rstrip() + f", e.g. {example}"
    raise UserError(expected + _or_none(wanted) + _hint(text, float, wanted))


def _show_float(value: float) -> str:
    """The shortest usual way to write a float exactly: 1e-3 rather than 0.001."""
    plain = repr(value).removesuffix(".0")
    if not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1e6:
        return plain
    number = Decimal(plain).normalize()
    head = "".join(map(str, number.as_tuple().digits))
    sign, point = "-" * (value < 0), "." * (len(head) > 1)
    scientific = f"{sign}{head[0]}{point}{head[1:]}e{number.adjusted()}"
    return min(scientific, plain, key=len)


def _load_float(value: Any, wanted: FieldType) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise _wrong_type(value, wanted)


def _hint(text: str, number: type[int] | type[float], wanted: FieldType) -> str:
    """What was probably meant by a number written in a way that is not ours: 1_000, +5, 0x10, 1e3,
    0,1."""
    scale = _SCALES.get(text[-1:])
    grouped = text.replace(",", "") if _GROUPED.fullmatch(text) else text.replace(",", ".")
    for convert in (
        lambda: int(text, 0),
        lambda: float(text),
        lambda: float(grouped),
        lambda: float(Decimal(text[:-1]) * scale) if scale else float(""),
    ):
        try:
            value = convert()
            near = number(value)
        except (ValueError, OverflowError, ArithmeticError):
            continue
        if near == value and not problem(near, number, wanted.marks):
            return f"; did you mean {_format_of(near).show(near)}?"
    return ""


def _or_none(wanted: FieldType) -> str:
    return ", or none" if wanted.optional else ""


def _read_text(text: str, wanted: FieldType) -> str:
    if "\0" in text:
        raise UserError("must not hold a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("not valid UTF-8")
    return text


def _read_horizon(text: str, wanted: FieldType) -> Horizon:
    expected = f"not a horizon; expected e.g. 200, 200steps, 2epochs or 5%{_or_none(wanted)}"
    if re.match(r"-[0-9.]", text):
        raise UserError("must be >= 0")
    if not text.isascii() or text != text.strip():
        raise UserError(expected + _meant_horizon(text.strip()))
    try:
        return Horizon.parse(text)
    except OverflowError:
        raise UserError("must be finite") from None
    except ValueError as error:
        wrong = str(error).removeprefix(f"{text!r}: ")
        wrong = expected if wrong.startswith("not a horizon") else wrong
        raise UserError(wrong + _meant_horizon(text)) from None


def _meant_horizon(text: str) -> str:
    """The end of a message about a text that is nearly a horizon, or nothing."""
    for pattern, written in _MEANT_HORIZONS:
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            meant = match.expand(written)
            with contextlib.suppress(ValueError):
                Horizon.parse(meant)
                return f"; did you mean {meant}?"
    if re.fullmatch(r"0?\.[0-9]+", text):
        return f"; did you mean {float(Decimal(text) * 100):g}% of the run?"
    return ""


def _load_horizon(value: Any, wanted: FieldType) -> Any:
    if isinstance(value, str):
        return _read_horizon(value, wanted)
    if wanted.base == Horizon | float:
        return _load_float(value, wanted)
    raise _wrong_type(value, wanted)


def _read_tokens(text: str, wanted: FieldType) -> TokenCount:
    try:
        return TokenCount.parse(text)
    except ValueError as error:
        meant = re.fullmatch(r"([0-9.]+) ?([kmbtgKMBTG])(?:[a-z]*)", text)
        letter = "" if meant is None else {"G": "B"}.get(meant[2].upper(), meant[2].upper())
        near = "" if meant is None else f"; did you mean {meant[1]}{letter}?"
        said = str(error).removeprefix(f"{text!r}: ")
        raise UserError(said + near) from None


def _load_tokens(value: Any, wanted: FieldType) -> TokenCount:
    if type(value) is not int:
        raise _wrong_type(value, wanted)
    return TokenCount(value)


def _read_choice(text: str, wanted: FieldType) -> Any:
    by_text = {str(choice): choice for choice in wanted.items}
    if text in by_text:
        return by_text[text]
    meant = other_toolkits.same_value(text, by_text)
    near = f"; did you mean {meant!r}?" if meant else did_you_mean(text, by_text)
    raise UserError(f"unknown; valid: {', '.join(by_text)}{near}")


def _load_choice(value: Any, wanted: FieldType) -> Any:
    if isinstance(value, str):
        return _read_choice(value, wanted)
    for choice in wanted.items:
        if type(choice) is type(value) and choice == value:
            return choice
    raise UserError(f"unknown; valid: {', '.join(map(str, wanted.items))}")


def _choice_takes(wanted: FieldType) -> str:
    return "|".join(map(str, wanted.items))


def _read_tuple(text: str, wanted: FieldType) -> tuple[Any, ...]:
    if text == "" and wanted.items[-1] is Ellipsis:
        return ()
    parts = text.split(",")
    _check_length(len(parts), wanted, ", separated by a comma")
    values = []
    for position, (part, item) in enumerate(
        zip(parts, wanted.item_types(len(parts)), strict=True), 1
    ):
        if part == "":
            raise UserError(
                f"item {position} is empty; separate items by one comma, with none at the end"
            )
        pair = typing.get_args(item) if typing.get_origin(item) is tuple else None
        try:
            values.append(
                _read_pair(part, pair, wanted.marks) if pair else read(part, item, wanted.marks)
            )
        except ValueError as wrong:
            raise UserError(f"item {position} ({shown(part)}): {wrong}") from None
    return tuple(values)


def _read_pair(part: str, items: Sequence[Any], marks: Sequence[Any] = ()) -> tuple[str, Any]:
    """A rule, `PATTERN=VALUE`; the last `=` divides, for a pattern may hold one."""
    pattern, equals, value = part.rpartition("=")
    if not equals or not pattern:
        if NamedFiles() in marks:
            # the file's own name without ending and signs, as a name for it
            name = (
                "_".join(re.findall(r"[A-Za-z0-9_]+", PurePath(value).name.partition(".")[0]))
                or "a"
            )
            raise UserError(f"has no name; expected NAME=FILES, e.g. {name}={value or 'FILES'}")
        example = "head/kernel=fsdp:-" if items[1] is str else "bias=0"
        raise UserError(f"not a rule; expected PATTERN=VALUE, e.g. {example}")
    return pattern, read(value, items[1])


def _show_tuple(value: tuple[Any, ...]) -> str:
    def shown_item(item: Any) -> str:
        rule = isinstance(item, tuple) and len(item) == 2
        return f"{item[0]}={text(item[1])}" if rule else text(item)

    return ",".join(map(shown_item, value))


def _dump_tuple(value: tuple[Any, ...]) -> list[Any]:
    return [to_json(item) for item in value]


def _load_tuple(value: Any, wanted: FieldType) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong_type(value, wanted)
    _check_length(len(value), wanted)
    items = zip(value, wanted.item_types(len(value)), strict=True)
    return tuple(from_json(item, item_type, wanted.marks) for item, item_type in items)


def _tuple_takes(wanted: FieldType) -> str:
    def item_takes(item: Any) -> str:
        pair = typing.get_args(item) if typing.get_origin(item) is tuple else ()
        return f"PATTERN={describe(pair[1])}" if pair else describe(item)

    return ",".join("..." if item is Ellipsis else item_takes(item) for item in wanted.items)


def _read_sets(text: str, wanted: FieldType) -> tuple[tuple[str, str], ...]:
    """`NAME=SPLIT,...`; a split holds no `=` and no comma."""
    pairs = []
    for part in text.split(",") if text else []:
        name, equals, split = part.partition("=")
        if not (name and equals and split):
            raise UserError(f"{shown(part)} is not NAME=SPLIT; expected e.g. rotated=test[:50%]")
        pairs.append((name, split))
    return tuple(pairs)


def _load_sets(value: Any, wanted: FieldType) -> tuple[tuple[str, str], ...]:
    if not (
        isinstance(value, list)
        and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in value)
    ):
        raise UserError(f"is a {type(value).__name__}; expected pairs of a name and a split")
    return tuple((name, split) for name, split in value)


def _check_length(count: int, wanted: FieldType, how: str = "") -> None:
    if wanted.items[-1] is not Ellipsis and count != len(wanted.items):
        raise UserError(f"has {count} items; expected {len(wanted.items)}{how}")


class Format(NamedTuple):
    """How values of one type are typed, described, shown and kept in JSON."""

    parse: Callable[[str, FieldType], Any]
    """The value that was typed."""
    takes: str | Callable[[FieldType], str]
    """What a flag of this type takes; bounds are added to a mere text."""
    show: Callable[[Any], str] = str
    """The value as it would be typed."""
    dump: Callable[[Any], Any] = _same
    """The value for JSON."""
    load: Callable[[Any, FieldType], Any] = _load_same
    """The value that JSON holds."""


_FLOAT = Format(_read_float, "float", _show_float, load=_load_float)
_HORIZON = Format(_read_horizon, "steps, epochs or %", dump=str, load=_load_horizon)
FORMATS: dict[Any, Format] = {
    bool: Format(_read_bool, "true|false", _show_bool),
    int: Format(_read_int, "int"),
    float: _FLOAT,
    int | float: _FLOAT,
    TokenCount: Format(_read_tokens, "tokens, e.g. 1B", dump=int, load=_load_tokens),
    str: Format(_read_text, "text"),
    Horizon: _HORIZON,
    Horizon | float: _HORIZON,
    EvaluationSets: Format(_read_sets, "NAME=SPLIT,...", _show_tuple, _dump_tuple, _load_sets),
    Literal: Format(_read_choice, _choice_takes, load=_load_choice),
    tuple: Format(_read_tuple, _tuple_takes, _show_tuple, dump=_dump_tuple, load=_load_tuple),
}
"""Every type that a flag can have."""


def _format_of(value: Any) -> Format:
    """The row of a value's own type; what has none is shown as Python shows it."""
    rows = (FORMATS[kind] for kind in type(value).__mro__ if kind in FORMATS)
    return next(rows, FORMATS[str])
