"""What an array is: pixels, features, whole numbers (tokens, ids), classes or targets. Decided
once, from the train split, and applied to all splits alike.

N: examples
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain import messages
from jaxtrain.data.checks import Range, array_range, known_range, range_flag
from jaxtrain.data.table import device_dtype, scale_to_unit
from jaxtrain.errors import UserError

_BYTES = (0.0, 255.0)
_IMAGE_NAMES = ("image", "images")
_TARGET_NAMES = ("target", "targets")
_REMEDY = {
    "M": "convert it to numbers, e.g. by (x - x.min()) / numpy.timedelta64(1, 's')",
    "m": "convert it to numbers, e.g. by x / numpy.timedelta64(1, 's')",
    "c": "save its real and imaginary parts as two channels",
    "O": "save plain numbers, or texts as classes",
    "V": "save each of its parts as an array of its own",
}


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How the arrays of inputs become the field `image`."""

    limits: tuple[float, float] | None = None
    """The range that is scaled to 0..1, as float32; None for values that stay what they are."""
    to_bytes: bool = False
    """Whether whole numbers of 0..255 become uint8."""
    channel: bool = False
    """Whether (N, H, W) gains a channel dim."""
    dtype: Any = None
    """What the arrays of the train split hold; those of other splits must, too."""

    def apply(self, array: np.ndarray, place: str) -> np.ndarray:
        """The array as `image`; of a memory map only the shape changes here, and what is scaled is
        scaled when it is read. `UserError` if a value lies out of the range, or if the array is of
        another dtype than that of the train split."""
        check_numeric(array, place)
        other = self.dtype is not None and device_dtype(array.dtype) != device_dtype(self.dtype)
        if other and not (self.to_bytes and array.dtype == np.uint8):
            raise UserError(
                f"{place} is {array.dtype}, that of train {self.dtype}; save both in one dtype and"
                " range"
            )
        if self.channel and array.ndim == 3:
            array = array[..., None]
        limits = _BYTES if self.to_bytes else self.limits
        if limits is None or isinstance(array, np.memmap):
            return array
        found = array_range(array)
        if found.low < limits[0] or found.high > limits[1]:
            raise UserError(
                f"{place}: has values {found.low:g}..{found.high:g}, which are not in"
                f" {limits[0]:g}..{limits[1]:g}; scale all splits alike, or give the whole range,"
                f" e.g. {range_flag(min(found.low, limits[0]), max(found.high, limits[1]))}"
            )
        return array.astype(np.uint8) if self.to_bytes else scale_to_unit(array, *limits)


def pixels_of(
    array: np.ndarray, name: str, origin: str, given: tuple[float, float] | None
) -> tuple[Pixels, list[str]]:
    """What the inputs called `name` are, by the array of the train split, and what is to be said
    of it.

    >>> pixels_of(np.zeros((5, 8, 8), np.uint16), "x", "set.npz", None)[0].limits
    (0.0, 65535.0)
    >>> pixels_of(np.zeros((5, 20), np.int64), "x", "set.npz", None)[0].limits is None
    True

    `given` is the range that the user says pixels have. `UserError` for pixels without a known
    range.
    """
    found, notes = _pixels(array, name, origin, given)
    return dataclasses.replace(found, dtype=array.dtype), notes


def _pixels(
    array: np.ndarray, name: str, origin: str, given: tuple[float, float] | None
) -> tuple[Pixels, list[str]]:
    dtype, rank, kind = array.dtype, array.ndim, array.dtype.kind
    gray = rank == 3 and kind in "iu"
    if given is not None:
        same = dtype == np.uint8 and given == _BYTES
        square = rank == 3 and array.shape[1] == array.shape[2] > 4
        signal = kind == "f" and (square or (rank == 3 and name in _IMAGE_NAMES))
        notes = [_signal_note(array, name)] if signal else []
        return Pixels(None if same else given, channel=gray), notes
    if dtype == np.uint8 or kind == "b":
        # Masks of booleans stay as they are: they are read as 0 and 1.
        return Pixels(channel=gray and kind == "u"), _bytes_notes(array, name)
    if kind == "f":
        return Pixels(), _float_notes(array, name)
    if dtype == np.uint16 and rank >= 3:
        return Pixels((0.0, 65535.0), channel=gray), [_deep_note(array, name)]
    return _whole_numbers(array, name, origin)


def _whole_numbers(array: np.ndarray, name: str, origin: str) -> tuple[Pixels, list[str]]:
    """Integers other than bytes: pixels if they cannot be else, otherwise whole numbers."""
    rank, found = array.ndim, array_range(array)
    in_bytes = found.low >= 0 and found.high <= 255
    channels = rank == 4 and array.shape[-1] in (1, 3, 4)
    surely = channels or (name in _IMAGE_NAMES and rank >= 2)
    what = f"{name}: {array.dtype} {array.shape[1:]} in {found.low:g}..{found.high:g}"
    if in_bytes and (surely or (rank == 3 and found.high >= 128)):
        if isinstance(array, np.memmap):
            return Pixels(_BYTES, channel=rank == 3), [f"{what}: taken as pixels, divided by 255"]
        return Pixels(to_bytes=True, channel=rank == 3), [f"{what}: taken as pixels of uint8"]
    if (surely and rank >= 3) or (array.dtype == np.int16 and rank >= 3):
        raise UserError(
            f"{origin}: {what}: pixels of this type have no known range; give the whole range, e.g."
            f" {range_flag(found.low, max(found.high, found.low + 1))}"
        )
    return Pixels(), [
        (
            f"{what}: whole numbers stay whole (tokens, ids), not standardized; for features save"
            " float32, for pixels give --data.image_range=LOW,HIGH"
        )
    ]


def _bytes_notes(array: np.ndarray, name: str) -> list[str]:
    if array.ndim == 2 and array.dtype == np.uint8 and name not in _IMAGE_NAMES:
        return [
            (
                f"{name}: uint8 {array.shape[1:]}: taken as pixels of 0..255 and standardized; if"
                f" these are tokens or ids, save them as int32"
            )
        ]
    return _layout_notes(array, name)


def _float_notes(array: np.ndarray, name: str) -> list[str]:
    """What floats are taken for, where they look like images."""
    image = array.ndim >= 4 or (array.ndim == 3 and name in _IMAGE_NAMES)
    square = array.ndim == 3 and array.shape[1] == array.shape[2] > 4
    notes = _layout_notes(array, name)
    if image or square:
        found, known = array_range(array), None
        known = known_range(found)
        if known == _BYTES:
            notes.append(
                f"{name}: {array.dtype} in {_text(found)}: taken as they are; --data.image_range="
                "0,255 scales them to 0..1"
            )
        elif known != (0.0, 1.0):
            range_words = "-1..1" if known else f"{_text(found)}, which is no usual range"
            notes.append(f"{name}: {array.dtype} in {range_words}: taken as they are")
    if square or (array.ndim == 3 and image):
        notes.append(_signal_note(array, name))
    return notes


def _signal_note(array: np.ndarray, name: str) -> str:
    height, width = array.shape[1:]
    return (
        f"{name}: {array.dtype} ({height}, {width}): read as a signal of length {height} with"
        f" {width} channels; for gray images save {name}[..., None]"
    )


def _layout_notes(array: np.ndarray, name: str) -> list[str]:
    """A note on images whose channels seem to come first."""
    if array.ndim != 4 or array.shape[1] not in (1, 3, 4) or array.shape[3] in (1, 2, 3, 4):
        return []
    height, width, channels = array.shape[1:]
    return [
        (
            f"{name}: {array.shape[1:]}: read as height {height}, width {width}, {channels}"
            f" channels; if channels come first, save {name}.transpose(0, 2, 3, 1)"
        )
    ]


def _deep_note(array: np.ndarray, name: str) -> str:
    found = array_range(array)
    used = f"; its values are {_text(found)}" if found.high <= 32767 else ""
    other = f", --data.image_range=0,{_power(found.high)} if that is their range" if used else ""
    return f"{name}: uint16: divided by 65535, its whole range{used}{other}"


def _power(value: float) -> int:
    """The smallest 2^n - 1 that is not below a value."""
    return 2 ** max(1, int(value).bit_length()) - 1


def _text(found: Range) -> str:
    return f"{found.low:.6g}..{found.high:.6g}"


def check_numeric(array: np.ndarray, place: str) -> None:
    """`UserError` if an array holds no numbers that a device has."""
    if array.dtype.kind in "uifb":
        return
    remedy = _REMEDY.get(array.dtype.kind)
    raise UserError(
        f"{place} has dtype {array.dtype}; expected integers, floats or booleans"
        + ("" if remedy is None else f"; {remedy}")
    )


@dataclasses.dataclass(frozen=True)
class Labels:
    """How the arrays of labels become the field `label` (classes) or `target` (numbers)."""

    field: str
    """`label` or `target`."""
    both: bool = False
    """Whether whole numbers are also given as `target`: their array has that name."""
    names: tuple[str, ...] | None = None
    """The sorted texts that are mapped to 0, 1, ..., where labels are texts."""

    def apply(self, array: np.ndarray, place: str) -> dict[str, np.ndarray]:
        """The fields that an array of labels gives. `UserError` if it is of another kind than that
        of the train split, or holds a text that is no class there."""
        if _is_text(array) != (self.names is not None):
            raise UserError(
                f"{place} has dtype {array.dtype}, the labels of train"
                f" {'are texts' if self.names is not None else 'are numbers'}; save both alike"
            )
        if self.names is not None:
            return {"label": _numbers_of(array, self.names, place)}
        check_numeric(array, place)
        if self.field == "target":
            return {"target": array if array.dtype.kind == "f" else array.astype(np.float32)}
        if array.dtype.kind == "f":
            raise UserError(
                f"{place} has dtype {array.dtype}, the labels of train are whole numbers; save both"
                " as integers"
            )
        fields = {"target": np.asarray(array, np.float32)} if self.both else {}
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        return {"label": _as_int32(np.asarray(array), place)} | fields


def labels_of(
    array: np.ndarray, name: str, class_names: Sequence[str] | None
) -> tuple[Labels, list[str]]:
    """What the labels called `name` are, by the array of the train split.

    >>> labels_of(np.array([0.5, 1.5]), "y", None)[0].field
    'target'
    >>> labels_of(np.array(["dog", "cat", "dog"]), "y", None)[0].names
    ('cat', 'dog')
    """
    if _is_text(array):
        found = tuple(class_names) if class_names else tuple(sorted(set(_texts(array))))
        return Labels("label", names=found), []
    if array.dtype.kind == "f":
        notes = []
        values = np.asarray(array)
        named = name in _TARGET_NAMES  # whoever says target means one
        whole = np.isfinite(values).all() and (values == np.round(values)).all()
        if values.size and whole and not named:
            low, high = values.min(), values.max()
            notes.append(
                f"{name}: {array.dtype} of whole numbers {low:g}..{high:g}: taken as targets of a"
                " regression, since floats are no classes; for classes save integers"
            )
        return Labels("target"), notes
    return Labels("label", both=name in _TARGET_NAMES and array.dtype.kind in "iu"), []


def as_plain(array: Any) -> np.ndarray:
    """An array of NumPy, memory maps as they are; Python texts (as pandas has them) as NumPy's."""
    array = np.asanyarray(array)
    if isinstance(array, np.ma.MaskedArray):
        raise UserError(
            f"arrays: a masked array of {array.dtype} {array.shape}, whose mask would be lost; give"
            " plain values by filled(), and an array weight with 0 for rows to leave out"
        )
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        return array.astype(str)
    return array


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind in "US"


def _texts(array: np.ndarray) -> list[str]:
    return [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for value in array.reshape(-1).tolist()
    ]


def _numbers_of(array: np.ndarray, names: Sequence[str], place: str) -> np.ndarray:
    """Texts as the numbers of their classes."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    numbers = {text: number for number, text in enumerate(names)}
    found = np.empty(array.size, np.int32)
    for row, text in enumerate(_texts(array)):
        if text not in numbers:
            shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"{place} holds {text!r} in row {row}, which is no class of train; its"
                f" {len(names)} classes are {shown}{messages.did_you_mean(text, names)}"
            )
        found[row] = numbers[text]
    return found.reshape(array.shape)


def _as_int32(labels: np.ndarray, place: str) -> np.ndarray:
    limits = np.iinfo(np.int32)
    if labels.size and (labels.min() < limits.min or labels.max() > limits.max):
        raise UserError(
            f"{place} has values {labels.min()}..{labels.max()}; classes are 0..2147483647; map"
            " them by numpy.unique(y, return_inverse=True)"
        )
    return labels.astype(np.int32)


def count_classes(
    fields: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None, origin: str
) -> int | None:
    """One more than the largest label of all splits, or as many as there are names; None where
    labels are no classes, or several an example."""
    labels = [
        arrays["label"] for arrays in fields.values() if "label" in arrays and len(arrays["label"])
    ]
    if not labels or any(label.ndim != 1 for label in labels):
        return None
    count = 1 + int(max(label.max() for label in labels))
    if names is not None and count > len(names):
        raise UserError(f"{origin}: label {count - 1} has no name; class_names has {len(names)}")
    return len(names) if names is not None else max(count, 0) or None
