"""A run's configuration as JSON, for `run.json`: every field of every component, strictly read
back.

A component is `{"kind": NAME, field: value, ...}`. The kind is looked up among the components that
the experiment at hand holds or offers, never by a path to code. What only Python can say (a
function, an array) is recorded by what identifies it (`identity.py`), and comes from the experiment
when read.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import config, messages
from jaxtrain.config import secrets, values
from jaxtrain.config.identity import identity, name_of_class
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
            record[field.name] = _recorded(field, value)
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
            substance = getattr(component, "in_python", None)
            if substance is not None and own[substance] != other[substance]:
                continue  # alike in nothing but in how it is held
            named[name] = sum(own[key] != other[key] for key in own)
    return min(named, key=named.__getitem__) if named else name_of_class(type(component))


def from_json(run: config.Run, record: Mapping[str, Any]) -> config.Run:
    """The run that `to_json` recorded, with what JSON cannot hold taken from `run`, the same
    experiment's own configuration.

    `UserError` if a field is missing, unknown, of another type or out of bounds, or if a kind is
    none of the experiment's.
    """
    names = [field.name for field in fields_of(run) if Mark.EXPERIMENT not in field.marks]
    # a part that the experiment does not have was not known to every version
    absent = {family: None for family in config.FAMILIES if getattr(run, family) is None}
    record = absent | dict(record)
    _same_keys(record, names, "")
    changes: dict[str, Any] = {}
    for field in fields_of(run):
        if field.name in config.FAMILIES:
            changes[field.name] = family_from_json(run, field.name, record[field.name])
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
        repeated = from_json(run, whole["config"])
    except ValueError as error:
        raise UserError(f"{flag}: run.json: {error}") from None
    if said := _changed_on_its_way(whole.get("resumed")):
        messages.warn(f"{flag}: {said}")
    return repeated


def _changed_on_its_way(resumed: Any) -> str:
    """What no single configuration can repeat: a run that was gone on with under another one."""
    starts = [start for start in resumed or () if isinstance(start, dict) and start.get("changes")]
    if not starts:
        return ""
    said, first = [], {}
    for start in starts:
        for name, (old, new) in start["changes"].items():
            said.append(f"at step {start['step']}: {name} from {_shown(old)} to {_shown(new)}")
            first.setdefault(name, old)
    flags = " ".join(f"--{name}={_shown(old)}" for name, old in first.items())
    return (
        f"was changed on its way ({'; '.join(said)}); this run takes the last values from its first"
        f" step on; {flags} repeats the first start"
    )


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


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
            and "kind" in before
            and before["kind"] == after.get("kind")
        ):
            yield from _differences(before, after, f"{prefix}{name}.")
        else:
            # What identifies a part that has no fields is the part itself.
            path = prefix.removesuffix(".") if name == "python" else f"{prefix}{name}"
            yield path, _kind_or_value(before), _kind_or_value(after)


def completed(run: config.Run, old: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the fields that its version did not have yet, at their
    defaults: a run goes on under a version that knows more."""
    known: dict[str, Any] = dict(old)
    for field in fields_of(run):
        name, value = field.name, getattr(run, field.name)
        if name in config.FAMILIES:
            if isinstance(old.get(name), Mapping):
                known[name] = _completed(value, old[name], kind_of(run, name))
        elif Mark.EXPERIMENT not in field.marks and name not in old:
            known |= _default(field)
    return known


def _completed(component: Any, old: Mapping[str, Any], kind: str) -> dict[str, Any]:
    known = dict(old)
    if component is None or old.get("kind") not in (kind, type(component).__name__):
        return known
    if not is_component(component):
        named = _component(component, "", kind).get("python")
        return known if named is None else {"python": named} | known
    for field in fields_of(component):
        value, before = getattr(component, field.name), old.get(field.name)
        if is_component(value) and isinstance(before, Mapping):
            known[field.name] = _completed(value, before, name_of_class(type(value)))
        elif field.name not in old:
            known |= _default(field)
    return known


def _default(field: Field) -> dict[str, Any]:
    if field.default is dataclasses.MISSING:
        return {}
    if is_component(field.default):
        kind = name_of_class(type(field.default))
        return {field.name: _component(field.default, f"{field.name}.", kind)}
    return {field.name: _recorded(field, field.default)}


def _kind_or_value(value: Any) -> Any:
    return value.get("kind", value.get("python", value)) if isinstance(value, dict) else value


def _component(component: Any, prefix: str, kind: str) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": kind}
    if not is_component(component):
        named = secrets.hide(identity(component), secret=False)
        return record if component is None else record | {"python": named}
    for field in fields_of(component):
        name, value = f"{prefix}{field.name}", getattr(component, field.name)
        if is_component(value):
            record[field.name] = _component(value, f"{name}.", name_of_class(type(value)))
        else:
            record[field.name] = _recorded(field, value)
    return record


def _recorded(field: Field, value: Any) -> Any:
    """A field's value as JSON; what JSON cannot hold, or a flag could not say, by its identity."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return None
    if values.readable(field.type):
        dumped = values.to_json(value)
        if _is_json(dumped):
            return secrets.hide(dumped, field.secret)
    return {"python": secrets.hide(identity(value), field.secret)}


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or type(value) in (bool, int, float, str)


def family_from_json(run: config.Run, family: str, record: Any) -> Any:
    """One component from its record, of the kinds that `run` holds or offers; errors as in
    `from_json`."""
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
        own = _component(template, prefix, "").get("python")
        if record.get("python") not in (None, own):
            raise UserError(
                f"{prefix}python={json.dumps(record['python'])}: only the experiment's Python can"
                f" set it, and it says {json.dumps(own)}"
            )
        return template
    names = [field.name for field in fields_of(template)]
    _same_keys(record, ["kind", *names], prefix)
    changes = {}
    for field in fields_of(template):
        value, own = record[field.name], getattr(template, field.name)
        if (
            is_component(own)
            and isinstance(value, dict)
            and value.get("kind") == name_of_class(type(own))
        ):
            changes[field.name] = _rebuilt(own, value, f"{prefix}{field.name}.")
        else:
            changes[field.name] = _value(field, f"{prefix}{field.name}", value, own)
    return config.replaced(template, changes)


def _value(field: Field, name: str, value: Any, own: Any) -> Any:
    """One field's value from JSON; hidden and Python-only values are the experiment's `own`."""
    if not values.readable(field.type) or (isinstance(value, dict) and "python" in value):
        expected = None if own is None else _recorded(field, own)
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
