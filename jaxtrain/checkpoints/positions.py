"""Position embeddings of images for another number of patches, interpolated in their grid as the
papers of ViT and DeiT do; class tokens are kept apart.

Dims: L places, H rows, W columns, D width.
"""

import dataclasses
import math
import re
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.errors import UserError

RESIZE = "resize"
Grid = tuple[int, int]
"""Rows and columns."""
METHODS = {"bilinear": "linear", "bicubic": "cubic"}
"""The words of a rule, and those of `jax.image.resize`."""
MOST_TOKENS = 2
"""Places before those of the patches: a class token, and DeiT's distillation token."""
_NAME = re.compile(r"(?:^|[/_])pos|Pos")


@dataclasses.dataclass(frozen=True)
class Resize:
    """How one position embedding is interpolated.

    >>> images = None, (16, 16)
    >>> resize = Resize.between("pos", "resize", [1, 5, 8], [1, 17, 8], images=images)
    >>> str(resize), resize.of(np.zeros((1, 5, 8), np.float32)).shape
    ('2x2 -> 4x4 places, bilinear, 1 token kept', (1, 17, 8))
    """

    old: Grid
    new: Grid
    tokens: int
    method: str
    shape: tuple[int, ...]
    """Of the new embedding."""

    @classmethod
    def between(
        cls,
        path: str,
        word: str,
        old: list[int],
        new: list[int],
        *,
        images: tuple[Grid | None, Grid | None] = (None, None),
    ) -> Self:
        """What `resize`, `resize:bicubic`, or `resize:HxW:HxW` (the two grids) means for these two
        shapes: (L, D), (1, L, D) or (1, H, W, D).

        The grid of the new model follows from the size of its images, with square patches; that of
        the old one too, where its run says what it saw, and is taken for square otherwise.
        """
        where = f"--init_rules: {path}: {word}"
        method, grids = _options(word, where)
        if len(old) != len(new) or old[-1] != new[-1] or len(new) not in (2, 3, 4):
            raise UserError(
                f"{where}: {_shown(old)} and {_shown(new)} are no position embeddings of one width;"
                " only their places may differ"
            )
        if len(new) == 4 or (len(new) == 3 and (old[0], new[0]) != (1, 1)):
            rows = (int(old[-3]), int(old[-2])), (int(new[-3]), int(new[-2]))
            return cls(*rows, 0, method, tuple(new))
        places = int(old[-2]), int(new[-2])
        if images[1] is None and not grids:
            raise UserError(
                f"{where}: is for images, and the model sees none; give both grids, e.g."
                " resize:14x14:16x16, or skip it"
            )
        known = grids or tuple(
            _grid(count, image, where) for count, image in zip(places, images, strict=True)
        )
        tokens = [count - math.prod(grid) for count, grid in zip(places, known, strict=True)]
        if tokens[0] != tokens[1] or not 0 <= tokens[0] <= MOST_TOKENS:
            raise UserError(
                f"{where}: {places[0]} places with a grid of {_by(known[0])} have {tokens[0]}"
                f" tokens beside it, {places[1]} with {_by(known[1])} have {tokens[1]}; both must"
                " have the same, 0 to 2; skip it"
            )
        return cls(known[0], known[1], tokens[0], method, tuple(new))

    def of(self, value: np.ndarray) -> np.ndarray:
        """The embedding for the new grid, computed in float32."""
        if self.old == self.new:
            return value.reshape(self.shape)
        width = value.shape[-1]
        flat_LD = np.asarray(value, np.float32).reshape(-1, width)
        grid_HWD = flat_LD[self.tokens :].reshape(*self.old, width)
        # half-pixel centres; smoothed where the grid shrinks
        resized = jax.image.resize(
            jnp.asarray(grid_HWD), (*self.new, width), METHODS[self.method], antialias=True
        )
        whole = np.concatenate([flat_LD[: self.tokens], np.asarray(resized).reshape(-1, width)])
        return whole.reshape(self.shape).astype(value.dtype)

    def __str__(self) -> str:
        kept = f", {self.tokens} token{'s' if self.tokens > 1 else ''} kept" if self.tokens else ""
        return f"{_by(self.old)} -> {_by(self.new)} places, {self.method}{kept}"


def looks_like(path: str, old: list[int], new: list[int]) -> bool:
    """Whether an array is a position embedding by its name, and of one width in both models.

    >>> looks_like("params/pos_embed", [1, 197, 8], [1, 577, 8])
    True
    """
    alike = (
        len(old) == len(new) in (2, 3, 4)
        and old[-1] == new[-1]
        and (len(old) == 2 or old[0] == new[0] == 1)
    )
    return alike and bool(_NAME.search(path))


def _options(word: str, where: str) -> tuple[str, tuple[Grid, ...]]:
    """The method and the two grids that a rule names, if it does."""
    method, grids = "bilinear", []
    for part in word.split(":")[1:]:
        size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", part)
        if size:
            grids.append((int(size[1]), int(size[2])))
        elif part in METHODS:
            method = part
        else:
            raise UserError(
                f"{where}: {part!r} is unknown; valid: {', '.join(METHODS)}, and two grids such as"
                " 14x14:16x16"
            )
    if len(grids) not in (0, 2):
        raise UserError(f"{where}: give no grid or two, the old and the new one")
    return method, tuple(grids)


def _grid(places: int, image: Grid | None, where: str) -> Grid:
    """The grid of so many places, a class token or two left out: square patches of the image, or a
    square where no image is known."""
    for tokens in range(MOST_TOKENS + 1):
        patches = places - tokens
        if patches < 1:
            break
        if image is None:
            side = math.isqrt(patches)
            if side * side == patches:
                return side, side
            continue
        size = math.isqrt(image[0] * image[1] // patches)
        if size and image[0] % size == image[1] % size == 0:
            grid = image[0] // size, image[1] // size
            if math.prod(grid) == patches:
                return grid
    seen = "a square grid" if image is None else f"a grid of square patches of {_by(image)} images"
    raise UserError(
        f"{where}: {places} places are not {seen}; give both grids, e.g. resize:14x14:16x16"
    )


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _shown(shape: list[int]) -> str:
    return f"({','.join(map(str, shape))})"
