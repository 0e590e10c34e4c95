"""Image files: how deep their pixels are, how one becomes an array, and whether all of them can be
decoded, which is asked before the training and remembered.

H: height, W: width, C: channels
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.checks import range_flag
from jaxtrain.errors import UserError

Limits = tuple[float, float]
MOST_DECODED = 10_000
"""How many images of the train split are decoded before the training; of the others, all are: what
is wrong with them would be found out at the end."""
MANY = 2_000
"""From so many images on it is said that they are looked at, and remembered that they were."""
_COMPARED_BYTES = 2**28
"""How many bytes of files are compared to find the same image in two splits."""
_SIXTEEN_BITS = (0.0, 65535.0)


def read_image(
    file: pathlib.Path,
    size: tuple[int, int],
    color: str = "rgb",
    *,
    floats: bool = False,
    limits: Limits | None = None,
) -> np.ndarray:
    """Decodes one file as uint8 (H, W, C), or as float32 of 0..1, turned upright as its camera
    says; `limits` is the range of pixels of more than 8 bits, where it is not that of 16."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            # JPEG only: decodes at a fraction of the size if that is still twice the wanted
            image.draft("RGB", (2 * size[1], 2 * size[0]))
            deep = deep_limits(image, limits)
            return fit(ImageOps.exif_transpose(image), size, color, floats=floats, deep=deep)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(file, error)) from error


def _unreadable(file: pathlib.Path, error: Exception) -> str:
    if file.is_file() and not file.stat().st_size:
        return f"{file}: is empty (0 bytes); mend or remove it"
    reason = " ".join(str(error).split())
    return f"{file}: not an image that Pillow reads ({reason}); mend or remove it"


def deep_limits(image: Any, limits: Limits | None = None) -> Limits | None:
    """The range of the pixels of a Pillow image of more than 8 bits; None for 8 bits.

    >>> from PIL import Image
    >>> deep_limits(Image.new("I;16", (2, 2))), deep_limits(Image.new("P", (2, 2)))
    ((0.0, 65535.0), None)

    `UserError` if nobody knows it: the 32 bits of a TIFF may stand for anything.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    if limits is not None:
        return limits
    # Pillow reads gray PNG and PNM of 16 bits as 32-bit integers.
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") or ";16" in _raw(image):
        return _SIXTEEN_BITS
    kind = "floats" if image.mode.startswith("F") else "integers"
    low, high = image.getextrema()
    raise UserError(
        f"32-bit {kind} ({low:g}..{high:g} here) have no known range; give that of all images, e.g."
        f" {range_flag(min(0, low), max(1, high))}"
    )


def _raw(image: Any) -> str:
    """How a file holds its pixels, in Pillow's words, such as `RGB;16B`."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def fit(
    image: Any,
    size: tuple[int, int],
    color: str = "rgb",
    *,
    floats: bool = False,
    deep: Limits | None = None,
) -> np.ndarray:
    """The largest centred part of a Pillow image that has the shape of `size`, resized to it: uint8
    (H, W, C), or float32 of 0..1.

    >>> from PIL import Image
    >>> fit(Image.new("RGB", (40, 20), (1, 2, 3)), (4, 4))[0, 0].tolist()
    [1, 2, 3]
    >>> fit(Image.new("I;16", (4, 4), 65535), (2, 2), floats=True, deep=(0, 65535))[0, 0].tolist()
    [1.0, 1.0, 1.0]

    `deep` is the range of pixels of more than 8 bits; `UserError` if one is out of it.
    """
    from PIL import Image

    if deep is None:
        image = image.convert("RGB" if color == "rgb" else "L")
    else:
        image = Image.fromarray(_unit(np.asarray(image), deep))
    pixels = _cut(image, size)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3 if color == "rgb" else 1, axis=-1)
    if deep is not None and not floats:
        return np.round(pixels * 255).astype(np.uint8)
    return pixels / np.float32(255) if deep is None and floats else pixels


def _cut(image: Any, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    height, width = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def _unit(values_HW: np.ndarray, limits: Limits) -> np.ndarray:
    low, high = limits
    # Also false for nan.
    if not (values_HW.min() >= low and values_HW.max() <= high):
        raise UserError(
            f"holds {values_HW.min():g}..{values_HW.max():g}, which is not in"
            f" --data.image_range={low:g},{high:g}; give the range of all images"
        )
    return ((values_HW.astype(np.float64) - low) / (high - low)).astype(np.float32)


def fit_pixels(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`fit` for an array: uint8 as uint8, anything else as floats on the scale that it has.

    >>> fit_pixels(np.full((4, 8, 1), 700, np.uint16), (2, 2))[..., 0].tolist()
    [[700.0, 700.0], [700.0, 700.0]]
    """
    from PIL import Image

    if pixels_HWC.dtype == np.uint8:
        gray = pixels_HWC.shape[-1] == 1
        image = Image.fromarray(pixels_HWC[..., 0] if gray else pixels_HWC)
        return fit(image, size, "gray" if gray else "rgb")
    channels = [
        _cut(Image.fromarray(channel.astype(np.float32)), size)
        for channel in np.moveaxis(pixels_HWC, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def check_files(
    splits: Mapping[str, Sequence[pathlib.Path]],
    *,
    limits: Limits | None,
    threads: int,
    identity: Mapping[str, Any],
    folder: pathlib.Path | None = None,
) -> tuple[bool, list[str]]:
    """Decodes the files of the splits: whether some have more than 8 bits, and what is to be said.

    `UserError` names the first file that is no image. Of many files it is kept on the disk that
    they were looked at, under their `identity`, which changes when they do.
    """
    chosen = [file for split, files in splits.items() for file in _chosen(split, files)]
    many = len(chosen) >= MANY
    key = json.dumps({"method": 1, "limits": limits, **identity}, sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = pathlib.Path.home() / ".cache" / "jaxtrain" / "images" if folder is None else folder
    path = folder / f"{name}.json"
    if many and (kept := _read_kept(path, key)) is not None:
        return kept
    if many:
        words = f"jaxtrain: looking at {len(chosen):,} images before the training, once"
        print(words, file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor(
        threads or os.cpu_count(), thread_name_prefix="jaxtrain-images"
    ) as pool:
        found = list(pool.map(lambda file: _look(file, limits), chosen))
    deep = any(each == "deep" for each in found)
    notes = _notes(chosen, found) + _shared(splits)
    if many:
        _keep(path, {"key": key, "deep": deep, "notes": notes})
    return deep, notes


def _chosen(split: str, files: Sequence[pathlib.Path]) -> Sequence[pathlib.Path]:
    if split != "train" or len(files) <= MOST_DECODED:
        return files
    return [files[place * len(files) // MOST_DECODED] for place in range(MOST_DECODED)]


def _look(file: pathlib.Path, limits: Limits | None) -> str:
    """Decodes a file, a JPEG at an eighth of its size; what its pixels are."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.draft("RGB", (1, 1))
            deep, upper = deep_limits(image, limits) is not None, ";16" in _raw(image)
            several = getattr(image, "is_animated", False)
            image.load()
            alpha = "A" in image.getbands() and np.asarray(image.getchannel("A")).min() < 255
            if deep and limits is not None:
                _unit(np.asarray(image), limits)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(_unreadable(file, error)) from error
    kinds = {"deep": deep, "upper": upper, "several": several, "alpha": alpha}
    return next((kind for kind, found in kinds.items() if found), "")


def _notes(files: Sequence[pathlib.Path], found: Sequence[str]) -> list[str]:
    words = {
        "upper": "of 16 bits a channel are read by their upper 8 (Pillow)",
        "alpha": "are transparent in places, which is not seen; the colours below are",
        "several": "hold several pictures; the first is taken",
    }
    notes = []
    for kind, text in words.items():
        places = [file for file, each in zip(files, found, strict=True) if each == kind]
        if places:
            notes.append(f"{len(places):,} images {text}, e.g. {places[0]}")
    deep = sum(each == "deep" for each in found)
    if 0 < deep < len(found):
        notes.append(
            f"{deep:,} images have more than 8 bits and {len(found) - deep:,} have 8; each is"
            " scaled to 0..1 by its own range"
        )
    return notes


def _shared(splits: Mapping[str, Sequence[pathlib.Path]]) -> list[str]:
    """A note on images that are in two splits, byte by byte."""
    names, notes = list(splits), []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            same = _same_files(splits[one], splits[other])
            if same:
                first = f"{same[0][0]} is {same[0][1]}"
                notes.append(f"{len(same):,} images of {other} are also in {one}, e.g. {first}")
    return notes


def _same_files(
    one: Iterable[pathlib.Path], other: Iterable[pathlib.Path]
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Pairs of files of the same bytes, each of `other` at most once; none are looked for where
    that would mean to read very much."""
    by_size: dict[int, list[pathlib.Path]] = {}
    for file in one:
        by_size.setdefault(file.stat().st_size, []).append(file)
    likely = [file for file in other if file.stat().st_size in by_size]
    sizes = {file.stat().st_size for file in likely}
    if sum(size * len(by_size[size]) for size in sizes) > _COMPARED_BYTES:
        return []
    known = {_digest(file): file for size in sizes for file in by_size[size]}
    return [(file, known[digest]) for file in likely if (digest := _digest(file)) in known]


def _digest(file: pathlib.Path) -> bytes:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).digest()


def _read_kept(path: pathlib.Path, key: str) -> tuple[bool, list[str]] | None:
    """What a file holds; None if there is none, or if it is damaged or of other images."""
    try:
        kept = json.loads(path.read_bytes())
        return (bool(kept["deep"]), list(kept["notes"])) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all; a disk that takes none is not worth a run."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        pass
