"""Collectives: what a compiled program sends between its devices in one run, read from its text
(`compiled.as_text()`).

The text is XLA's HLO: computations of one instruction a line. Sizes are taken from the operands of
a collective, never from its own type: an asynchronous `-start` has operands and results in its
type, and would count twice. A computation counts once for each call, and the body of a loop once
for each trip, which XLA writes down where it knows it.

Bytes on the wire are those that each device sends, by the ring algorithm: every device passes on (n
- 1) / n of the whole array to gather or to scatter it, and twice that to reduce it everywhere.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtrain.errors import UserError

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
"""Of a number, where the name of its type does not say it."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_NAME = re.compile(r"%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|called_computations|async_execution_thread_calls)"
    r"=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+),"
    r" false_computation=%?([\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_REPLICAS = re.compile(r"replica_count=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, and how often it runs."""

    kind: str
    bytes: int
    """Of the whole array on one device's side: before a reduction, after a gathering; of all arrays
    if several go together."""
    groups: tuple[tuple[int, ...], ...]
    """Which devices take part with one another; for a permutation each pair (from, to)."""
    count: int
    """How often it runs in one run of the program."""
    dtypes: tuple[str, ...]
    source: str = ""
    """The operation in the model's code, where XLA kept it."""

    @property
    def group_size(self) -> int:
        """How many devices take part with one another."""
        return max(len(group) for group in self.groups)

    @property
    def wire_bytes(self) -> float:
        """What each device sends, over all `count` times."""
        size = self.group_size
        share = {
            "all-reduce": 2 * (size - 1) / size,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, (size - 1) / size)
        return share * self.bytes * self.count

    def crosses_hosts(self, per_host: int) -> bool:
        """Whether it goes from one host to another, where each has `per_host` devices in order."""
        return any(len({device // per_host for device in group}) > 1 for group in self.groups)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    line: str


def read(text: str, *, unknown_trips: int | None = None) -> list[Collective]:
    """All collectives of a compiled program, those that differ in nothing but their place counted
    together.

    >>> add = "%add (a: f32[], b: f32[]) -> f32[] {\\n}\\n"
    >>> entry = "ENTRY %main (x: f32[4]) -> f32[4] {\\n  %x = f32[4]{0} parameter(0)\\n"
    >>> reduce = (
    ...     "  ROOT %r = f32[4]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add\\n}\\n"
    ... )
    >>> [
    ...     (found.kind, found.bytes, found.group_size, found.wire_bytes)
    ...     for found in read(add + entry + reduce)
    ... ]
    [('all-reduce', 16, 8, 28.0)]

    A loop with collectives whose number of trips XLA does not know is a `UserError` unless
    `unknown_trips` says it. Of the branches of a condition the one that sends most is counted.
    """
    program, entry = computations(text)
    devices = math.prod(
        int(found.group(1)) for found in (_PARTITIONS.search(text), _REPLICAS.search(text)) if found
    )
    if entry is None:
        raise UserError("HLO text: no ENTRY computation; give the whole of compiled.as_text()")
    return [
        dataclasses.replace(found, count=count)
        for found, count in _walk(program, entry, devices, unknown_trips, {}).items()
    ]


def wire_bytes(found: Sequence[Collective], *kinds: str) -> float:
    """What each device sends by these kinds of collective, or by all if none is named."""
    return sum(each.wire_bytes for each in found if not kinds or each.kind in kinds)


def computations(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    """The instructions of each computation, and the name of the one that the program begins
    with."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = None, ""
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if not line.startswith(" "):
            opened = _COMPUTATION.match(line)
            if opened and not line.startswith("HloModule"):
                current = opened.group(2)
                found[current] = []
                entry = current if opened.group(1) else entry
        elif " = " in line and current:
            found[current].append(_instruction(line))
    return found, entry


def _instruction(line: str) -> _Instruction:
    left, _, right = line.partition(" = ")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    opcode, _, rest = right[end:].strip().partition("(")
    inside = rest[: _closing("(" + rest) - 2]
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside)) if inside else ()
    return _Instruction(left.split()[-1].lstrip("%"), right[:end], opcode, operands, line)


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one at the start of `text`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _split(text: str) -> Iterator[str]:
    """Parts between the commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]


def _walk(
    computations: dict[str, list[_Instruction]],
    name: str,
    devices: int,
    unknown_trips: int | None,
    known: dict[str, Counter[Collective]],
) -> Counter[Collective]:
    """How often each collective runs in one call of a computation."""
    if name in known:
        return known[name]
    total: Counter[Collective] = Counter()
    types = {each.name: each.type for each in computations.get(name, ())}
    for each in computations.get(name, ()):
        kind = each.opcode.removesuffix("-start")
        if each.opcode.endswith(("-done", "-update")):
            continue  # the other ends of a pair, which may name its computation again
        if kind in KINDS:
            total[_collective(each, kind, types, devices)] += 1
            continue
        branches = [
            names
            for found in _BRANCHES.finditer(each.line)
            for group in found.groups()
            if group
            for names in _names(group)
        ]
        if branches:
            parts = [
                _walk(computations, branch, devices, unknown_trips, known) for branch in branches
            ]
            total.update(
                max(
                    parts,
                    key=lambda part: sum(found.wire_bytes * count for found, count in part.items()),
                )
            )
        for found in _CALLS.finditer(each.line):
            for called in _names(found.group(1) or found.group(2)):
                inner = _walk(computations, called, devices, unknown_trips, known)
                times = _trips(each, unknown_trips) if each.opcode == "while" and inner else 1
                total.update({one: count * times for one, count in inner.items()})
    known[name] = total
    return total


def _names(text: str) -> list[str]:
    return [part.strip().lstrip("%") for part in text.split(",") if part.strip()]


def _trips(loop: _Instruction, unknown_trips: int | None) -> int:
    found = _TRIPS.search(loop.line)
    if found:
        return int(found.group(1))
    if unknown_trips is None:
        raise UserError(
            f"HLO text: loop {loop.name} sends data but has no known number of trips; say it by"
            " unknown_trips="
        )
    return unknown_trips


def _collective(each: _Instruction, kind: str, types: dict[str, str], devices: int) -> Collective:
    groups = _groups(each.line, kind, devices)
    arrays = [array for operand in each.operands for array in _ARRAY.findall(types[operand])]
    size = (
        sum(
            math.prod(int(part.lstrip("<=")) for part in dims.split(",") if part) * bits(dtype)
            for dtype, dims in arrays
        )
        // 8
    )
    whole = size * max(len(group) for group in groups) if kind == "all-gather" else size
    named = re.search(r'op_name="([^"]*)"', each.line)
    return Collective(
        kind,
        whole,
        groups,
        1,
        tuple(sorted({dtype for dtype, _ in arrays})),
        named.group(1) if named else "",
    )


def bits(dtype: str) -> int:
    """Bits of a number of this type: `f8e4m3fn` has 8, `s32` 32."""
    if dtype in BITS:
        return BITS[dtype]
    number = re.match(r"[a-z](\d+)", dtype)
    if number is None:
        raise UserError(f"HLO text: type {dtype!r} is not known")
    return int(number.group(1))


def _groups(line: str, kind: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective, in each of the forms that XLA writes; none given means all
    devices."""
    if kind == "collective-permute":
        found = _PAIRS.search(line)
        assert found is not None, line
        return _listed(found.group(1))
    if found := _MESH.search(line):
        return _over_mesh(*found.groups())
    if found := _IOTA.search(line):
        return tuple(tuple(map(int, group)) for group in _iota(found.group(1)))
    if found := _LISTED.search(line):
        return _listed(found.group(1))
    return (tuple(range(devices)),)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(number) for number in group.split(","))
        for group in re.findall(r"\{([\d, ]+)\}", text)
    )


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: the numbers from 0 on in the shape behind the arrow, transposed, in the
    shape before it."""
    found = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?$", text)
    assert found is not None, text
    shape, source, order = (
        tuple(map(int, part.split(","))) if part else None for part in found.groups()
    )
    assert shape is not None
    source = source or shape
    return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)


def _over_mesh(axes: str, ids: str | None, used: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`: groups along the axes named last;
    `'a':(1)2` is a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", axes)}
    if ids is None:
        order = np.arange(math.prod(sizes.values()))
    elif "T(" in ids or "<=" in ids:
        order = _iota(ids).reshape(-1)
    else:
        order = np.array([int(number) for number in re.findall(r"\d+", ids)])
    chosen = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?", used)
    ]
    # Each axis is cut wherever one of the chosen parts begins or ends.
    cuts = {name: {1, size} for name, size in sizes.items()}
    for name, before, size in chosen:
        cuts[name] |= {before, before * size}
    places = [
        (name, start, end)
        for name, ends in cuts.items()
        for start, end in itertools.pairwise(sorted(ends))
    ]
    grid = order.reshape([end // start for _, start, end in places])
    inner = [
        place
        for name, before, size in chosen
        for place, (axis, start, _) in enumerate(places)
        if axis == name and before <= start < before * size
    ]
    outer = [place for place in range(grid.ndim) if place not in inner]
    groups = grid.transpose(outer + inner).reshape(-1, math.prod(size for _, _, size in chosen))
    return tuple(tuple(map(int, group)) for group in groups)
