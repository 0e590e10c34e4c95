"""A table of examples: the one shape in which every data source hands out its data.

A table knows its length, what one example looks like, and how to read many rows at once. Arrays in
memory, memory maps, record files and image folders are all tables; the pipeline asks for nothing
else. Fields are called `image` and `label` whatever the source called them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from jaxtrain.errors import UserError


class Table(Protocol):
    """What the pipeline needs from a set of examples."""

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of one example (no batch dim)."""
        ...

    @property
    def num_classes(self) -> int | None:
        """How many labels there are, or None if labels are no classes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A word for each class, if known."""
        ...

    @property
    def arrays(self) -> Mapping[str, np.ndarray] | None:
        """The whole table, where it lies in host memory or is memory-mapped; otherwise None. Its
        dtypes may be wider than `fields` says."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at `indices` (any order, repeats allowed), exactly of the shapes and
        dtypes of `fields`; thread-safe."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayTable:
    """A table over NumPy arrays or memory maps with a common first dim.

    >>> table = ArrayTable(
    ...     {"image": np.zeros((5, 8, 8, 1), np.uint8), "label": np.arange(5)}, num_classes=5
    ... )
    >>> len(table), table.fields["label"].dtype, table.read(np.array([4, 0]))["label"]
    (5, dtype('int32'), array([4, 0], dtype=int32))
    """

    arrays: Mapping[str, np.ndarray]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each field of one example; see `device_dtype`."""
        return {
            name: jax.ShapeDtypeStruct(array.shape[1:], device_dtype(array.dtype))
            for name, array in self.arrays.items()
        }

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at `indices`; of a memory map, only these rows are read."""
        return {
            name: np.asarray(array[indices], device_dtype(array.dtype))
            for name, array in self.arrays.items()
        }


@dataclasses.dataclass(frozen=True)
class SliceTable:
    """The rows `rows` of another table, read through it (for tables that are not whole in
    memory)."""

    table: Table
    rows: np.ndarray | range

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
        return len(self.rows)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at `indices` of this part."""
        indices = np.asarray(indices)
        rows = self.rows
        return self.table.read(rows.start + indices if isinstance(rows, range) else rows[indices])


@dataclasses.dataclass(frozen=True)
class JoinedTable:
    """Several tables of the same fields, one after the other (`train+test`)."""

    tables: tuple[Table, ...]

    arrays = None

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As in every part."""
        return self.tables[0].fields

    @property
    def num_classes(self) -> int | None:
        """As in every part."""
        return self.tables[0].num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As in every part."""
        return self.tables[0].class_names

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows at `indices`, each from its part."""
        indices = np.asarray(indices)
        ends = np.cumsum([len(table) for table in self.tables])
        part = np.searchsorted(ends, indices, side="right")
        rows = {
            name: np.empty((len(indices), *field.shape), field.dtype)
            for name, field in self.fields.items()
        }
        for number in np.unique(part):
            here = part == number
            start = ends[number] - len(self.tables[number])
            for name, values in self.tables[number].read(indices[here] - start).items():
                rows[name][here] = values
        return rows


def select(table: Table, rows: np.ndarray | range) -> Table:
    """The part of a table made of `rows`: views where they are contiguous, copies of small arrays,
    otherwise read through the table.

    >>> part = select(ArrayTable({"label": np.arange(10)}), range(2, 6))
    >>> len(part), part.arrays["label"]
    (4, array([2, 3, 4, 5]))
    """
    if isinstance(rows, range) and rows.step != 1:
        rows = np.asarray(rows)
    if isinstance(rows, range) and rows == range(len(table)):
        return table
    if table.arrays is None:
        return SliceTable(table, rows)
    if isinstance(rows, range):
        parts = {name: array[rows.start : rows.stop] for name, array in table.arrays.items()}
    elif any(isinstance(array, np.memmap) for array in table.arrays.values()):
        return SliceTable(table, rows)  # a copy could be larger than the memory
    else:
        parts = {name: array[rows] for name, array in table.arrays.items()}
    return ArrayTable(parts, table.num_classes, table.class_names)


def join(*tables: Table) -> Table:
    """The tables one after the other, as one.

    >>> join(ArrayTable({"label": np.arange(2)}), ArrayTable({"label": np.arange(3)})).read(
    ...     np.array([4, 1])
    ... )["label"]
    array([2, 1], dtype=int32)
    """
    if len(tables) == 1:
        return tables[0]
    shapes = {
        tuple(sorted((name, field.shape, str(field.dtype)) for name, field in table.fields.items()))
        for table in tables
    }
    if len(shapes) > 1:
        raise UserError(
            "parts of one split differ in fields or shapes:"
            f" {' and '.join(map(str, sorted(shapes)))}"
        )
    in_memory = [
        arrays
        for table in tables
        if (arrays := table.arrays) is not None
        and not any(isinstance(array, np.memmap) for array in arrays.values())
    ]
    if len(in_memory) == len(tables):
        arrays = {
            name: np.concatenate([arrays[name] for arrays in in_memory]) for name in in_memory[0]
        }
        return ArrayTable(arrays, tables[0].num_classes, tables[0].class_names)
    return JoinedTable(tuple(tables))


def load(table: Table, chunk: int = 8192) -> ArrayTable:
    """The same table, whole in host memory.

    >>> load(SliceTable(ArrayTable({"label": np.arange(9)}), range(3, 6))).arrays["label"]
    array([3, 4, 5], dtype=int32)
    """
    arrays = {
        name: np.empty((len(table), *field.shape), field.dtype)
        for name, field in table.fields.items()
    }
    for start in range(0, len(table), chunk):
        for name, values in table.read(np.arange(start, min(start + chunk, len(table)))).items():
            arrays[name][start : start + chunk] = values
    return ArrayTable(arrays, table.num_classes, table.class_names)


def num_bytes(table: Table) -> int:
    """How much memory the whole table takes, on a device or in the host."""
    return len(table) * sum(
        int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
        for field in table.fields.values()
    )


def device_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that rows have on a device: integers and floats of 64 bits become 32 (jax has no
    others by default), half ones float32.

    >>> device_dtype(np.dtype("int64")), device_dtype(np.dtype("uint8"))
    (dtype('int32'), dtype('uint8'))
    """
    wide = {"i": "int32", "u": "int32", "f": "float32"}
    return (
        np.dtype(dtype)
        if np.dtype(dtype) in (np.uint8, np.bool_)
        else np.dtype(wide[np.dtype(dtype).kind])
    )


def classes_of(table: Table) -> int | None:
    """How many classes a table's labels need: what it says, or one more than its greatest label if
    it is in memory.

    >>> classes_of(ArrayTable({"label": np.array([0, 2])}))
    3
    """
    if table.num_classes is not None or table.arrays is None or "label" not in table.arrays:
        return table.num_classes
    return int(table.arrays["label"].max()) + 1
