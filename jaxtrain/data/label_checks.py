"""Labels checked before they reach a device: of tables in memory all of them at the start, of
others those of each batch as it is read. What a label may be is the task's to say."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table, where
from jaxtrain.errors import UserError
from jaxtrain.tasks import Wrong, has_hook

FIRST = 128
"""How many of the first rows of a split that is not in memory are checked before the training, and
as many again of all over it."""


@dataclasses.dataclass(frozen=True)
class LabelCheck:
    """What a task asks of the labels of one split."""

    task: Any
    outputs: Any
    """The model's outputs, which may be abstract: they say which classes there are."""
    split: str
    """Its role, train, validation or test, or the name of a set of --evaluate."""
    expression: str
    """What --data.ROLE said of it."""

    def __call__(self, table: Table, rows: Mapping[str, np.ndarray], ids: np.ndarray) -> None:
        """`UserError` that names the first of the rows `ids` of a table that cannot be used."""
        whole = len(ids) == len(table)
        found = self.task.wrong_labels(rows, self.outputs, whole=whole)
        if found is None:
            return
        every = len(found.rows_N) == len(ids) > 1
        row = int(ids[found.rows_N[0]])
        what = flag_of(self.split, self.expression)
        if every:
            some = "in all" if whole else "in"
            raise UserError(
                f"{what}: has no labels ({found.problem} in {where(table, row)}, and none is usable"
                f" {some} {len(ids)} rows; {found.rule}); {self._remedy(found)}"
            )
        remedy = f", or {found.remedy}" if found.remedy else ""
        raise UserError(
            f"{what}: {found.problem} in {where(table, row)}; {found.rule}; mend the data{remedy}"
        )

    def _remedy(self, found: Wrong) -> str:
        if self.split == "train":
            return f"give it labels, or {found.remedy}" if found.remedy else "give it labels"
        return _do_without(self.split)


def flag_of(split: str, expression: str) -> str:
    """The flag that names a set."""
    own = split in ("train", "validation", "test")
    return f"--{'data.' if own else 'evaluate='}{split}={expression}"


def _do_without(split: str) -> str:
    own = split in ("validation", "test")
    return f"pass --data.{split}= to do without" if own else f"drop {split} from --evaluate"


@dataclasses.dataclass(frozen=True)
class CheckedTable:
    """Another table whose labels are checked as they are read."""

    table: Table
    check: LabelCheck

    arrays = None

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As in the table below."""
        return self.table.fields

    @property
    def num_classes(self) -> int | None:
        """As in the table below."""
        return self.table.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As in the table below."""
        return self.table.class_names

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at `indices`; `UserError` if one of their labels cannot be used."""
        rows = self.table.read(indices)
        self.check(self.table, rows, np.asarray(indices))
        return rows

    def where(self, index: int) -> str:
        """Where a row stands, as the table below says it."""
        return where(self.table, index)


def unchecked(table: Table) -> Table:
    """The table below the checks of labels, for readers that have no use for labels."""
    return table.table if isinstance(table, CheckedTable) else table


def checked(splits: Splits, task: Any, outputs: Any, data: Any) -> Splits:
    """The splits, with those that are read by the batch checking their labels; `UserError` at once
    if those of a split in memory, or the first of another, are no labels of the task.

    `data` is the source, whose fields `train`, `validation` and `test` messages name.
    """
    if not has_hook(task, "wrong_labels", outputs):
        return splits
    found: dict[str, CheckedTable] = {}
    for split, table in ({"train": splits.train} | splits.held_out).items():
        expression = str(getattr(data, split, ""))
        _check_target(task, splits.train, table, split, expression)
        check = LabelCheck(task, outputs, split, expression)
        if table.arrays is not None:
            check(table, table.arrays, np.arange(len(table)))
            continue
        found[split] = CheckedTable(table, check)
        found[split].read(_some_rows(len(table)))
    sets = {name: found.get(name, table) for name, table in splits.evaluate.items()}
    own: dict[str, Any] = {name: table for name, table in found.items() if name not in sets}
    return dataclasses.replace(splits, **own, evaluate=sets)


def _some_rows(length: int) -> np.ndarray:
    """Rows to look at before the training, ascending."""
    spread = np.linspace(0, length - 1, FIRST).astype(np.int64)
    return np.union1d(np.arange(min(FIRST, length)), spread)


def _check_target(task: Any, train: Table, table: Table, split: str, expression: str) -> None:
    """`UserError` if a split lacks the labels that the train split has."""
    target = getattr(task, "target", None)
    if target in train.fields and target not in table.fields:
        raise UserError(
            f"{flag_of(split, expression)}: has no {target} (it has"
            f" {', '.join(table.fields)}); give it labels, or {_do_without(split)}"
        )
