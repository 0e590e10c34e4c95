"""Image files as a data set: a folder for each class, decoded by Pillow in threads.

    ROOT/CLASS/*.jpg                   one split, train
    ROOT/train/CLASS/*.jpg             splits by folder: train, val (or valid, validation), test

Every image is cut to the centre of the wanted shape and resized, so a table has one size; random
crops belong to augmentation.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Literal

import jax
import numpy as np

from jaxtrain import extras
from jaxtrain.data.checks import named_splits
from jaxtrain.data.sources.image_files import Limits, check_files, read_image
from jaxtrain.data.splits import Splits, choose, digest_of_files, newest_change
from jaxtrain.errors import UserError
from jaxtrain.fields import AtLeast

_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_RENAMED = {name: name for name in _SPLITS} | {
    "training": "train",
    "train_set": "train",
    "trainset": "train",
    "testing": "test",
    "test_set": "test",
    "testset": "test",
    "eval": "val",
    "dev": "val",
}
"""Folders that are splits by another name."""
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Images:
    """A folder for each class, classes in the order of their sorted names."""

    path: str = ""
    """The folder that holds a folder for each class, or train, val and test folders of such"""
    size: tuple[int, int] = (224, 224)
    """Height and width to which images are cut (at the centre) and resized"""
    color: Literal["rgb", "gray"] = "rgb"
    """Three channels or one"""
    image_range: tuple[float, float] | None = None
    """Lowest and highest value of pixels of more than 8 bits, e.g. 0,4095, which become 0..1; none
    for 0..65535 where a file has 16 bits"""
    threads: Annotated[int, AtLeast(0)] = 0
    """Decoding threads; 0 for one a core"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Lists the files, and decodes them once before the training. `UserError` if a folder or a
        file is not what it should be."""
        extras.require("--data=images", "PIL")
        origin = f"--data.path={self.path!r}"
        root = pathlib.Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise UserError(
                f"{origin}: no such folder; give one that holds a folder of images for each class"
            )
        if min(self.size) < 1:
            raise UserError(f"--data.size={self.size[0]},{self.size[1]}: both must be >= 1")
        if self.image_range is not None and not self.image_range[0] < self.image_range[1]:
            low, high = self.image_range
            raise UserError(
                f"--data.image_range={low:g},{high:g}: the first must be less than the second"
            )
        used = named_splits((self.train, self.validation, self.test))
        folders = _split_folders(root, origin, used)
        names = tuple(
            sorted(
                {
                    folder.name
                    for split in folders.values()
                    for folder in _children(split, origin)
                    if folder.is_dir()
                }
            )
        )
        if not names:
            raise UserError(f"{origin}: holds no class folders")
        listed = {
            split: [
                (file, label)
                for label, name in enumerate(names)
                for file in _files(folder / name, origin)
            ]
            for split, folder in folders.items()
        }
        files = {str(file.relative_to(root)): file for rows in listed.values() for file, _ in rows}
        fingerprint, modified_ns = digest_of_files(files), newest_change(files.values())
        order = ("train", "validation", "test")
        in_use = {split: listed[split] for split in order if split in used and split in listed}
        deep, notes = check_files(
            {split: [file for file, _ in rows] for split, rows in in_use.items()},
            limits=self.image_range,
            threads=self.threads,
            identity={"files": fingerprint, "modified_ns": modified_ns, "splits": sorted(in_use)},
        )
        tables = {
            split: ImageTable(
                tuple(file for file, _ in rows),
                np.array([label for _, label in rows], np.int32),
                names,
                self.size,
                self.color,
                self.threads,
                floats=deep,
                limits=self.image_range,
            )
            for split, rows in listed.items()
        }
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=fingerprint,
            notes=(*notes, *_class_notes(in_use, names)),
            modified_ns=modified_ns,
            origin=origin,
        )


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """A table over image files: uint8 images (H, W, C), or float32 of 0..1, decoded when read."""

    files: tuple[pathlib.Path, ...]
    labels_N: np.ndarray
    class_names: tuple[str, ...]
    size: tuple[int, int]
    color: Literal["rgb", "gray"] = "rgb"
    threads: int = 0
    floats: bool = False
    """Whether images are float32 of 0..1, since some have more than 8 bits."""
    limits: Limits | None = None
    """The range of pixels of more than 8 bits, if it is not 0..65535."""

    arrays = None

    @property
    def num_classes(self) -> int:
        """One class a folder."""
        return len(self.class_names)

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 or float32 (H, W, C) and `label` int32."""
        shape = (*self.size, 3 if self.color == "rgb" else 1)
        dtype = np.dtype(np.float32 if self.floats else np.uint8)
        return {
            "image": jax.ShapeDtypeStruct(shape, dtype),
            "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
        }

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Decodes the files at `indices`; `UserError` naming a file that is no image."""
        field = self.fields["image"]
        images = np.empty((len(indices), *field.shape), field.dtype)

        def decode(place: int) -> None:
            images[place] = read_image(
                self.files[indices[place]],
                self.size,
                self.color,
                floats=self.floats,
                limits=self.limits,
            )

        # Pillow frees the interpreter while it decodes and resizes, so threads do use the cores.
        with concurrent.futures.ThreadPoolExecutor(
            self.threads or os.cpu_count(), thread_name_prefix="jaxtrain-images"
        ) as pool:
            for _ in pool.map(decode, range(len(indices))):
                pass
        return {"image": images, "label": self.labels_N[indices]}

    def where(self, index: int) -> str:
        """The file of an example."""
        return str(self.files[index])


def splits_of(root: pathlib.Path) -> set[str] | None:
    """The splits that a folder of images has; None if it seems to be none: neither images nor
    folders of images lie in it."""
    folders = [child for child in root.iterdir() if child.is_dir()]
    if not any(_first_files(root)):
        return None
    return {_SPLITS[folder.name] for folder in folders if folder.name in _SPLITS} or {"train"}


def first_look(root: pathlib.Path) -> tuple[int, bool]:
    """The shorter side that most of some images of a folder have, and whether they are gray."""
    from PIL import Image

    sides, gray = [], []
    for file in _first_files(root):
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
                gray.append(image.mode.startswith(("L", "1", "I", "F")))
        except (OSError, ValueError):
            continue  # whoever opens the set is told its name
    return (int(np.median(sides)), all(gray)) if sides else (1, False)


def _first_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Some image files of a folder, from all of its class folders."""
    files: list[pathlib.Path] = []
    for pattern in ("*", "*/*", "*/*/*"):
        found = (file for file in root.glob(pattern) if file.suffix.lower() in _SUFFIXES)
        files += itertools.islice(found, 20)
    return files


def _split_folders(
    root: pathlib.Path, origin: str, used: Collection[str]
) -> dict[str, pathlib.Path]:
    """The folder of each split; `UserError` for whatever beside them would be left out."""
    children = _children(root, origin)
    folders = {child.name: child for child in children if child.is_dir()}
    found = {name: folder for name, folder in folders.items() if name in _SPLITS}
    if not found:
        near = {name: _RENAMED[name.lower()] for name in folders if name.lower() in _RENAMED}
        if "train" in near.values():
            renamed = ", ".join(f"{name} to {split}" for name, split in near.items())
            raise UserError(
                f"{origin}: {', '.join(near)} would be taken for classes; rename {renamed}"
            )
        _no_images(root, children, origin)
        return {"train": root}
    splits: dict[str, pathlib.Path] = {}
    for name, folder in found.items():
        other = splits.setdefault(_SPLITS[name], folder)
        if other is not folder:
            raise UserError(
                f"{origin}: {other.name} and {name} are folders of one split; put all into one"
            )
    beside = [name for name in folders if name not in found]
    if beside:
        names = ", ".join(beside[:5]) + (f" and {len(beside) - 5} more" * (len(beside) > 5))
        raise UserError(
            f"{origin}: {names} beside {', '.join(found)} would be left out; move class folders"
            " into train, and all else out of the folder"
        )
    _no_images(root, children, origin)
    for split, folder in splits.items():
        if split in used:
            _no_images(folder, _children(folder, origin), origin)
    return splits


def _no_images(folder: pathlib.Path, children: Iterable[pathlib.Path], origin: str) -> None:
    """`UserError` for images that are in no class folder."""
    images = [child for child in children if child.suffix.lower() in _SUFFIXES]
    images = [child for child in images if not child.is_dir()]
    if images:
        count = "1 image is" if len(images) == 1 else f"{len(images):,} images are"
        raise UserError(
            f"{origin}: {count} in no class folder, e.g. {images[0]}; move each into the folder of"
            f" its class, e.g. {folder / 'cat' / images[0].name}"
        )


def _class_notes(
    splits: Mapping[str, Sequence[tuple[pathlib.Path, int]]], names: Sequence[str]
) -> list[str]:
    """Notes on classes that a split has no images of."""
    notes = []
    for split, rows in splits.items():
        there = {label for _, label in rows}
        missing = [name for label, name in enumerate(names) if label not in there]
        if missing and rows:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" * (len(missing) > 5))
            notes.append(f"{split} has no images of class {shown} (of {len(names)} classes)")
    return notes


def _children(folder: pathlib.Path, origin: str) -> list[pathlib.Path]:
    """What lies in a folder, sorted, without hidden files; `UserError` if it cannot be read, or for
    links that lead nowhere."""
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise UserError(f"{origin}: {folder} cannot be read ({error.strerror}); mend it") from error
    for child in children:
        if child.is_symlink() and not _leads_somewhere(child):
            raise UserError(f"{origin}: {child} is a link that leads nowhere; mend or remove it")
    return children


def _leads_somewhere(link: pathlib.Path) -> bool:
    try:
        return link.exists()
    except (OSError, RuntimeError):  # a loop
        return False


def _files(folder: pathlib.Path, origin: str) -> list[pathlib.Path]:
    """The image files of a class, sorted; hidden files are passed over, any other file is an error
    rather than a silent gap."""
    if not folder.is_dir():
        return []
    files = _children(folder, origin)
    for file in files:
        if file.is_dir():
            raise UserError(
                f"{origin}: {file} is a folder in the folder of a class; move its images up, or"
                " remove it"
            )
        if file.suffix.lower() not in _SUFFIXES or not file.is_file():
            raise UserError(
                f"{origin}: {file} is not an image file ({', '.join(_SUFFIXES)}); remove it"
            )
    return files
