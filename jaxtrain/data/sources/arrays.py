"""Arrays as a data set: an .npz or .npy file, a folder of .npy files (memory-mapped), or a dict of
NumPy arrays in Python.

Names carry the split: `x_train`, `train_images` and plain `x` are of the train split, `x_test` of
the test split. The inputs are the array called image, images, x, inputs or data, the labels that
called label, labels, y, target or targets, unless `image_key` and `label_key` say otherwise; all
other arrays reach the batch under their own names. `interpretation` says what an array is.
"""

import dataclasses
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from jaxtrain import messages
from jaxtrain.data.checks import named_splits
from jaxtrain.data.interpretation import (
    Labels,
    Pixels,
    as_plain,
    check_numeric,
    count_classes,
    labels_of,
    pixels_of,
)
from jaxtrain.data.splits import Splits, choose, digest_of_arrays, newest_change
from jaxtrain.data.table import ArrayTable, ScaledTable, Table
from jaxtrain.errors import UserError
from jaxtrain.fields import Public

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_WORDS = "|".join(_SPLITS)
_NAME = re.compile(rf"(?:(?P<before>{_WORDS})_)?(?P<field>.+?)(?:_(?P<after>{_WORDS}))?")
_USUAL = {
    "image": ("image", "images", "x", "X", "inputs", "data"),
    "label": ("label", "labels", "y", "target", "targets"),
}
_RESERVED = ("id", "label_other", "label_weight")
"""Fields that batches have anyway."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays from a file, a folder or Python.

    >>> splits = Arrays.of(
    ...     {"x": np.zeros((10, 40)), "y": np.arange(10)}, train="train[:80%]", test="train[80%:]"
    ... ).open()
    >>> (
    ...     len(splits.train),
    ...     len(splits.test),
    ...     splits.train.fields["image"].dtype,
    ...     splits.train.num_classes,
    ... )
    (8, 2, dtype('float32'), 10)

    Whole numbers stay whole (int32 on the device), labels that are whole become `label`, others
    `target`, and texts the classes of their sorted names; 64-bit numbers become 32-bit ones, uint8
    images (N, H, W) gain a channel dim. All other arrays keep their names. A folder is never read
    whole.
    """

    path: str = ""
    """An .npz or .npy file, or a folder of .npy files, which are memory-mapped"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""
    image_key: Annotated[str, Public()] = ""
    """Name of the inputs, without its split; empty for the usual names: image, images, x, inputs,
    data"""
    label_key: Annotated[str, Public()] = ""
    """Name of the labels, without its split; empty for the usual names: label, labels, y, target,
    targets"""
    image_range: tuple[float, float] | None = None
    """Lowest and highest value that the inputs can have, e.g. 0,4095 for pixels of 12 bits: they
    become 0..1; none for what their dtype says (uint8 and uint16 have a range, floats are taken as
    they are)"""
    _arrays: Mapping[str, np.ndarray] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], **settings: Any) -> "Arrays":
        """A source over arrays that are in memory already; a path given later (by a flag) takes
        their place."""
        return cls(**settings, _arrays=dict(arrays))

    def open(self) -> Splits:
        """Maps or reads the arrays and sorts them into splits and fields; `UserError` if they do
        not make a data set."""
        origin = f"--data.path={self.path!r}" if self.path else "arrays"
        if self.image_range is not None and not self.image_range[0] < self.image_range[1]:
            low, high = self.image_range
            raise UserError(
                f"--data.image_range={low:g},{high:g}: the first must be less than the second"
            )
        raw = load_arrays(self.path) if self.path or self._arrays is None else self._arrays
        names = tuple(map(str, raw["class_names"])) if "class_names" in raw else None
        raw = {name: as_plain(array) for name, array in raw.items() if name != "class_names"}
        by_split, called = self._sort(raw, origin)
        used = named_splits((self.train, self.validation, self.test))
        tables, notes = _tables(by_split, used, called, names, origin, self.image_range)
        place = pathlib.Path(self.path).expanduser()
        files = place.glob("*.npy") if place.is_dir() else [place]
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_arrays(raw),
            notes=notes,
            modified_ns=newest_change(files) if self.path else None,
            origin=origin,
            ranges=self.image_range is None,
        )

    def _sort(
        self, raw: Mapping[str, np.ndarray], origin: str
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
        """Arrays by split and field, and what the inputs and labels were called."""
        called: dict[str, str] = {}
        sorted_arrays: dict[str, dict[str, np.ndarray]] = {}
        for name, array in raw.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise UserError(f"{origin}: {name!r} cannot name an array; rename it")
            split = _SPLITS[match["before"] or match["after"] or "train"]
            arrays = sorted_arrays.setdefault(split, {})
            if match["field"] in arrays:
                raise UserError(
                    f"{origin}: {name} is not the only {match['field']!r} of split {split};"
                    " rename one"
                )
            arrays[match["field"]] = array
        for split, arrays in list(sorted_arrays.items()):
            for field, key in (("image", self.image_key), ("label", self.label_key)):
                if key and key not in arrays:
                    raise UserError(
                        f"--data.{field}_key={key!r}: no such array in split {split}; valid:"
                        f" {', '.join(arrays)}{messages.did_you_mean(key, arrays)}"
                    )
                found = key or next((usual for usual in _USUAL[field] if usual in arrays), None)
                if found is not None:
                    called.setdefault(field, found)
                    arrays[field] = arrays.pop(found)
            _check_inputs(arrays, split, origin)
        return sorted_arrays, called


def _check_inputs(arrays: Mapping[str, np.ndarray], split: str, origin: str) -> None:
    """`UserError` if there are no inputs, or pixels under a name by which they are not known."""
    inputs = {name: array for name, array in arrays.items() if name not in ("label", "weight")}
    pixels = [
        name
        for name, array in inputs.items()
        if array.ndim >= 3 and array.dtype in (np.uint8, np.uint16)
    ]
    if "image" not in arrays and (not inputs or len(pixels) == 1):
        raise UserError(
            f"{origin}: split {split} has no inputs among {', '.join(arrays)}; name one by"
            " --data.image_key"
        )


def splits_of(path: str) -> set[str]:
    """The splits that a file or folder of arrays has, by the names of its arrays."""
    place = pathlib.Path(path).expanduser()
    if place.is_dir():
        names = [file.stem for file in place.glob("*.npy")]
    elif place.suffix == ".npz" and zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    else:
        return {"train"}
    matches = (_NAME.fullmatch(name) for name in names)
    return {_SPLITS[match["before"] or match["after"] or "train"] for match in matches if match}


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .npy file (read) or of a folder of .npy files (memory-mapped), by
    name; nothing is ever unpickled."""
    if not path:
        raise UserError(
            "--data.path='': no file given; give an .npz or .npy file or a folder of .npy files"
        )
    place = pathlib.Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.npy"))
        if not files:
            raise UserError(f"--data.path={path!r}: no .npy file in this folder")
        return {file.stem: _load(file, path, mmap_mode="r") for file in files}
    if not place.exists():
        near = messages.did_you_mean_path(str(place))
        raise UserError(f"--data.path={path!r}: no such file or folder{near}")
    if place.suffix == ".npy":
        array = _load(place, path, mmap_mode="r")
        return (
            {name: array[name] for name in array.dtype.names}
            if array.dtype.names
            else {"image": array}
        )
    return _load(place, path)


def _load(file: pathlib.Path, path: str, mmap_mode: Any = None) -> Any:
    name = ""
    try:
        opened = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            return opened
        with opened:
            arrays = {}
            for name in opened.files:
                arrays[name] = opened[name]
            return arrays
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        what = file.name + (f", array {name}" if name else "")
        if "Object arrays" in str(error):
            raise UserError(
                f"--data.path={path!r}: {what}: holds Python objects, which are not loaded; save"
                " plain arrays"
            ) from error
        reason = (
            "neither .npy nor .npz"
            if "allow_pickle" in str(error)
            else " ".join(str(error).split())
        )
        raise UserError(
            f"--data.path={path!r}: {what}: not a readable NumPy file ({reason})"
        ) from error


def _tables(
    by_split: Mapping[str, Mapping[str, np.ndarray]],
    used: set[str],
    called: Mapping[str, str],
    names: tuple[str, ...] | None,
    origin: str,
    image_range: tuple[float, float] | None,
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The table of each split; what their arrays are is decided by the train split, or else by the
    first. Of splits that are not used nothing but the length is looked at."""
    if not by_split:
        raise UserError(f"{origin}: holds no arrays; save some, e.g. np.savez(path, x=x, y=y)")
    by_split = {split: by_split[split] for split in sorted(by_split, key=lambda s: s not in used)}
    notes: list[str] = []
    first = "train" if "train" in used & by_split.keys() else next(iter(by_split))
    example = by_split[first]
    pixels, labels = Pixels(), None
    if "image" in example:
        name = called["image"]
        check_numeric(example["image"], f"{origin}: {first}: image")
        pixels, said = pixels_of(example["image"], name, origin, image_range)
        notes += said
    if "label" in example:
        labels, said = labels_of(example["label"], called["label"], names)
        names = labels.names or names
        notes += said
    fields = {
        split: _as_fields(arrays, f"{origin}: {split}", pixels, labels, notes)
        for split, arrays in by_split.items()
        if split in used
    }
    num_classes = count_classes(fields, names, origin)
    tables: dict[str, Table] = {split: ArrayTable(arrays) for split, arrays in by_split.items()}
    for split, arrays in fields.items():
        table = ArrayTable(arrays, num_classes, names, f"{origin}: {split}")
        limits = pixels.limits
        mapped = isinstance(arrays.get("image"), np.memmap)
        tables[split] = ScaledTable(table, *limits) if limits and mapped else table
    return tables, tuple(dict.fromkeys(notes))


def _as_fields(
    arrays: Mapping[str, np.ndarray],
    origin: str,
    pixels: Pixels,
    labels: Labels | None,
    notes: list[str],
) -> dict[str, np.ndarray]:
    """The arrays of one split as fields of a table: of one length, and of numbers."""
    leading = next(name for name in ("image", "label", *arrays) if name in arrays)
    shape = arrays[leading].shape
    if not shape:
        raise UserError(
            f"{origin}: {leading} is a single number; it needs one row an example, as in (N, 4)"
        )
    length = shape[0]
    fields: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        place = f"{origin}: {name}"
        if array.ndim == 0 or len(array) != length:
            if name in ("image", "label") or array.ndim and length == 0:
                raise UserError(
                    f"{place} has shape {array.shape}, {leading} {shape}; both need one row an"
                    " example"
                )
            notes.append(f"{name}: shape {array.shape} is not one row an example; left out")
        elif name in _RESERVED:
            notes.append(f"{name}: a batch has this field already; left out; rename it to use it")
        elif name == "label":
            plan = labels or labels_of(array, name, None)[0]
            fields |= plan.apply(array, place)
        elif array.dtype.kind in "US" and name != "image":
            notes.append(f"{name}: texts ({array.dtype}) are no inputs; left out")
        else:
            check_numeric(array, place)
            fields[name] = _field(array, name, place, pixels, notes)
    return fields


def _field(
    array: np.ndarray, name: str, place: str, pixels: Pixels, notes: list[str]
) -> np.ndarray:
    if name == "image":
        return pixels.apply(array, place)
    if name == "weight" and array.ndim == 1:
        return np.asarray(array, np.float32)
    if array.dtype in (np.uint8, np.uint16) and array.ndim >= 3:
        notes.append(
            f"{name}: {array.dtype} {array.shape[1:]}: neither scaled nor standardized, as only"
            " `image` is; if these are pixels, save them as float32 of 0..1"
        )
    return array
