"""What is asked of the values of every split before the training, and of every batch that is read
from files: finite, within 32 bits, and alike in all splits.

Arrays in memory are looked at whole, and so are files with floats, up to 256 MB; of larger ones
some rows are, and each batch as it is read. N: rows, D: columns
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jaxtrain.data.table import BEYOND_32_BITS, CHUNK, Table, is_image, num_bytes, where
from jaxtrain.errors import UserError

COMPARED = 64
"""How many rows of a split that is not in memory are compared with those of the others."""
READ_BYTES = 2**28
"""Splits of up to so many bytes are read whole before the training, if they hold floats."""
FACTOR = 16
"""How many times wider than the other the range of one of two splits may be."""
UNEVEN = 100
"""How many times wider than another a column is, if columns are said to differ in scale."""
_KNOWN = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))


def check_values(tables: Mapping[str, Table], origin: str) -> list[str]:
    """Looks at every value of the tables that are in memory, by the name of their split; returns
    notes.

    >>> from jaxtrain.data.table import ArrayTable
    >>> check_values({"test": ArrayTable({"image": np.zeros((2, 3))})}, "set.npz")
    []

    `UserError` if a float is not finite (but in rows whose `weight` is 0), or if a number does not
    fit into 32 bits.
    """
    notes = []
    for split, table in tables.items():
        if not _in_memory(table):
            _check_files(table, split)
            continue
        assert table.arrays is not None
        unused = _unused(table.arrays)
        if unused is not None:
            _check_weights(table.arrays["weight"], f"{origin}: {split}: weight")
        for name, array in table.arrays.items():
            place = f"{origin}: {split}: {name}"
            if array.dtype.kind == "f":
                _check_finite(array, unused, place)
                notes += _lost_digits(array, unused, place)
            elif array.dtype.kind in "iu" and array.dtype.itemsize >= 4:
                _check_integers(array, place)
    return list(dict.fromkeys(notes))


def _check_files(table: Table, split: str) -> None:
    """Reads the rows of a table that is not in memory, or of a large one some, so that bad values
    of a test split are not found at the end."""
    floats = any(np.dtype(field.dtype).kind == "f" for field in table.fields.values())
    if not floats or getattr(table, "in_order", False):
        return
    few = num_bytes(table) <= READ_BYTES
    some = np.unique(np.linspace(0, len(table) - 1, CHUNK).astype(np.int64))
    rows = np.arange(len(table)) if few else some
    for start in range(0, len(rows), COMPARED):
        part = rows[start : start + COMPARED]
        try:
            read = table.read(part)
        except UserError:
            if split != "train":
                raise
            continue  # the train split is read from the first step on, and says it then
        check_rows(table, read, part)


def _in_memory(table: Table) -> bool:
    return table.arrays is not None and not any(
        isinstance(array, np.memmap) for array in table.arrays.values()
    )


def _unused(rows: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which rows have a weight of 0; None if rows have no weights."""
    weight = rows.get("weight")
    return None if weight is None or weight.ndim != 1 else weight == 0


def _check_weights(weight_N: np.ndarray, place: str) -> None:
    if (weight_N < 0).any():
        row = int(np.flatnonzero(weight_N < 0)[0])
        raise UserError(f"{place} is {weight_N[row]:g} in row {row}; weights are >= 0; mend it")
    if not weight_N.any():
        raise UserError(f"{place} is 0 in every row, so nothing would count; leave the array out")


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), CHUNK):
        yield start, np.asarray(array[start : start + CHUNK])


def _check_finite(array: np.ndarray, unused: np.ndarray | None, place: str) -> None:
    first, count, value = None, 0, 0.0
    for start, values in _chunks(array):
        # A float64 that float32 makes infinite is no number on the device.
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(values.astype(np.float32, copy=False))
        bad_N = bad.reshape(len(values), -1).any(axis=1)
        if unused is not None:
            bad_N &= ~unused[start : start + len(values)]
        if bad_N.any():
            row = int(np.flatnonzero(bad_N)[0])
            if first is None:
                first, value = start + row, float(values[row][bad[row]].flat[0])
            count += int(bad_N.sum())
    if first is None:
        return
    if np.isfinite(value):
        raise UserError(
            f"{place} holds {value:g} in row {first}, which is infinite in float32; scale the data"
        )
    more = "" if count == 1 else f" (and {count - 1:,} more rows)"
    raise UserError(f"{place} holds {value} in row {first}{more}; {_MEND}")


_MEND = "mend the data, or give such rows a weight of 0 (an array `weight`, 1 for the others)"


def _check_integers(array: np.ndarray, place: str) -> None:
    limits = np.iinfo(np.int32)
    if array.dtype == np.int32:
        return
    for start, values in _chunks(array):
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            wide = (values > limits.max) | (values < limits.min)
            row = int(np.flatnonzero(wide.reshape(len(values), -1).any(axis=1))[0])
            value = values[row][wide[row]].flat[0]
            raise UserError(f"{place} holds {value} in row {start + row}; {BEYOND_32_BITS}")


def _lost_digits(array: np.ndarray, unused: np.ndarray | None, place: str) -> list[str]:
    """A note on columns of float64 that float32 cannot tell apart: times in seconds since 1970,
    numbers of customers."""
    if array.dtype.itemsize <= 4 or not array.size:
        return []
    if not max(np.nanmax(array), -np.nanmin(array)) > 2**24:
        return []
    # The columns of pixels are none of their own.
    columns = array.shape[-1] if array.ndim == 2 else 1
    low_D, high_D, error_D = np.full(columns, np.inf), np.full(columns, -np.inf), np.zeros(columns)
    whole_D = np.ones(columns, bool)
    for start, values in _chunks(array):
        if unused is not None:  # these may hold anything
            values = values[~unused[start : start + len(values)]]
            if not len(values):
                continue
        values_ND = values.reshape(-1, columns)
        low_D, high_D = np.minimum(low_D, values_ND.min(0)), np.maximum(high_D, values_ND.max(0))
        error_D = np.maximum(error_D, np.abs(values_ND - values_ND.astype(np.float32)).max(0))
        whole_D &= (values_ND == np.round(values_ND)).all(0)
    lost_D = (error_D > 0) & (whole_D | (error_D > (high_D - low_D) / 2**13))
    if not lost_D.any():
        return []
    column = int(np.flatnonzero(lost_D)[0])
    named = f"column {column} of it " if columns > 1 else "it "
    return [
        (
            f"{place}: {array.dtype} loses digits in float32: {named}has values up to"
            f" {max(abs(low_D[column]), abs(high_D[column])):.15g}, rounded by up to"
            f" {error_D[column]:g}; take off an offset first, e.g. the smallest value"
        )
    ]


def column_notes(train: Table) -> list[str]:
    """A note on inputs that are rows of floats whose columns differ much in scale: one mean and
    deviation of all standardize them, which is right for signals.

    >>> from jaxtrain.data.table import ArrayTable
    >>> wide = np.array([[0.0, 0.0], [0.1, 2000.0], [0.2, 1000.0]])
    >>> column_notes(ArrayTable({"image": wide}))[0][:57]
    'image: its 2 columns differ in scale (deviations 0.0816 t'
    """
    image_ND = (train.arrays or {}).get("image")
    if image_ND is None or image_ND.ndim != 2 or image_ND.dtype.kind != "f":
        return []
    some = np.linspace(0, len(image_ND) - 1, min(len(image_ND), CHUNK)).astype(np.int64)
    deviation_D = np.asarray(image_ND[some], np.float64).std(axis=0)
    deviation_D = deviation_D[np.isfinite(deviation_D) & (deviation_D > 0)]
    if not deviation_D.size or deviation_D.max() < UNEVEN * deviation_D.min():
        return []
    low, high = deviation_D.min(), deviation_D.max()
    return [
        (
            f"image: its {image_ND.shape[1]} columns differ in scale (deviations {low:.3g} to"
            f" {high:.3g}) and one mean and deviation standardizes all, so that small ones hardly"
            " count; scale each, x = (x - mean) / deviation by the train split, as"
            " experiments/own.py does by itself"
        )
    ]


def check_alike(
    tables: Mapping[str, Table], origin: str, *, ranges: bool | None = None
) -> list[str]:
    """Compares every split with the first: dtypes, the width of labels and targets, and (unless
    `ranges` is False) the range of the images; returns notes.

    >>> from jaxtrain.data.table import ArrayTable
    >>> tables = {split: ArrayTable({"image": np.zeros((9, 4))}) for split in ("train", "test")}
    >>> check_alike(tables, "set.npz")
    []

    `UserError` if dtypes or widths differ, or if images (not features, which get a note) are on
    another scale; if `ranges` is True, --data.image_range is named as a remedy.
    """
    (first, train), *others = tables.items()
    _check_pixels(train, origin)
    for split, table in others:
        for name, field in table.fields.items():
            other = train.fields.get(name)
            if other is None:
                continue
            if field.dtype != other.dtype:
                raise UserError(
                    f"{origin}: {name} is {other.dtype} in {first} and {field.dtype} in {split};"
                    " save both in one dtype and range"
                )
            if name in ("label", "target") and field.shape != other.shape:
                raise UserError(
                    f"{origin}: {name} has shape {other.shape} in {first} and {field.shape} in"
                    f" {split}, an example; give both the same width"
                )
    if (
        not others
        or ranges is False
        or "image" not in train.fields
        or not is_image(train.fields["image"])
    ):
        return []
    known = {split: range_of(table) for split, table in tables.items() if "image" in table.fields}
    notes = []
    for split, _ in others:
        if split in known and (problem := _unlike(known[first], known[split])):
            words = (
                f"{origin}: image is in {_words(known[first])} in {first} and in"
                f" {_words(known[split])} in {split}: {problem}"
            )
            if len(train.fields["image"].shape) < 2:  # columns may well differ that much
                notes.append(f"{words}; are both scaled alike?")
            else:
                low = min(known[first].low, known[split].low)
                high = max(known[first].high, known[split].high)
                given = f", or give the range of both, {range_flag(low, high)}" if ranges else ""
                raise UserError(f"{words}; scale both alike{given}")
    return notes


def _check_pixels(train: Table, origin: str) -> None:
    """`UserError` for images of three dims whose whole numbers are no bytes: nobody scaled them."""
    field = train.fields.get("image")
    if (
        field is None
        or is_image(field)
        or len(field.shape) != 3
        or field.shape[-1] not in (1, 3, 4)
    ):
        return
    raise UserError(
        f"{origin}: image is {field.dtype} {field.shape}; pixels are uint8, or floats; save them as"
        " uint8 or divide them by their largest value"
    )


@dataclasses.dataclass(frozen=True)
class Range:
    """The smallest and the greatest value of some images, and how many rows were looked at."""

    low: float
    high: float
    rows: int
    whole: bool
    """Whether those are all."""

    @property
    def spread(self) -> float:
        """How far the values lie apart."""
        return self.high - self.low


def range_of(table: Table) -> Range:
    """The range of a table's images: of all if they are in memory, of some rows otherwise.

    >>> from jaxtrain.data.table import ArrayTable
    >>> range_of(ArrayTable({"image": np.array([[0, 7], [9, 2]])}))
    Range(low=0.0, high=9.0, rows=2, whole=True)
    """
    if _in_memory(table):
        assert table.arrays is not None
        return array_range(table.arrays["image"], _unused(table.arrays))
    if table.fields["image"].dtype == np.uint8 and table.arrays is None:
        return Range(0.0, 255.0, len(table), whole=True)  # decoded from files: bytes are bytes
    if getattr(table, "in_order", False):
        return Range(0.0, 0.0, 0, whole=False)
    rows = np.unique(np.linspace(0, len(table) - 1, COMPARED).astype(np.int64))
    read = table.read(rows)
    found = array_range(read["image"], _unused(read))
    return dataclasses.replace(found, whole=len(rows) == len(table))


def array_range(array: np.ndarray, unused: np.ndarray | None = None) -> Range:
    """The range of an array; of a memory map, that of `COMPARED` rows."""
    total = len(array)
    if isinstance(array, np.memmap):
        array = np.asarray(array[np.unique(np.linspace(0, total - 1, COMPARED).astype(np.int64))])
    elif unused is not None and unused.any():
        array = array[~unused]
    if not array.size:
        return Range(0.0, 0.0, 0, whole=True)
    # What is not finite is found by `check_values`; here it may stand in rows of weight 0.
    chunks = (_finite(values) for _, values in _chunks(array))
    parts = [(values.min(), values.max()) for values in chunks if values.size]
    if not parts:
        return Range(0.0, 0.0, 0, whole=True)
    low, high = float(min(low for low, _ in parts)), float(max(high for _, high in parts))
    return Range(low, high, len(array), whole=len(array) == total)


def _finite(values: np.ndarray) -> np.ndarray:
    finite = values.dtype.kind != "f" or np.isfinite(values).all()
    return values if finite else values[np.isfinite(values)]


def range_flag(low: float, high: float) -> str:
    """The flag that says a range, of which nothing is rounded away.

    >>> range_flag(0.0, 1234567.0), range_flag(-0.5, 1 / 3)
    ('--data.image_range=0,1234567', '--data.image_range=-0.5,0.3333333333333333')
    """
    exact = (f"{end:.0f}" if end == round(end) else repr(float(end)) for end in (low, high))
    return f"--data.image_range={','.join(exact)}"


def known_range(found: Range) -> tuple[float, float] | None:
    """The usual range of pixels that values lie in, or None.

    >>> known_range(Range(0.0, 251.0, 9, whole=True)), known_range(Range(-3.0, 9.0, 9, whole=True))
    ((0.0, 255.0), None)
    """
    for low, high in _KNOWN:
        if low <= found.low and found.high <= high and (high < 2 or found.high >= 128):
            return low, high
    return None


def _unlike(one: Range, other: Range) -> str:
    """Why two ranges can not be those of images on one scale; nothing if they can."""
    few = 8  # of so few images nobody can tell
    if not one.spread or not other.spread or min(one.rows, other.rows) < few:
        return ""
    both = known_range(one), known_range(other)
    if None not in both and both[0] != both[1]:
        return "another scale"
    for known, wider in zip(both, (other, one), strict=True):
        if (
            known is not None
            and max(known[0] - wider.low, wider.high - known[1]) > (known[1] - known[0]) / 2
        ):
            return "another scale"
    wide, narrow = max(one.spread, other.spread), min(one.spread, other.spread)
    return f"{wide / narrow:.0f} times as wide" if wide >= FACTOR * narrow else ""


def _words(found: Range) -> str:
    return f"{found.low:.6g}..{found.high:.6g}"


def check_rows(table: Table, rows: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
    """Looks at rows that were just read from files; `UserError` names the file or row whose value
    is not finite. Arrays in memory were looked at before (`check_values`)."""
    if _in_memory(table):
        return
    unused = _unused(rows)
    for name, values in rows.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        bad_B = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if unused is not None:
            bad_B &= ~unused
        for row in np.flatnonzero(bad_B):
            value = values[row][~np.isfinite(values[row])].flat[0]
            raise UserError(f"{where(table, int(indices[row]))}: {name} holds {value}; {_MEND}")


def named_splits(expressions: Iterable[str]) -> set[str]:
    """The splits that some expressions name.

    >>> sorted(named_splits(["train[:90%]+extra", "", "train[90%:]"]))
    ['extra', 'train']
    """
    pieces = (piece for text in expressions for piece in text.split("+"))
    return {name for piece in pieces if (name := piece.split("[")[0].strip())}
