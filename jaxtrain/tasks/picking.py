"""Which fields of a batch a model is given, and which part of its outputs a task means."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxtrain.errors import UserError
from jaxtrain.messages import did_you_mean
from jaxtrain.tree import Batch

FLAG = "--task.input"
KEPT_BACK = ",-segments"
"""What a text for `inputs_of` ends in if the model is knowingly not given the segments."""


def inputs_of(batch: Batch, names: str) -> Any:
    """What a model is called with: one field, several by position, or several by name.

    >>> batch = {"tokens": 1, "lengths": 2}
    >>> inputs_of(batch, "tokens"), inputs_of(batch, "tokens,lengths")
    (1, (1, 2))
    >>> inputs_of(batch, "ids=tokens,sizes=lengths")
    {'ids': 1, 'sizes': 2}

    A last `-segments` keeps from the model, knowingly, what tells its documents and its padding
    apart. `UserError` for a field that the batch lacks, for names that do not go together, and for
    `segments` of the batch that are neither named nor kept.
    """
    names, kept_back = _without_mark(names)
    _check_segments(batch, names, kept_back)
    parts = names.split(",")
    if "=" not in names:
        if len(parts) == 1:
            return field_of(batch, names, FLAG)
        return tuple(field_of(batch, part, FLAG) for part in parts)
    pairs = [part.partition("=") for part in parts]
    arguments = [argument for argument, _, _ in pairs]
    if not all(argument.isidentifier() and equals for argument, equals, _ in pairs):
        raise UserError(
            f"{FLAG}={names}: names some arguments of the model, and others not; name all, as in"
            " ids=tokens,mask=attention_mask, or none, as in tokens,attention_mask"
        )
    if len(set(arguments)) < len(arguments):
        raise UserError(f"{FLAG}={names}: names an argument twice; name each once")
    return {argument: field_of(batch, field, FLAG) for argument, _, field in pairs}


def _without_mark(names: str) -> tuple[str, bool]:
    """The names before a last `-segments`, and whether it was there."""
    return names.removesuffix(KEPT_BACK), names.endswith(KEPT_BACK)


def _check_segments(batch: Batch, names: str, kept_back: bool) -> None:
    """`UserError` if the batch has segments for the tokens of the first field, and the model is not
    given them."""
    fields = [part.rpartition("=")[2] for part in names.split(",")]
    if kept_back or "segments" in fields or "segments" not in batch:
        return
    if getattr(batch.get(fields[0]), "shape", ()) != getattr(batch["segments"], "shape", None):
        return  # not of tokens, such as the regions of an image
    raise UserError(
        f"{FLAG}={names}: the data has segments, without which the model sees padding and other"
        f" documents of a row; write {FLAG}={fields[0]}={fields[0]},segments=segments for a model"
        f" that takes them, or {FLAG}={names}{KEPT_BACK} if it shall see all"
    )


def first_field(names: str) -> str:
    """The first field that a text for `inputs_of` names.

    >>> first_field("ids=tokens,mask=attention_mask")
    'tokens'
    """
    return _without_mark(names)[0].split(",")[0].rpartition("=")[2]


def as_text(names: str | Sequence[str] | Mapping[str, str]) -> str:
    """Field names as Python may give them, a tuple or a dict, as the text that a flag takes.

    >>> as_text(("tokens", "lengths")), as_text({"ids": "tokens"})
    ('tokens,lengths', 'ids=tokens')
    """
    if isinstance(names, str):
        return names
    pairs = isinstance(names, Mapping)
    items = [f"{key}={name}" for key, name in names.items()] if pairs else list(map(str, names))
    if not items:
        raise UserError("input=(): a model needs an input; name a field of the batch")
    return ",".join(items)


def field_of(batch: Batch, name: str, flag: str) -> jax.Array:
    """One field of a batch; `UserError` naming the flag that chooses another."""
    if name not in batch:
        keys = sorted(set(batch) - {"id", "weight"})  # those that every batch may have
        near = did_you_mean(name, keys) if name else ""
        lacks = flag != FLAG and len(keys) == 1  # there is nothing but the inputs
        remedy = (
            "the data has none: give it an array of that name" if lacks else f"set {flag}{near}"
        )
        raise UserError(f"batch has keys {', '.join(keys)}; the task wants {name!r}; {remedy}")
    return batch[name]


def output_of(outputs: Any, path: str) -> Any:
    """The array among a model's outputs that a task means; "" is the whole.

    >>> import numpy as np
    >>> outputs = {"head": (np.zeros((8, 3)), np.zeros((8, 1)))}
    >>> output_of(outputs, "head.1").shape
    (8, 1)

    A step of the path is a key, an attribute, or a position. `UserError` that lists the parts where
    there is no such part, or the path ends before an array.
    """
    found, known = outputs, True
    for step in path.split(".") if path else []:
        names = dict(_parts(found))
        known = known and step in names
        found = names.get(step)
    if known and hasattr(found, "shape"):
        return found
    listed = [f"{name} {shape}" for name, shape in _listed(outputs)]
    choices = [name for name, _ in _listed(outputs)]
    if not choices:
        kind = type(outputs).__name__
        raise UserError(
            f"the model gives {kind}, which has no arrays; have it give an array, or a tuple or"
            " dict of arrays"
        )
    if choices == [""]:
        raise UserError(
            f"--task.output={path}: the model gives one array; set --task.output= (nothing)"
        )
    best = next((name for name in choices if name.split(".")[-1] == "logits"), choices[0])
    what = f"--task.output={path}: no such array" if path else "the model gives several outputs"
    raise UserError(
        f"{what}; its outputs are {', '.join(listed)}; choose one, e.g. --task.output={best}"
        f"{did_you_mean(path, choices) if path else ''}"
    )


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value by their names; none of an array."""
    if hasattr(value, "shape") or isinstance(value, str):
        return
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, tuple | list):
        yield from ((str(place), part) for place, part in enumerate(value))
        yield from ((name, getattr(value, name)) for name in getattr(value, "_fields", ()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from vars(value).items()


def _listed(value: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every array within a value: the path to it and its shape."""
    if hasattr(value, "shape"):
        yield prefix, tuple(value.shape)
        return
    fields = getattr(value, "_fields", ()) if isinstance(value, tuple) else ()
    for name, part in _parts(value):
        if not fields or name in fields:
            yield from _listed(part, f"{prefix}.{name}" if prefix else name)
