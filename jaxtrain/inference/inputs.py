"""What the inputs of a trained model must be: fields, shapes, dtypes and ranges, and the
preparation that each batch goes through. A run writes it into its run.json, and prediction reads
it back.

Dims: C channels of an image.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from jaxtrain import messages
from jaxtrain.data import statistics
from jaxtrain.data.table import Table
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch, Shapes

MEASURED = 2048
"""How many rows the ranges of values are looked at on, evenly spaced."""
FARTHEST = {"image": 0.5, "int": 1.0, "float": 10.0}
"""How far outside the range that training saw a value may lie, in widths of that range: farther,
it is on another scale."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One array that the model sees, without the batch dim."""

    shape: tuple[int, ...]
    dtype: np.dtype
    low: float | None = None
    high: float | None = None
    """The range that training saw; None where any value is as good, as for bytes."""
    vocabulary: int = 0
    """How many tokens the model knows, of which any may come; 0 for what is no token."""

    def convert(self, name: str, value: Any) -> np.ndarray:
        """Rows of this field from any array; `UserError` if it is another thing."""
        array = np.asarray(value)
        if array.shape[1:] != self.shape:
            raise UserError(
                f"{name} has shape {_shown(array.shape)}; the model takes (N,"
                f" {', '.join(map(str, self.shape))}), or one example of {_shown(self.shape)}"
            )
        self.check_dtype(name, array.dtype)
        self._check_values(name, array)
        return array.astype(self.dtype, copy=False)

    def check_dtype(self, name: str, dtype: np.dtype) -> None:
        """`UserError` unless rows of this dtype mean what those of training meant."""
        if not _convertible(dtype, self.dtype):
            raise UserError(
                f"{name} is {dtype}, the run was trained on {self.dtype}; give it the same"
                " numbers, scaled as they were"
            )

    def _check_values(self, name: str, array: np.ndarray) -> None:
        if not array.size:
            return
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            row = int(np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1))[0])
            raise UserError(f"{name}: row {row} holds NaN or infinity; mend the data")
        low, high = float(array.min()), float(array.max())
        if self.vocabulary:
            if not 0 <= low <= high < self.vocabulary:
                raise UserError(
                    f"{name} holds {low:g}..{high:g}, the model knows tokens"
                    f" 0..{self.vocabulary - 1}; encode the text by the run's own tokenizer"
                )
            return
        if self.low is None or self.high is None:
            return
        width = self.high - self.low or max(abs(self.high), 1.0)
        outside = max(self.low - low, high - self.high, 0.0) / width
        saw = f"training saw {self.low:g}..{self.high:g}"
        if outside > FARTHEST[self._kind()]:
            remedy = "number" if self._kind() == "int" else "scale"
            raise UserError(f"{name} holds {low:g}..{high:g}, {saw}; {remedy} it as in training")
        if outside > 0 and self._kind() == "int":
            messages.warn(f"{name} holds {low:g}..{high:g}, {saw}")
        if self._kind() == "image" and array.size > 1 and 0 < high - low < 0.02 * width:
            messages.warn(f"{name} holds only {low:g}..{high:g}, {saw}; is it scaled alike?")

    def _kind(self) -> str:
        if self.dtype.kind != "f":
            return "int"
        return "image" if len(self.shape) >= 3 else "float"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model sees, and what is done to it first."""

    fields: Mapping[str, Field]
    prepare: Callable[[Batch], Batch] | None

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """What `describe` wrote; `UserError` if this version cannot read it."""
        try:
            fields = {
                name: Field(
                    tuple(map(int, field["shape"])),
                    np.dtype(field["dtype"]),
                    field.get("low"),
                    field.get("high"),
                )
                for name, field in record["fields"].items()
            }
            return cls(fields, _prepare_of(record["prepare"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"run.json: its inputs cannot be read ({messages.one_line(str(error))})"
            ) from error

    def of_model(self, model: Any) -> Self:
        """The same, with tokens being any that the model knows."""
        vocabulary = getattr(model, "vocabulary", 0)
        if "tokens" not in self.fields or not isinstance(vocabulary, int):
            return self
        tokens = dataclasses.replace(self.fields["tokens"], vocabulary=vocabulary)
        return dataclasses.replace(self, fields={**self.fields, "tokens": tokens})

    def check_fields(self, fields: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """`UserError` if a table lacks a field, or has it in another shape or dtype."""
        for name, field in self.fields.items():
            if name not in fields:
                raise UserError(
                    f"holds {', '.join(fields)}; the model takes {', '.join(self.fields)}"
                )
            if (shape := tuple(fields[name].shape)) != field.shape:
                raise UserError(
                    f"an example of {name} has shape {_shown(shape)}; the model takes"
                    f" {_shown(field.shape)}"
                )
            field.check_dtype(name, np.dtype(fields[name].dtype))

    def rows(self, given: Any) -> tuple[dict[str, np.ndarray], bool]:
        """The fields of a batch from an array or arrays by name, and whether it was one example
        only.

        >>> spec = Inputs({"x": Field((2,), np.dtype("float32"))}, None)
        >>> spec.rows([1.0, 2.0])
        ({'x': array([[1., 2.]], dtype=float32)}, True)
        """
        named = dict(given) if isinstance(given, Mapping) else self._by_name(given)
        for name in named:
            if name not in self.fields:
                raise UserError(
                    f"{name}: the model takes {', '.join(self.fields)}"
                    f"{messages.did_you_mean(name, self.fields)}"
                )
        if missing := [name for name in self.fields if name not in named]:
            raise UserError(f"lacks {', '.join(missing)}; the model takes {', '.join(self.fields)}")
        arrays = {name: np.asarray(value) for name, value in named.items()}
        single = all(arrays[name].shape == field.shape for name, field in self.fields.items())
        rows = {
            name: field.convert(name, arrays[name][None] if single else arrays[name])
            for name, field in self.fields.items()
        }
        lengths = {name: len(array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"the inputs differ in length: {lengths}; give one row an example")
        if not all(lengths.values()):
            raise UserError("0 examples; give some")
        return rows, single

    def _by_name(self, given: Any) -> dict[str, Any]:
        names = list(self.fields)
        if len(names) == 1:
            return {names[0]: given}
        raise UserError(
            f"the model takes {', '.join(names)}; give them by name, as a dict of arrays"
        )


def describe(
    task: Any, table: Table, prepare: Callable[[Batch], Batch] | None, batch_size: int
) -> dict[str, Any]:
    """The record of what a model sees of a table, for run.json.

    >>> from jaxtrain.data.table import ArrayTable
    >>> from jaxtrain.tasks import Classification
    >>> table = ArrayTable({"image": np.zeros((3, 4, 4, 1), np.uint8), "label": np.arange(3)})
    >>> describe(Classification(), table, statistics.scaled, 2)
    {'fields': {'image': {'shape': [4, 4, 1], 'dtype': 'uint8'}}, 'prepare': {'kind': 'scaled'}}
    """
    shapes = {
        name: jax.ShapeDtypeStruct((batch_size, *field.shape), field.dtype)
        for name, field in table.fields.items()
    }
    rows = np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64))
    names = used_fields(task, shapes, prepare)
    read = {
        name: values
        for name, values in (table.read(rows) if _have_ranges(table, names) else {}).items()
        if name in names
    }
    fields: dict[str, Any] = {}
    for name in names:
        field = table.fields[name]
        fields[name] = {"shape": list(field.shape), "dtype": str(np.dtype(field.dtype))}
        if name in read and np.dtype(field.dtype).kind in "if":
            low, high = float(read[name].min()), float(read[name].max())
            if math.isfinite(low) and math.isfinite(high):
                fields[name] |= {"low": low, "high": high}
    return {"fields": fields, "prepare": _prepare_record(prepare)}


def used_fields(task: Any, shapes: Shapes, prepare: Callable[[Batch], Batch] | None) -> list[str]:
    """The fields of a batch that what the model sees depends on, as the task picks it."""

    def pick(batch: Batch) -> Any:
        return task.inputs(batch if prepare is None else prepare(dict(batch)))

    names = sorted(shapes)  # the order in which jax takes a dict apart
    program = jax.make_jaxpr(pick)({name: shapes[name] for name in names}).jaxpr
    needed = {id(variable) for variable in program.outvars}
    for equation in reversed(program.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed |= {id(variable) for variable in equation.invars}
    used = {
        name for name, variable in zip(names, program.invars, strict=True) if id(variable) in needed
    }
    return [name for name in shapes if name in used]


def _have_ranges(table: Table, names: Sequence[str]) -> bool:
    return any(np.dtype(table.fields[name].dtype).kind in "if" for name in names)


def _prepare_record(prepare: Any) -> dict[str, Any] | None:
    if prepare is None:
        return None
    if prepare is statistics.scaled:
        return {"kind": "scaled"}
    if isinstance(prepare, functools.partial) and prepare.func is statistics.standardize:
        found = prepare.keywords["statistics"]
        return {"kind": "standardized", "mean": list(found.mean_C), "std": list(found.std_C)}
    return {"kind": "python"}


def _prepare_of(record: Any) -> Callable[[Batch], Batch] | None:
    if record is None:
        return None
    if record["kind"] == "scaled":
        return statistics.scaled
    if record["kind"] == "standardized":
        found = statistics.Statistics(tuple(record["mean"]), tuple(record["std"]))
        return functools.partial(statistics.standardize, statistics=found)
    raise UserError(f"its preparation is of kind {record['kind']!r}, which only Python knows")


def _convertible(given: np.dtype, wanted: np.dtype) -> bool:
    """Whether an array may be read as another dtype without a change of meaning: the same, floats
    as float32, whole numbers as int32."""
    return (
        given == wanted
        or (given.kind == wanted.kind == "f")
        or (wanted == np.int32 and given.kind in "iu" and given != np.uint8)
    )


def _shown(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
