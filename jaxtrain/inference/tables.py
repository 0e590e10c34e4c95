"""Inputs from files, without labels: an .npz or .npy file, a folder of .npy files, an image or a
folder of images; or a split of the data that a run was trained on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain import extras, messages
from jaxtrain.data.sources import arrays as array_files
from jaxtrain.data.sources import images as image_files
from jaxtrain.data.sources.labelled_text import LabelledText
from jaxtrain.data.table import Table
from jaxtrain.data.text.protocol import Tokenizer
from jaxtrain.errors import UserError
from jaxtrain.inference.inputs import Inputs

SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABELS = ("label", "labels", "y", "target", "targets", "weight")
"""Names of arrays that say what a model should answer: nothing here reads them."""
USUAL = ("image", "images", "x", "X", "inputs", "data")
"""Names that the field `image` has in files."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """Rows to predict, and what they are called."""

    table: Table
    names: tuple[str, ...] | None
    """The file of each row, where each is a file of its own."""
    what: str
    """In words, for the terminal."""


def open_path(
    path: str,
    inputs: Inputs,
    *,
    source: Any = None,
    split: str = "",
    image_key: str = "",
    tokenizer: Tokenizer | None = None,
) -> Opened:
    """The rows in a file or folder; `source` is the data of the run, whose settings (a range of
    pixels, the name of the inputs) hold here too; `tokenizer` is the one that a run on texts was
    trained with. `UserError` if the model cannot take them."""
    place, flag = Path(path).expanduser(), f"--data.path={messages.printable(path)}"
    if not place.exists():
        raise UserError(f"{flag}: no such file or folder{messages.did_you_mean_path(str(place))}")
    try:
        if isinstance(source, LabelledText) and place.suffix not in (".npz", ".npy"):
            return _texts(path, source, tokenizer, split)
        if place.is_dir() and not any(place.glob("*.npy")):
            return _images(place, sorted(_walk(place)), inputs, source)
        if place.suffix.lower() in IMAGE_SUFFIXES:
            return _images(place.parent, [place], inputs, source)
        return _arrays(path, inputs, source, split, image_key)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("--data.") else f"{flag}: {text}") from error


def of_run(source: Any, split: str, fingerprint: str) -> Opened:
    """A split of the data of a run: as asked for, or the test split, or the validation split."""
    try:
        splits = source.open()
    except UserError as error:
        raise UserError(f"the data of the run: {error}; or give --data.path=FILE") from error
    there = {name: getattr(splits, name) for name in SPLITS if getattr(splits, name) is not None}
    if split and split not in there:
        raise UserError(
            f"--data.split={split}: the data of the run has {', '.join(there)}"
            f"{messages.did_you_mean(split, there)}"
        )
    if splits.fingerprint != fingerprint:
        messages.warn("the data is not what it was when the run was trained")
    chosen = split or ("test" if "test" in there else "validation")
    if chosen not in there:
        raise UserError("the run has no test split; give --data.path, or --data.split=train")
    return Opened(there[chosen], None, f"its {chosen} split")


def _texts(path: str, source: LabelledText, tokenizer: Tokenizer | None, split: str) -> Opened:
    """Texts in a table or a folder, read as those of the run were."""
    if tokenizer is None:
        raise UserError(
            "holds texts, and the run kept no tokenizer (an older version wrote it); go on with the"
            " run for one step, which keeps it"
        )
    if split:
        raise UserError(f"--data.split={split}: texts of a file are all taken; drop it")
    table, places, notes = source.unlabelled(path, tokenizer)
    for note in notes:
        messages.warn(note)
    return Opened(table, tuple(places), messages.counted(len(table), "text"))


def _walk(folder: Path) -> list[Path]:
    """The image files in a folder and those below it; `UserError` for any other file."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(
                f"{file} is not an image file ({', '.join(IMAGE_SUFFIXES)}); remove it, or give a"
                " folder of images, an .npz or an .npy file"
            )
        found.append(file)
    if not found:
        raise UserError("holds neither images nor .npy files; give a folder of either")
    return found


def _images(root: Path, files: list[Path], inputs: Inputs, source: Any) -> Opened:
    """Image files, cut and resized to what the model takes."""
    extras.require("images", "PIL")
    [name, *more] = inputs.fields
    field = inputs.fields[name]
    if more or len(field.shape) != 3 or field.shape[-1] not in (1, 3):
        shapes = ", ".join(f"{name} {each.shape}" for name, each in inputs.fields.items())
        raise UserError(f"holds images; the model takes {shapes}; give an .npz file")
    settings: dict[str, Any] = {}
    if field.dtype.kind == "f":
        settings = {"floats": True, "limits": getattr(source, "image_range", None)}
    table = image_files.ImageTable(
        tuple(files),
        np.zeros(len(files), np.int32),
        (),
        (field.shape[0], field.shape[1]),
        "gray" if field.shape[2] == 1 else "rgb",
        **settings,
    )
    names = tuple(str(file.relative_to(root)) for file in files)
    count = "1 image" if len(files) == 1 else f"{len(files)} images"
    return Opened(_Renamed(table, name), names, count)


@dataclasses.dataclass(frozen=True)
class _Renamed:
    """Images under the name of the model's field."""

    table: Table
    name: str

    arrays = None
    num_classes = None
    class_names = None

    @property
    def fields(self) -> Mapping[str, Any]:
        return {self.name: self.table.fields["image"]}

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: self.table.read(indices)["image"]}


def _arrays(path: str, inputs: Inputs, source: Any, split: str, image_key: str) -> Opened:
    """Arrays, understood as the run's own arrays were; labels are left out."""
    raw = array_files.load_arrays(path)
    settings: dict[str, Any] = {"validation": "", "test": ""}
    if isinstance(source, array_files.Arrays):
        kept = ("image_key", "image_range")
        settings |= {name: getattr(source, name) for name in kept if hasattr(source, name)}
    settings["image_key"] = image_key or settings.get("image_key", "")
    kept = _inputs_of(raw, inputs, settings["image_key"])
    found: dict[str, Table] = {}
    for word in [split] if split else SPLITS:
        try:
            found[word] = array_files.Arrays.of(kept, train=word, **settings).open().train
        except UserError as error:
            text = str(error).replace("--data.train=", "--data.split=").replace("arrays: ", "")
            if split or "unknown split" not in text:
                raise UserError(text) from error
    if len(found) > 1:
        raise UserError(f"holds {' and '.join(found)}; choose one, e.g. --data.split=test")
    [(word, table)] = found.items()
    return Opened(table, None, f"{len(table)} rows of {path}{f' ({word})' if split else ''}")


def _inputs_of(
    raw: Mapping[str, np.ndarray], inputs: Inputs, image_key: str
) -> dict[str, np.ndarray]:
    """The arrays that the model may take, by their names in the file; a single one is what it
    takes, whatever its name."""
    known = {*inputs.fields, *(USUAL if "image" in inputs.fields else ()), image_key} - {""}
    named = {name: array for name, array in raw.items() if _field_of(name) in known}
    if named:
        return named
    others = [name for name in raw if _field_of(name) not in (*LABELS, "class_names")]
    if len(others) == 1 and len(inputs.fields) == 1 and not image_key:
        return {next(iter(inputs.fields)): raw[others[0]]}
    raise UserError(
        f"holds {', '.join(raw)}; the model takes {', '.join(inputs.fields)}; name the array so, or"
        " say --data.image_key=NAME"
    )


def _field_of(name: str) -> str:
    """The field that a name in a file means, without its split.

    >>> _field_of("x_test"), _field_of("train_images")
    ('x', 'images')
    """
    words = ("train", "validation", "valid", "val", "dev", "test")
    for word in words:
        name = name.removeprefix(f"{word}_").removesuffix(f"_{word}")
    return name
