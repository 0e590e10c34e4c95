"""Image files as a data set: a folder for each class, decoded by Pillow in threads.

    ROOT/CLASS/*.jpg                   one split, train
    ROOT/train/CLASS/*.jpg             splits by folder: train, val (or valid, validation), test

Every image is cut to the centre of the wanted shape and resized, so a table has one size; random
crops belong to augmentation.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxtrain import extras
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
    threads: Annotated[int, AtLeast(0)] = 0
    """Decoding threads; 0 for one a core"""
    train: str = "train"
    """Split to train on"""
    validation: str = ""
    """Split to evaluate on while training, e.g. train[90%:]; empty for none"""
    test: str = "test"
    """Split to evaluate on at the end; empty for none"""

    def open(self) -> Splits:
        """Lists the files; nothing is decoded yet. `UserError` if a folder or file is not what it
        should be."""
        extras.require("--data=images", "PIL")
        origin = f"--data.path={self.path!r}"
        root = pathlib.Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise UserError(
                f"{origin}: no such folder; give one that holds a folder of images for each class"
            )
        if min(self.size) < 1:
            raise UserError(f"--data.size={self.size[0]},{self.size[1]}: both must be >= 1")
        folders = {
            _SPLITS[folder.name]: folder for folder in _folders(root) if folder.name in _SPLITS
        } or {"train": root}
        names = tuple(
            sorted({folder.name for split in folders.values() for folder in _folders(split)})
        )
        if not names:
            raise UserError(f"{origin}: holds no class folders")
        tables = {}
        for split, folder in folders.items():
            listed = [
                (file, label)
                for label, name in enumerate(names)
                for file in _files(folder / name, origin)
            ]
            files, labels = zip(*listed, strict=True) if listed else ((), ())
            tables[split] = ImageTable(
                files, np.array(labels, np.int32), names, self.size, self.color, self.threads
            )
        files = {
            str(file.relative_to(root)): file for table in tables.values() for file in table.files
        }
        return choose(
            tables,
            train=self.train,
            validation=self.validation,
            test=self.test,
            fingerprint=digest_of_files(files),
            modified_ns=newest_change(files.values()),
        )


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """A table over image files: uint8 images (H, W, C), decoded when read."""

    files: tuple[pathlib.Path, ...]
    labels_N: np.ndarray
    class_names: tuple[str, ...]
    size: tuple[int, int]
    color: Literal["rgb", "gray"] = "rgb"
    threads: int = 0

    arrays = None

    @property
    def num_classes(self) -> int:
        """One class a folder."""
        return len(self.class_names)

    @property
    def fields(self) -> dict[str, jax.ShapeDtypeStruct]:
        """`image` uint8 (H, W, C) and `label` int32."""
        shape = (*self.size, 3 if self.color == "rgb" else 1)
        return {
            "image": jax.ShapeDtypeStruct(shape, np.dtype(np.uint8)),
            "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
        }

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Decodes the files at `indices`; `UserError` naming a file that is no image."""
        images = np.empty((len(indices), *self.fields["image"].shape), np.uint8)

        def decode(place: int) -> None:
            images[place] = read_image(self.files[indices[place]], self.size, self.color)

        # Pillow frees the interpreter while it decodes and resizes, so threads do use the cores.
        with concurrent.futures.ThreadPoolExecutor(
            self.threads or os.cpu_count(), thread_name_prefix="jaxtrain-images"
        ) as pool:
            for _ in pool.map(decode, range(len(indices))):
                pass
        return {"image": images, "label": self.labels_N[indices]}


def read_image(file: pathlib.Path, size: tuple[int, int], color: str = "rgb") -> np.ndarray:
    """Decodes one file as uint8 (H, W, C), turned upright as its camera says."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            # JPEG only: decodes at a fraction of the size if that is still twice the wanted
            image.draft("RGB", (2 * size[1], 2 * size[0]))
            return fit(ImageOps.exif_transpose(image), size, color)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file}: not an image that Pillow reads ({' '.join(str(error).split())}); mend or"
            " remove it"
        ) from error


def fit(image: Any, size: tuple[int, int], color: str = "rgb") -> np.ndarray:
    """The largest centred part of a Pillow image that has the shape of `size`, resized to it: uint8
    (H, W, C).

    >>> from PIL import Image
    >>> fit(Image.new("RGB", (40, 20), (1, 2, 3)), (4, 4))[0, 0].tolist()
    [1, 2, 3]
    """
    from PIL import Image

    height, width = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    image = image.convert("RGB" if color == "rgb" else "L")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return pixels if color == "rgb" else pixels[..., None]


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _files(folder: pathlib.Path, origin: str) -> list[pathlib.Path]:
    """The image files of a class, sorted; hidden files are passed over, any other file is an error
    rather than a silent gap."""
    if not folder.is_dir():
        return []
    files = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    for file in files:
        if file.suffix.lower() not in _SUFFIXES or not file.is_file():
            raise UserError(
                f"{origin}: {file} is not an image file ({', '.join(_SUFFIXES)}); remove it"
            )
    return files
