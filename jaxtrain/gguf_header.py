"""What a GGUF file says of itself: its fields, and where its tensors lie.

The header is walked here: the reader of the package `gguf` trusts the lengths in it, and a damaged
one makes it count for ever. It also makes an object of each of the 100,000 words of a vocabulary.
"""

import dataclasses
import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain import extras
from jaxtrain.errors import UserError
from jaxtrain.messages import one_line, printable

MAGIC = b"GGUF"
ALIGNMENT = 32
AGAIN = "download it again"
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""The kinds of numbers of the header, by the letters of `struct`."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the header describes it."""

    shape: tuple[int, ...]
    kind: int
    """Number of `gguf.GGMLQuantizationType`."""
    start: int
    """Its first byte in the file."""
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    fields: Mapping[str, Any]
    """By name, such as `llama.block_count`, `tokenizer.ggml.tokens`, `tokenizer.chat_template`."""
    tensors: Mapping[str, Tensor]


def read_header(path: Path) -> Header:
    """All that a file says of itself, checked against its size before anything is allocated."""
    shown = printable(str(path))
    extras.require(shown, "gguf")
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: cannot be read ({one_line(str(error))})") from None
    try:
        with data, memoryview(data) as view:
            return _parsed(view)
    except (struct.error, UnicodeDecodeError, _DamagedError) as error:
        said = str(error) if isinstance(error, _DamagedError) else "it ends in its header"
        raise UserError(f"{shown}: is no whole GGUF file: {said}; {AGAIN}") from None


class _DamagedError(Exception):
    """What is wrong with a header, in words."""


class _Walk:
    """A place in the header, which moves on with all that is read."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def count(self, each: int) -> int:
        """A number of things, which at least must have room for so many bytes each."""
        count = self.number("Q")
        if count * each > len(self.data) - self.place:
            raise _DamagedError(f"it says that {count} more things follow in its header")
        return count

    def string(self) -> str:
        size = self.count(1)
        text = bytes(self.data[self.place : self.place + size]).decode("utf-8", "surrogateescape")
        self.place += size
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise _DamagedError(f"a value of the unknown kind {kind}")
        inner = self.number("I")
        if inner == ARRAY:
            return [self.value(ARRAY) for _ in range(self.count(12))]
        if inner == STRING:
            return [self.string() for _ in range(self.count(8))]
        if inner not in SCALARS:
            raise _DamagedError(f"an array of the unknown kind {inner}")
        size = struct.calcsize(f"<{SCALARS[inner]}")
        count = self.count(size)
        values = struct.unpack_from(f"<{count}{SCALARS[inner]}", self.data, self.place)
        self.place += count * size
        return list(values)


def _parsed(data: memoryview) -> Header:
    walk = _Walk(data)
    if bytes(data[:4]) != MAGIC:
        raise _DamagedError("it does not begin with GGUF")
    walk.place = 4
    version = walk.number("I")
    if version not in (2, 3):
        raise _DamagedError(f"version {version}, known are 2 and 3, little-endian")
    tensors, fields = walk.count(24), walk.count(12)
    found: dict[str, Any] = {}
    for _ in range(fields):
        name = walk.string()
        if name in found:
            raise _DamagedError(f"{printable(name)} is there twice")
        found[name] = walk.value(walk.number("I"))
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = walk.string()
        dims = walk.number("I")
        if dims > 4 or name in infos:
            raise _DamagedError(f"{printable(name)} is there twice, or has {dims} dims")
        shape = tuple(walk.number("Q") for _ in range(dims))[::-1]
        infos[name] = (shape, walk.number("I"), walk.number("Q"))
    alignment = found.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamagedError(f"general.alignment is {alignment}")
    base = -(-walk.place // alignment) * alignment
    return Header(found, _placed(infos, base, len(data)))


def _placed(
    infos: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, size: int
) -> dict[str, Tensor]:
    """The tensors with their bytes, none over another or past the end."""
    sizes = block_sizes()
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind, offset) in infos.items():
        if kind not in sizes:
            raise _DamagedError(f"{printable(name)} is of the unknown kind {kind}")
        block, nbytes = sizes[kind]
        if not shape or shape[-1] % block:
            raise _DamagedError(f"{printable(name)} of {shape} is not made of blocks of {block}")
        tensors[name] = Tensor(shape, kind, base + offset, math.prod(shape) // block * nbytes)
    end, before = base, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise _DamagedError(f"{printable(name)} and {printable(before)} overlap")
        end, before = tensor.start + tensor.nbytes, name
    if tensors and end > size:
        raise _DamagedError(f"its tensors end at byte {end}, it has {size}")
    return tensors


@functools.cache
def block_sizes() -> dict[int, tuple[int, int]]:
    """Numbers and bytes of a block, by the kind of a tensor."""
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
