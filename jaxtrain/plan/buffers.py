"""Buffers: the arrays that a compiled program writes to memory, read from its text
(`compiled.as_text()`).

What happens inside a fused kernel stays in registers; only results of the instructions between
kernels have a place in memory.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from jaxtrain.plan import collectives

ALIASES = frozenset(
    (
        *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("optimization-barrier", "all-gather-done", "all-reduce-done", "async-done", "copy-done"),
    )
)
"""Instructions whose result lies where another has put it."""
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_FUSED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
_KERNEL = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True, order=True)
class Buffer:
    """An array of one instruction."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def read(text: str) -> list[Buffer]:
    """The arrays that the program writes, of a shape one, the largest first.

    >>> fused = "%fused (a: f32[9]) -> f32[9] {\\n  %b = f32[9]{0} add(%a, %a)\\n}\\n"
    >>> line = "  ROOT %c = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused\\n"
    >>> entry = "ENTRY %main (x: f32[9]) -> f32[2] {\\n  %x = f32[9]{0} parameter(0)\\n"
    >>> [str(buffer) for buffer in read(fused + entry + line + "}\\n")]
    ['f32[2]']
    """
    found, _ = collectives.computations(text)
    inner = {
        name
        for instructions in found.values()
        for each in instructions
        if each.opcode not in ("call", "async-start")
        for name in _FUSED.findall(each.line)
    }
    buffers = {
        _buffer(dtype, dims)
        for name, instructions in found.items()
        if name not in inner
        for each in instructions
        if each.opcode not in ALIASES
        for dtype, dims in _ARRAY.findall(each.type)
    }
    return sorted(buffers, reverse=True)


def kernels(text: str) -> list[str]:
    """The names of the library kernels that a program calls, such as cuDNN's.

    >>> kernels('%a = f32[] custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax"')
    ['__cudnn$fmhaSoftmax']
    """
    return sorted(set(_KERNEL.findall(text)))


def full_logits(buffers: Sequence[Buffer], tokens: int, rows: int) -> list[Buffer]:
    """Those that can hold a number for each token and each row of the vocabulary's table, however
    their dims are cut.

    >>> [str(each) for each in full_logits([Buffer(96, "f32", (2, 3, 4))], tokens=6, rows=4)]
    ['f32[2,3,4]']
    """
    sizes = [(each, math.prod(each.shape)) for each in buffers]
    return [each for each, size in sizes if size >= tokens * rows and size % rows == 0]


def _buffer(dtype: str, dims: str) -> Buffer:
    shape = tuple(int(dim) for dim in dims.split(",") if dim)
    return Buffer(math.prod(shape) * collectives.bits(dtype) // 8, dtype, shape)
