"""A run's configuration as JSON, for `run.json`: every field of every component, strictly read
back.

A component is `{"kind": NAME, field: value, ...}`. The kind is looked up among the components that
the experiment at hand holds or offers, never by a path to code. What only Python can say (a
function, an array) is recorded by its name, and comes from the experiment when read.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtrain import config, messages
from jaxtrain.config import secrets, values
from jaxtrain.config.marks import Mark
from jaxtrain.errors import UserError
from jaxtrain.fields import Field, fields_of, is_component


def to_json(run: config.Run) -> dict[str, Any]:
    """Every field of the run, its secrets hidden, as plain JSON values.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> to_json(run)["eval_every"]
    '1epochs'
    """
    record: dict[str, Any] = {}
    for field in fields_of(run):
        value = getattr(run, field.name)
        if field.name in config.FAMILIES:
            record[field.name] = (
                value
                if value is None
                else _component(value, f"{field.name}.", kind_of(run, field.name))
            )
        elif Mark.EXPERIMENT not in field.marks:
            record[field.name] = secrets.hide(values.to_json(value), field.secret)
    return record


def kind_of(run: config.Run, family: str) -> str:
    """The name of a family's component: the offered name most like it, of the same class, or else
    the name of its class."""
    component = getattr(run, family)
    own = _component(component, "", "")
    named: dict[str, int] = {}
    for name, offered in run.offers.get(family, {}).items():
        if type(offered) is type(component):
            other = _component(offered, "", "")
            named[name] = sum(own[key] != other[key] for key in own)
    return min(named, key=named.__getitem__) if named else type(component).__name__


def from_json(run: config.Run, record: Mapping[str, Any]) -> config.Run:
    """The run that `to_json` recorded, with what JSON cannot hold taken from `run`, the same
    experiment's own configuration.

    `UserError` if a field is missing, unknown, of another type or out of bounds, or if a kind is
    none of the experiment's.
    """
    names = [field.name for field in fields_of(run) if Mark.EXPERIMENT not in field.marks]
    _same_keys(record, names, "")
    changes: dict[str, Any] = {}
    for field in fields_of(run):
        if field.name in config.FAMILIES:
            changes[field.name] = _family(run, field.name, record[field.name])
        elif field.name in names and Mark.INVOCATION not in field.marks:
            changes[field.name] = _value(
                field, field.name, record[field.name], getattr(run, field.name)
            )
    return config.replaced(run, changes)


def load(run: config.Run, workdir: str) -> config.Run:
    """The configuration of the run in `workdir`; `UserError` naming `--from_run` if it cannot be
    read or belongs to another experiment."""
    flag, path = f"--from_run={messages.printable(workdir)}", Path(workdir) / "run.json"
    if Path(workdir).is_file():
        raise UserError(
            f"{flag}: is a file; give the run's folder:"
            f" --from_run={messages.printable(str(Path(workdir).parent))}"
        )
    if not path.is_file():
        missing = (
            "holds no run.json"
            if path.parent.is_dir()
            else f"no such directory{messages.did_you_mean_path(workdir)}"
        )
        raise UserError(f"{flag}: {missing}")
    try:
        whole = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"{flag}: cannot read run.json ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: run.json is not JSON ({str(error).splitlines()[0]})") from None
    if not (isinstance(whole, dict) and isinstance(whole.get("config"), dict)):
        raise UserError(f"{flag}: run.json holds no configuration")
    if whole.get("name", run.name) != run.name:
        raise UserError(
            f"{flag}: holds a run of experiment {whole['name']!r}, this is {run.name!r}; start"
            f" experiments/{whole['name']}.py"
        )
    try:
        return from_json(run, whole["config"])
    except ValueError as error:
        raise UserError(f"{flag}: run.json: {error}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two recorded configurations differ in, as (dotted name, old, new); of swapped components
    only the kinds are compared.

    >>> differences(
    ...     {"seed": 0, "model": {"kind": "mlp", "depth": 2}},
    ...     {"seed": 0, "model": {"kind": "mlp", "depth": 3}},
    ... )
    [('model.depth', 2, 3)]
    """
    one_start = config.marked(Mark.INVOCATION)
    return [
        difference for difference in _differences(old, new, "") if difference[0] not in one_start
    ]


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if (
            isinstance(before, dict)
            and isinstance(after, dict)
            and before.get("kind") == after.get("kind")
        ):
            yield from _differences(before, after, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _kind_or_value(before), _kind_or_value(after)


def _kind_or_value(value: Any) -> Any:
    return value.get("kind", value) if isinstance(value, dict) else value


def _component(component: Any, prefix: str, kind: str) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": kind}
    if not is_component(component):
        return record
    for field in fields_of(component):
        name, value = f"{prefix}{field.name}", getattr(component, field.name)
        if is_component(value):
            record[field.name] = _component(value, f"{name}.", type(value).__name__)
        elif value is None or values.readable(field.type):
            record[field.name] = secrets.hide(values.to_json(value), field.secret)
        else:
            record[field.name] = {"python": _python_name(value)}
    return record


def _python_name(value: Any) -> str:
    """What identifies a value that JSON cannot hold, and never an address in memory."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if isinstance(value, str | int | float | tuple) else type(value).__name__


def _family(run: config.Run, family: str, record: Any) -> Any:
    own = getattr(run, family)
    if record is None and own is None:
        return None
    if not (isinstance(record, dict) and isinstance(record.get("kind"), str)):
        raise UserError(f"{family} is not a component; expected an object with a kind")
    kinds = {
        type(offered).__name__: offered for offered in run.offers.get(family, {}).values()
    } | dict(run.offers.get(family, {}))
    if own is not None:
        kinds = {type(own).__name__: own} | kinds | {kind_of(run, family): own}
    if record["kind"] not in kinds:
        raise UserError(f"{family}.kind={record['kind']!r}: unknown; valid: {', '.join(kinds)}")
    return _rebuilt(kinds[record["kind"]], record, f"{family}.")


def _rebuilt(template: Any, record: Mapping[str, Any], prefix: str) -> Any:
    if not is_component(template):
        return template
    names = [field.name for field in fields_of(template)]
    _same_keys(record, ["kind", *names], prefix)
    changes = {}
    for field in fields_of(template):
        value, own = record[field.name], getattr(template, field.name)
        if (
            is_component(own)
            and isinstance(value, dict)
            and value.get("kind") == type(own).__name__
        ):
            changes[field.name] = _rebuilt(own, value, f"{prefix}{field.name}.")
        else:
            changes[field.name] = _value(field, f"{prefix}{field.name}", value, own)
    return config.replaced(template, changes)


def _value(field: Field, name: str, value: Any, own: Any) -> Any:
    """One field's value from JSON; hidden and Python-only values are the experiment's `own`."""
    if not values.readable(field.type):
        expected = None if own is None else {"python": _python_name(own)}
        if value != expected:
            raise UserError(
                f"{name}={json.dumps(value)}: only the experiment's Python can set it, and it says"
                f" {json.dumps(expected)}"
            )
        return own
    if secrets.HIDDEN in json.dumps(value):
        return own
    try:
        return values.from_json(value, field.type, field.marks)
    except ValueError as problem:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
        raise UserError(
            f"{name}={text}{' ' if str(problem).startswith(('is ', 'has ')) else ': '}{problem}"
        ) from None


def _same_keys(record: Mapping[str, Any], names: list[str], prefix: str) -> None:
    for name in record:
        if name not in names:
            raise UserError(f"unknown field {prefix}{name}{messages.did_you_mean(name, names)}")
    for name in names:
        if name not in record:
            raise UserError(
                f"lacks {prefix}{name}; it was written by another version of this experiment"
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise UserError("a key is there twice")
    return record
