"""A table of examples: the one shape in which every data source hands out its data.

A table knows its length, what one example looks like, and how to read many rows at once. Arrays in
memory, memory maps, record files and image folders are all tables; the pipeline asks for nothing
else. Fields are called `image` and `label` whatever the source called them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain.errors import UserError

CHUNK = 4096
"""How many rows are looked at at a time."""
BEYOND_32_BITS = (
    "jax's integers have 32 bits, -2147483648..2147483647; map the values to smaller ones, e.g. by"
    " np.unique(values, return_inverse=True)"
)


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
    origin: str = ""
    """Where the rows come from, for messages."""
    first_row: int = 0
    """The number that the first row has there."""
    tokenizer: Any = None
    """What made the tokens, of a table of text."""

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
        """Copies of the rows at `indices`; of a memory map, only these rows are read.
        `UserError` if one holds an integer that 32 bits do not hold."""
        rows = {name: array[indices] for name, array in self.arrays.items()}
        return on_device(rows, lambda row: self.where(int(np.asarray(indices)[row])))

    def where(self, index: int) -> str:
        """Where the row `index` of this table stands, for messages."""
        row = f"row {self.first_row + index}"
        return f"{self.origin}: {row}" if self.origin else row


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

    def where(self, index: int) -> str:
        """Where the row `index` of this part stands, for messages."""
        return where(self.table, int(self.rows[index]))


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

    def where(self, index: int) -> str:
        """Where the row `index` stands in its part, for messages."""
        for table in self.tables[:-1]:
            if index < len(table):
                return where(table, index)
            index -= len(table)
        return where(self.tables[-1], index)


@dataclasses.dataclass(frozen=True)
class ScaledTable:
    """A table of memory maps whose `image` is scaled when it is read: `low`..`high` to 0..1, as
    float32."""

    table: ArrayTable
    low: float
    high: float

    arrays = None

    @property
    def fields(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As in the table below, but for the dtype of the images."""
        fields = dict(self.table.fields)
        return fields | {"image": jax.ShapeDtypeStruct(fields["image"].shape, np.dtype("float32"))}

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
        """Copies of the rows at `indices`, scaled; `UserError` if a value is out of range."""
        rows = self.table.read(indices)
        image = rows["image"]
        outside = (image < self.low) | (image > self.high)
        if outside.any():
            row = int(np.flatnonzero(outside.reshape(len(image), -1).any(axis=1))[0])
            raise UserError(
                f"{self.where(int(np.asarray(indices)[row]))}: image holds"
                f" {image[row][outside[row]].flat[0]:g}, which is not in"
                f" --data.image_range={self.low:g},{self.high:g}; give the whole range"
            )
        return rows | {"image": scale_to_unit(image, self.low, self.high)}

    def where(self, index: int) -> str:
        """Where the row `index` stands, for messages."""
        return self.table.where(index)


def scale_to_unit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of low..high as float32 of 0..1, rounded once.

    >>> scale_to_unit(np.array([0, 65535], np.uint16), 0, 65535)
    array([0., 1.], dtype=float32)
    """
    scaled = np.empty(values.shape, np.float32)
    for start in range(0, len(values), CHUNK):  # in float64, so a chunk at a time
        part = values[start : start + CHUNK].astype(np.float64)
        scaled[start : start + CHUNK] = (part - low) / (high - low)
    return scaled


def where(table: Table, index: int) -> str:
    """Where a row of a table stands, as messages name it: a file, if the table knows.

    >>> where(ArrayTable({"label": np.arange(3)}, origin="digits.npz: test"), 2)
    'digits.npz: test: row 2'
    """
    named = getattr(table, "where", None)
    return f"row {index}" if named is None else named(index)


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
    first_row = getattr(table, "first_row", 0) + (rows.start if isinstance(rows, range) else 0)
    origin = getattr(table, "origin", "") if isinstance(rows, range) else ""
    tokenizer = getattr(table, "tokenizer", None)
    return ArrayTable(parts, table.num_classes, table.class_names, origin, first_row, tokenizer)


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
        tokenizer = getattr(tables[0], "tokenizer", None)
        first = tables[0]
        return ArrayTable(arrays, first.num_classes, first.class_names, tokenizer=tokenizer)
    return JoinedTable(tuple(tables))


def column(table: Table, name: str) -> np.ndarray | None:
    """One field of all rows, where it lies in memory or is memory-mapped; otherwise None.

    >>> column(SliceTable(ArrayTable({"label": np.arange(9)}), range(3, 6)), "label")
    array([3, 4, 5])
    """
    if table.arrays is not None:
        return table.arrays.get(name)
    if isinstance(table, ScaledTable):
        return None if name == "image" else column(table.table, name)
    if isinstance(table, SliceTable):
        whole = column(table.table, name)
        return None if whole is None else whole[np.asarray(table.rows)]
    if isinstance(table, JoinedTable):
        found = [column(each, name) for each in table.tables]
        parts = [part for part in found if part is not None]
        return np.concatenate(parts) if len(parts) == len(found) else None
    return None


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
    tokenizer = getattr(table, "tokenizer", None)
    return ArrayTable(arrays, table.num_classes, table.class_names, tokenizer=tokenizer)


def num_bytes(table: Table) -> int:
    """How much memory the whole table takes, on a device or in the host."""
    return len(table) * sum(
        int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
        for field in table.fields.values()
    )


def device_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that rows have on a device: integers and floats of 64 bits become 32 (jax has no
    others by default), half ones float32. `UserError` for what is neither a number nor a boolean.

    >>> device_dtype(np.dtype("int64")), device_dtype(np.dtype("uint8"))
    (dtype('int32'), dtype('uint8'))
    """
    dtype = np.dtype(dtype)
    if dtype in (np.uint8, np.bool_):
        return dtype
    wide = {"i": "int32", "u": "int32", "f": "float32"}
    if dtype.kind not in wide:
        raise UserError(
            f"a table's array has dtype {dtype}; expected integers, floats or booleans; convert it"
        )
    return np.dtype(wide[dtype.kind])


def on_device(
    rows: Mapping[str, np.ndarray], name_row: Callable[[int], str]
) -> dict[str, np.ndarray]:
    """Rows in the dtypes that they have on a device.

    >>> on_device({"label": np.array([3, 1])}, str)["label"].dtype
    dtype('int32')

    `UserError`, with what `name_row` calls the row, if an integer does not fit into 32 bits.
    """
    for name, values in rows.items():
        if (row := _first_too_wide(values)) is not None:
            raise UserError(
                f"{name_row(row)}: {name} holds {_widest(values[row])}; {BEYOND_32_BITS}"
            )
    return {name: np.asarray(values, device_dtype(values.dtype)) for name, values in rows.items()}


def is_image(field: jax.ShapeDtypeStruct) -> bool:
    """Whether a field called `image` is scaled and standardized: bytes, floats and booleans are;
    whole numbers of other dtypes (tokens, ids, lengths) stay what they are.

    >>> is_image(jax.ShapeDtypeStruct((28, 28, 1), np.dtype("uint8")))
    True
    >>> is_image(jax.ShapeDtypeStruct((128,), np.dtype("int32")))
    False
    """
    return np.dtype(field.dtype) in (np.uint8, np.bool_) or np.dtype(field.dtype).kind == "f"


def _first_too_wide(values: np.ndarray) -> int | None:
    """The first row that holds an integer beyond 32 bits."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 4 or values.dtype == np.int32:
        return None
    limits = np.iinfo(np.int32)
    if not values.size or (values.min() >= limits.min and values.max() <= limits.max):
        return None
    wide = (values > limits.max) | (values < limits.min)
    return int(np.flatnonzero(wide.reshape(len(values), -1).any(axis=1))[0])


def _widest(values: np.ndarray) -> int:
    """The value of the greatest magnitude."""
    return max((int(values.min()), int(values.max())), key=abs)
