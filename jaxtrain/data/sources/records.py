"""ArrayRecord files, read through Grain: for sets that are too large for memory, in an encoding
that is plain bytes.

A folder holds `dataset.json` and the files that it names. A record is one example: the values of
each field in the order of `dataset.json`, C order, little endian, nothing between them; so every
record has the same length. `write_records` makes such a folder:

    {"format": "jaxtrain-records-1", "num_classes": 10, "class_names": ["cat", ...] or null,
     "fields": {"image": {"dtype": "uint8", "shape": [28, 28, 1]}, "label": {"dtype": "int32",
     "shape": []}},
     "splits": {"train": {"train-00000.array_record": 2500, ...}}}
"""

import bisect
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain import extras
from jaxtrain.data.splits import Splits, choose, digest_of_files, newest_change
from jaxtrain.data.table import Table, device_dtype, on_device, scale_to_unit
from jaxtrain.errors import UserError

_FORMAT = "jaxtrain-records-1"


@dataclasses.dataclass(frozen=True)
class Records:
    """A folder made by `write_records`."""

    path: str = ""
    """The folder that holds dataset.json and the ArrayRecord files"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def splits(self) -> set[str]:
        """The splits that dataset.json names; none if it is not readable."""
        try:
            path = pathlib.Path(self.path).expanduser() / "dataset.json"
            return set(json.loads(path.read_text())["splits"])
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def open(self) -> Splits:
        """Reads dataset.json and opens the files; `UserError` if they do not fit together."""
        root = pathlib.Path(self.path).expanduser()
        origin = f"--data.path={self.path!r}"
        if not self.path or not (root / "dataset.json").is_file():
            raise UserError(
                f"{origin}: no dataset.json there; jaxtrain.data.sources.records.write_records"
                " makes such a folder"
            )
        extras.require("--data=records", "grain", "array_record")
        try:
            index = json.loads((root / "dataset.json").read_text())
            tables = _tables(root, index)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{origin}: dataset.json is not a {_FORMAT} index ({reason}); write the folder anew"
            ) from error
        files = {"dataset.json": root / "dataset.json"} | {
            name: root / name for split in index["splits"].values() for name in split
        }
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_files(files),
            modified_ns=newest_change(files.values()),
            origin=origin,
        )


def _tables(root: pathlib.Path, index: Mapping[str, Any]) -> dict[str, "RecordTable"]:
    """The table of each split, its files checked."""
    if index["format"] != _FORMAT:
        raise KeyError(f"format {index['format']!r}")
    layout = {
        name: (np.dtype(field["dtype"]).newbyteorder("<"), tuple(field["shape"]))
        for name, field in index["fields"].items()
    }
    names = None if index["class_names"] is None else tuple(index["class_names"])
    tables = {}
    for split, counts in index["splits"].items():
        for name in counts:
            if pathlib.PurePath(name).name != name or not (root / name).is_file():
                raise UserError(f"{root / name}: named by dataset.json, but no file there")
        files = tuple(str(root / name) for name in counts)
        tables[split] = RecordTable(
            files, tuple(counts.values()), layout, index["num_classes"], names
        )
    return tables


class RecordTable:
    """A table over the ArrayRecord files of one split."""

    arrays = None

    def __init__(
        self,
        files: tuple[str, ...],
        counts: tuple[int, ...],
        layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        num_classes: int | None,
        class_names: tuple[str, ...] | None,
    ) -> None:
        import grain

        self.num_classes, self.class_names = num_classes, class_names
        # Pixels of 16 bits have a known range; they are handed out as floats of 0..1.
        self._deep = {
            name
            for name, (dtype, shape) in layout.items()
            if name == "image" and dtype == np.uint16 and len(shape) >= 2
        }
        self.fields = {
            name: jax.ShapeDtypeStruct(
                shape, np.dtype("float32") if name in self._deep else device_dtype(dtype)
            )
            for name, (dtype, shape) in layout.items()
        }
        self._files, self._counts, self._layout = files, counts, layout
        for file, count in zip(files, counts, strict=True):
            try:
                # grain's class has its length from a base class that is not typed.
                source: Any = grain.sources.ArrayRecordDataSource(file)
                found = len(source)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(
                    f"{file}: not a readable ArrayRecord file ({_first_line(error)}); write it anew"
                ) from error
            if found != count:
                raise UserError(
                    f"{file}: holds {found} records, dataset.json says {count}; write it anew"
                )
        self._source = grain.sources.ArrayRecordDataSource(list(files))

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows at `indices`; `UserError` naming file and record if one is damaged."""
        records = read_located(self._source, np.asarray(indices), self._files, self._counts)
        sizes = [int(np.prod(shape)) * dtype.itemsize for dtype, shape in self._layout.values()]
        for index, record in zip(indices, records, strict=True):
            if len(record) != sum(sizes):
                place = located(int(index), self._files, self._counts)
                raise UserError(
                    f"{place[0]}: record {place[1]} has {len(record)} bytes, others {sum(sizes)};"
                    " write the file anew"
                )
        bytes_BX = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), sum(sizes))
        ends = itertools.accumulate(sizes)
        rows = {
            name: np.ascontiguousarray(bytes_BX[:, end - size : end])
            .view(dtype)
            .reshape(-1, *shape)
            for (name, (dtype, shape)), size, end in zip(
                self._layout.items(), sizes, ends, strict=True
            )
        }
        for name in self._deep:
            rows[name] = scale_to_unit(rows[name], 0, 65535)
        # A table of arrays refuses what does not fit into 32 bits; the file is named by `where`.
        return on_device(rows, lambda row: self.where(int(indices[row])))

    def where(self, index: int) -> str:
        """The file that holds an example, and its number in there."""
        file, record = located(index, self._files, self._counts)
        return f"{file}: record {record}"


def read_located(
    source: Any, indices: np.ndarray, files: Sequence[str], counts: Sequence[int]
) -> list[Any]:
    """Many records of a data source at once; if that fails, `UserError` with the file and the
    number of the first bad record."""
    keys = indices.tolist()
    try:
        return source.__getitems__(keys)
    except Exception:
        for key in keys:
            try:
                source[key]
            except Exception as cause:
                file, record = located(key, files, counts)
                raise UserError(
                    f"{file}: corrupt record {record} ({_first_line(cause)}); fetch or write the"
                    " file anew"
                ) from cause
        raise


def located(index: int, files: Sequence[str], counts: Sequence[int]) -> tuple[str, int]:
    """The file that holds example `index` of a split, and its number in there.

    >>> located(7, ("a", "b"), (5, 5))
    ('b', 2)
    """
    ends = list(itertools.accumulate(counts))
    number = bisect.bisect_right(ends, index)
    return files[number], index - (ends[number] - counts[number])


def write_records(
    folder: str | pathlib.Path, splits: Mapping[str, Table], examples_per_file: int = 16384
) -> None:
    """Writes tables as a folder for `Records`; dataset.json comes last, so a half-written folder is
    not taken for a whole one. `UserError` if the tables have not the same fields."""
    extras.require("write_records", "array_record")
    _check_fields(splits)
    from array_record.python.array_record_module import ArrayRecordWriter

    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    table = next(iter(splits.values()))
    fields = table.fields
    index = {
        "format": _FORMAT,
        "num_classes": table.num_classes,
        "class_names": None if table.class_names is None else list(table.class_names),
        "fields": {
            name: {"dtype": np.dtype(field.dtype).name, "shape": list(field.shape)}
            for name, field in fields.items()
        },
        "splits": {split: {} for split in splits},
    }
    for split, table in splits.items():
        for number, start in enumerate(range(0, len(table), examples_per_file)):
            name = f"{split}-{number:05d}.array_record"
            rows = table.read(np.arange(start, min(start + examples_per_file, len(table))))
            count = len(next(iter(rows.values())))
            # Groups of one: a record can then be read without its neighbours.
            writer = ArrayRecordWriter(str(root / name), "group_size:1")
            columns = [
                rows[field].astype(rows[field].dtype.newbyteorder("<"), copy=False)
                for field in fields
            ]
            for row in range(count):
                writer.write(b"".join(column[row].tobytes() for column in columns))
            writer.close()
            index["splits"][split][name] = count
    (root / "dataset.json").write_text(json.dumps(index, indent=1))


def _check_fields(splits: Mapping[str, Table]) -> None:
    """`UserError` if fields would be left out, or read as what they are not: one layout is that of
    all records."""
    if not splits:
        raise UserError("write_records: no split given; give one at least, {'train': table}")
    (first, table), *others = splits.items()
    for split, other in others:
        for name in sorted(table.fields.keys() ^ other.fields.keys()):
            has, lacks = (split, first) if name in other.fields else (first, split)
            ones = ", here 1 in every row" if name == "weight" else ""
            raise UserError(
                f"write_records: {has} has a field {name!r}, {lacks} has none; give every split the"
                f" same fields{ones}"
            )
        for name, field in table.fields.items():
            found = other.fields[name]
            if (found.dtype, found.shape) != (field.dtype, field.shape):
                raise UserError(
                    f"write_records: {name} is {field.dtype} {field.shape} in {first} and"
                    f" {found.dtype} {found.shape} in {split}; give it one dtype and shape"
                )


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
