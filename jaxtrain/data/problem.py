"""The kind of problem that a data set poses, read off its fields and labels."""

import dataclasses
from typing import Literal

import jax
import numpy as np

from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table, is_image
from jaxtrain.errors import UserError

Kind = Literal["classification", "several labels", "regression", "next token"]
MEASURED = 10_000
"""How many rows the scale of features and targets is measured on."""
_NOT_INPUTS = ("label", "target", "weight")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be learnt from what.

    >>> from jaxtrain.data.table import ArrayTable
    >>> table = ArrayTable({"image": np.zeros((9, 5)), "target": np.zeros(9)})
    >>> found = Problem.of(Splits(table, None, None, ""))
    >>> found.kind, found.inputs, found.outputs
    ('regression', 'features', 1)
    """

    kind: Kind
    inputs: Literal["images", "signals", "features", "tokens"]
    input: str
    """The field that the model sees."""
    shape: tuple[int, ...]
    """Of one input."""
    target: str
    """The field that it is to give."""
    outputs: int
    """How many numbers the model gives."""
    vocabulary: int | None = None
    """One more than the largest token."""
    others: tuple[str, ...] = ()
    """Fields that the model does not see."""

    mean: tuple[float, ...] = ()
    """Of each output of a regression, over the train split (some 10,000 rows of it)."""
    deviation: tuple[float, ...] = ()
    input_mean: tuple[float, ...] = ()
    """Of each feature, over the train split (some 10,000 rows of it)."""
    input_deviation: tuple[float, ...] = ()

    @classmethod
    def of(cls, splits: Splits) -> "Problem":
        """The problem of a data set; `UserError` if it poses none that can be told."""
        fields = splits.train.fields
        candidates = [name for name in fields if name not in _NOT_INPUTS]
        name = next((name for name in ("image", "features", "tokens") if name in fields), None)
        name = name or next(iter(candidates), None)
        if name is None:
            raise UserError(
                "--data.path: holds labels, but no inputs; name them by --data.image_key"
            )
        field = fields[name]
        inputs = _inputs(name, field)
        vocabulary = _largest(splits, name) + 1 if inputs == "tokens" else None
        kind, target, outputs = _asked(splits.train, name, inputs, vocabulary)
        others = tuple(other for other in candidates if other not in (name, target))
        shape = tuple(field.shape)
        found = cls(kind, inputs, name, shape, target, outputs, vocabulary, others)
        if kind == "regression":
            mean, deviation = _moments(splits.train, target)
            found = dataclasses.replace(found, mean=mean, deviation=deviation)
        if inputs == "features" and name == "features":
            mean, deviation = _moments(splits.train, name)
            found = dataclasses.replace(found, input_mean=mean, input_deviation=deviation)
        return found

    def words(self, splits: Splits, model: str) -> str:
        """What was understood, and which model was chosen, a line each."""
        parts = [
            f"{len(table):,} {name}"
            for name, table in (
                ("train", splits.train),
                ("validation", splits.validation),
                ("test", splits.test),
            )
            if table is not None
        ]
        held_out = "split_seed" in splits.fingerprint
        names = splits.train.class_names
        named = f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
        asked = {
            "classification": f"one of {self.outputs} classes{named}",
            "several labels": f"any of {self.outputs} labels{named}",
            "regression": f"{self.outputs} number{'s' * (self.outputs > 1)}",
            "next token": f"the next of {self.outputs} tokens",
        }[self.kind]
        dtype = np.dtype(splits.train.fields[self.input].dtype)
        lines = [
            "understood (all of it can be changed by flags):",
            f"  data      {', '.join(parts)}"
            + (", parts held out by --data.split_seed" if held_out else ""),
            f"  inputs    {self.input}: {self.inputs}, {dtype} {self.shape}",
            f"  task      {self.kind}: {asked}, from {self.target}",
        ]
        if self.others:
            lines.append(
                f"  not used  {', '.join(self.others)} (--task.input names several inputs)"
            )
        lines.append(f"  model     {model} for {self.outputs} outputs (--model, --model.widths)")
        return "\n".join(lines)


NO_PROBLEM = Problem("classification", "images", "image", (8, 8, 1), "label", 10)
"""What is taken where there is no data yet, as for --help."""


def _inputs(
    name: str, field: jax.ShapeDtypeStruct
) -> Literal["images", "signals", "features", "tokens"]:
    rank = len(field.shape)
    if not is_image(field):
        if rank != 1:
            raise UserError(
                f"--data.path: {name} holds whole numbers of shape {field.shape} an example;"
                f" expected"
                " tokens (length,), or features and pixels, which are floats or bytes"
            )
        return "tokens"
    if rank not in (1, 2, 3):
        raise UserError(
            f"--data.path: {name} has shape {field.shape} an example; expected (features,),"
            f" (length,"
            " channels) or (height, width, channels); take an experiment with a model of your own"
        )
    return ("features", "signals", "images")[rank - 1]


def _asked(train: Table, name: str, inputs: str, vocabulary: int | None) -> tuple[Kind, str, int]:
    """The kind of problem, the field of its answers, and how many outputs a model needs."""
    field = next((name for name in ("label", "target") if name in train.fields), None)
    if field is None:
        if inputs == "tokens" and vocabulary is not None:
            return "next token", name, vocabulary
        raise UserError(
            f"--data.path: has no labels among {', '.join(train.fields)}; name them by"
            " --data.label_key, or call them label, labels, y, target or targets"
        )
    shape = train.fields[field].shape
    width = int(np.prod(shape))
    if field == "label" and not shape:
        classes = train.num_classes
        if classes is None or classes < 2:
            raise UserError(f"--data.path: label has {classes or 0} classes; at least 2 are needed")
        return "classification", field, classes
    if len(shape) > 1:
        raise UserError(
            f"--data.path: {field} has shape {shape} an example; expected one number, or several"
            f" in a"
            " row; take an experiment with a task of your own"
        )
    rows = train.read(np.arange(min(len(train), 4096)))[field].reshape(-1, width)
    if width > 1 and np.isin(rows, (0, 1)).all():
        one_hot = (rows.sum(axis=1) == 1).all()
        return ("classification" if one_hot else "several labels"), field, width
    if field == "label":
        raise UserError(
            f"--data.path: label holds {rows.min():g}..{rows.max():g} in {width} places an example;"
            " expected one class, or 0 and 1 for several labels; save numbers to be predicted as"
            " floats"
        )
    return "regression", field, width


def _largest(splits: Splits, name: str) -> int:
    """The largest token of all splits."""
    tables = [
        table for table in (splits.train, splits.validation, splits.test) if table is not None
    ]
    largest = 0
    for table in tables:
        for start in range(0, len(table), 4096):
            rows = table.read(np.arange(start, min(start + 4096, len(table))))[name]
            if rows.min() < 0:
                raise UserError(
                    f"--data.path: {name} holds {rows.min()}; tokens are >= 0; for features save"
                    " floats"
                )
            largest = max(largest, int(rows.max()))
    if largest >= 2**20:
        raise UserError(
            f"--data.path: {name} holds whole numbers up to {largest}, too many for tokens; map"
            f" them"
            " by np.unique(values, return_inverse=True), or save features as floats"
        )
    return largest


def _moments(table: Table, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each column of a field, over at most `MEASURED` rows; where nothing
    changes, a deviation of 1."""
    rows = table.read(np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64)))
    values_ND = rows[name].reshape(len(rows[name]), -1).astype(np.float64)
    if "weight" in rows:
        values_ND = values_ND[rows["weight"] > 0]
    deviations = (float(deviation) or 1.0 for deviation in values_ND.std(0))
    return tuple(map(float, values_ND.mean(0))), tuple(deviations)
