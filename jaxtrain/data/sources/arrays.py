"""Arrays as a data set: an .npz or .npy file, a folder of .npy files (memory-mapped), or a dict of
NumPy arrays in Python.

Names carry the split: `x_train`, `train_images` and plain `x` are of the train split, `x_test` of
the test split. The inputs are the array called image, images, x, inputs or data, the labels that
called label, labels, y, target or targets, unless `image_key` and `label_key` say otherwise.
"""

import dataclasses
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from jaxtrain import messages
from jaxtrain.data.splits import Splits, choose, digest_of_arrays, newest_change
from jaxtrain.data.table import ArrayTable
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

    Labels become int32 of shape (N,), 64-bit numbers 32-bit ones, uint8 images (N, H, W) gain a
    channel dim. A folder is never read whole.
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
        raw = load_arrays(self.path) if self.path or self._arrays is None else self._arrays
        names = tuple(map(str, raw["class_names"])) if "class_names" in raw else None
        raw = {name: np.asanyarray(array) for name, array in raw.items() if name != "class_names"}
        by_split = self._sort(raw, origin)
        notes: list[str] = []
        fields = {
            split: _as_fields(arrays, f"{origin}: {split}", notes)
            for split, arrays in by_split.items()
        }
        num_classes = _count_classes(fields, names, origin)
        tables = {split: ArrayTable(arrays, num_classes, names) for split, arrays in fields.items()}
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        place = pathlib.Path(self.path).expanduser()
        files = place.glob("*.npy") if place.is_dir() else [place]
        return choose(
            tables,
            **parts,
            fingerprint=digest_of_arrays(raw),
            notes=tuple(dict.fromkeys(notes)),
            modified_ns=newest_change(files) if self.path else None,
        )

    def _sort(self, raw: Mapping[str, np.ndarray], origin: str) -> dict[str, dict[str, np.ndarray]]:
        """Arrays by split and field."""
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
                    arrays[field] = arrays.pop(found)
            if "image" not in arrays:
                raise UserError(
                    f"{origin}: split {split} has no inputs among {', '.join(arrays)}; name one by"
                    " --data.image_key"
                )
        return sorted_arrays


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


def _as_fields(
    arrays: Mapping[str, np.ndarray], origin: str, notes: list[str]
) -> dict[str, np.ndarray]:
    """The arrays of one split as fields of a table: of one length, numeric, labels (N,) int32,
    images with a channel dim."""
    length = arrays["image"].shape[0] if arrays["image"].ndim else 0
    fields: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != length:
            if name in ("image", "label"):
                raise UserError(
                    f"{origin}: {name} has shape {array.shape}, image {arrays['image'].shape}; both"
                    " need one row an example"
                )
            notes.append(f"{name}: shape {array.shape} is not one row an example; left out")
            continue
        if array.dtype.kind not in "uifb":
            raise UserError(
                f"{origin}: {name} has dtype {array.dtype}; expected integers, floats or booleans"
            )
        fields[name] = array
    if "image" in fields and fields["image"].ndim == 3 and fields["image"].dtype == np.uint8:
        fields["image"] = fields["image"][..., None]
    if "label" in fields:
        fields["label"] = _as_labels(fields["label"], origin)
    return fields


def _as_labels(labels: np.ndarray, origin: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f":
        return labels
    labels = np.asarray(labels)  # labels are small: no need to leave them on the disk
    if labels.size and (labels.min() < 0 or labels.max() >= 2**31):
        raise UserError(
            f"{origin}: label has values {labels.min()}..{labels.max()}; expected 0..2147483647"
        )
    return labels.astype(np.int32)


def _count_classes(
    fields: Mapping[str, Mapping[str, np.ndarray]], names: tuple[str, ...] | None, origin: str
) -> int | None:
    """One more than the largest label of all splits, or as many as there are names."""
    labels = [
        arrays["label"] for arrays in fields.values() if "label" in arrays and len(arrays["label"])
    ]
    if not labels or any(label.ndim != 1 or label.dtype.kind == "f" for label in labels):
        return None
    count = 1 + int(max(label.max() for label in labels))
    if names is not None and count > len(names):
        raise UserError(f"{origin}: label {count - 1} has no name; class_names has {len(names)}")
    return len(names) if names is not None else count
