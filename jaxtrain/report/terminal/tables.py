"""Tables for the terminal: what a run is made of before its first step, and what came out at its
end; and numbers as people read them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxtrain.messages import bytes_text, scaled


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One line of the parameter summary; `arrays` of the same shape may share it."""

    path: str
    shape: str
    arrays: int
    count: int
    bytes: int


def parameter_rows(parameters: Mapping[str, Any], *, limit: int = 30) -> list[ParameterRow]:
    """The arrays of a model (by path, as `tree.flatten` gives them) in at most about `limit` rows.

    >>> import numpy as np
    >>> layers = {f"block_{i}/kernel": np.zeros((8, 8), np.float32) for i in range(4)}
    >>> parameter_rows(layers, limit=2)
    [ParameterRow(path='block_*/kernel', shape='8×8', arrays=4, count=256, bytes=1024)]

    Too many rows are first merged where paths differ by a number only and shapes agree, then where
    paths begin alike.
    """
    rows = [
        _row(path, "×".join(map(str, array.shape)) or "scalar", [array])
        for path, array in parameters.items()
    ]
    if len(rows) <= limit:
        return rows
    rows = _merge(rows, [(re.sub(r"\d+", "*", row.path), row.shape) for row in rows])
    depth = max((row.path.count("/") for row in rows), default=0)
    while len(rows) > limit and depth > 0:
        rows = _merge(rows, [("/".join(row.path.split("/")[:depth]), "") for row in rows])
        depth -= 1
    return rows


def parameter_table(parameters: Mapping[str, Any], *, limit: int = 30) -> Table:
    """The parameter summary: path, shape, count and bytes of each, and the sum."""
    rows = parameter_rows(parameters, limit=limit)
    table = _table("parameters", "shape", "arrays", "count", "size")
    for row in rows:
        table.add_row(
            clean(row.path), row.shape, f"{row.arrays:,}", f"{row.count:,}", bytes_text(row.bytes)
        )
    total = (
        sum(row.arrays for row in rows),
        sum(row.count for row in rows),
        sum(row.bytes for row in rows),
    )
    table.add_section()
    table.add_row("all", "", f"{total[0]:,}", f"{total[1]:,}", bytes_text(total[2]), style="bold")
    return table


def sharding_table(rows: Sequence[tuple[str, Sequence[int], str, int, str]]) -> Table:
    """Where each parameter lies: path, shape, spec, bytes a device, reason (see `sharding.Row`),
    and the sum; equal layers share a row."""
    groups: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for path, shape, spec, size, why in rows:
        key = (re.sub(r"\d+", "#", path), tuple(shape), spec, why)
        groups.setdefault(key, []).append((path, size))
    table = _table("parameters", "shape", "arrays", "split over", "a device", "why")
    table.columns[-1].justify = "left"
    for (_, shape, spec, why), group in groups.items():
        shown = "×".join(map(str, shape)) or "scalar"
        size = sum(size for _, size in group)
        table.add_row(
            clean(merged_path([path for path, _ in group])),
            shown,
            f"{len(group):,}",
            spec,
            bytes_text(size),
            clean(why),
        )
    table.add_section()
    table.add_row(
        "all", "", f"{len(rows):,}", "", bytes_text(sum(row[3] for row in rows)), "", style="bold"
    )
    return table


def warm_start_table(rows: Sequence[tuple[str, Sequence[int], str, str]]) -> Table:
    """What a warm start took: path, shape, what became of it (taken, resized, new, skipped) and
    where it came from; equal layers share a row."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, shape, what, source in rows:
        key = (re.sub(r"\d+", "#", path), tuple(shape), what, re.sub(r"\d+", "#", source))
        groups.setdefault(key, []).append(path)
    sources = {(path, what): source for path, _, what, source in rows}
    table = _table("warm start", "shape", "arrays", "", "from")
    table.columns[-1].justify = "left"
    # Paths stay whole in a narrow terminal; what may be long is where they came from.
    table.columns[0].no_wrap, table.columns[-1].no_wrap = True, False
    table.columns[-1].overflow = "fold"
    for (_, shape, what, _), paths in groups.items():
        size = "×".join(map(str, shape)) or "scalar"
        source = sources[paths[0], what]
        table.add_row(clean(merged_path(paths)), size, f"{len(paths):,}", what, clean(source))
    return table


def merged_path(paths: Sequence[str]) -> str:
    """Paths that differ in numbers only as one.

    >>> (
    ...     merged_path([f"block{i}/mlp_in/kernel" for i in range(12)]),
    ...     merged_path(["stage0_0/bias", "stage2_0/bias"]),
    ... )
    ('block{0..11}/mlp_in/kernel', 'stage{0,2}_0/bias')

    Of two numbers in a path each is said for itself: not every pair of them need be there.
    """
    parts = [re.split(r"(\d+)", path) for path in paths]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    return "".join(column[0] if len(column) == 1 else _numbers(column) for column in columns)


def comparison_table(rows: Sequence[tuple[str, Sequence[float], float, float, str]]) -> Table:
    """What `--compare_meshes` found, a row a mesh: differences of a free run's losses and of single
    steps' losses and gradients."""
    table = _table(
        "mesh", "loss, free run", "loss, single steps", "gradient, single steps", "first to differ"
    )
    table.columns[-1].justify = "left"
    for mesh, free, loss, gradient, first in rows:
        table.add_row(
            clean(mesh),
            f"{max(free, default=0.0):.1e}",
            f"{loss:.1e}",
            f"{gradient:.1e}",
            clean(first),
        )
    return table


def memory_table(
    parts: Mapping[str, float], *, device_bytes: float | None = None, title: str = "memory a device"
) -> Table:
    """The memory estimate: bytes of each part on one device, their sum, and the share of
    `device_bytes` where it is known."""
    table = _table(title, "size", "share")
    total = sum(parts.values())
    whole = device_bytes or total or 1.0
    for name, size in parts.items():
        table.add_row(clean(name), bytes_text(size), f"{100 * size / whole:.1f}%")
    table.add_section()
    table.add_row(
        "in all" if device_bytes is None else f"in all, of {bytes_text(device_bytes)}",
        bytes_text(total),
        f"{100 * total / whole:.1f}%",
        style="bold",
    )
    return table


def named_values(title: str, rows: Mapping[str, str], *, width: int | None = None) -> Panel:
    """A panel of names and values: what a run is at its start, or what came out at its end."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(clean(name), clean(value))
    return Panel(
        grid,
        title=Text(clean(title), style="bold"),
        title_align="left",
        border_style="dim",
        expand=False,
        padding=(0, 1),
        width=width,
    )


def value_text(name: str, value: float) -> str:
    """A value as people read it: accuracies in percent, others with about five digits.

    >>> (
    ...     value_text("accuracy", 0.9722),
    ...     value_text("loss", 0.123456),
    ...     value_text("learning_rate", 3e-5),
    ...     value_text("loss", float("nan")),
    ... )
    ('97.22%', '0.1235', '3.00e-05', 'nan')
    """
    if not isinstance(value, int | float):
        return clean(str(value))
    if not math.isfinite(value):
        return str(float(value))
    if "accuracy" in name and 0 <= value <= 1:
        return f"{100 * value:.2f}%"
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    # Not "g": digits that come and go would make the live line jump.
    return f"{value:,.{4 if abs(value) < 10 else 2}f}"


def count_text(count: float) -> str:
    """A count in short.

    >>> count_text(94_154), count_text(36_500_000)
    ('94.2 k', '36.5 M')
    """
    return scaled(count, ("", "k", "M", "G", "T")).strip()


def rate_text(rate: float) -> str:
    """Something a second, in short.

    >>> rate_text(48_210.0), rate_text(3.14159)
    ('48.2k', '3.1')
    """
    return scaled(rate, ("", "k", "M", "G")).replace(" ", "")


def duration_text(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> duration_text(7.6), duration_text(3723), duration_text(200_000)
    ('0:07', '1:02:03', '2d 07:33')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def clean(text: str) -> str:
    """Text that can't move the cursor or recolour the terminal: control characters become visible.

    >>> clean("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1]
        for character in str(text)
    )


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            clean(column),
            justify="left" if index == 0 else "right",
            no_wrap=index > 0,
            overflow="fold" if index == 0 else "ellipsis",
        )
    return table


def _numbers(texts: Sequence[str]) -> str:
    numbers = sorted(map(int, texts))
    run = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if run else f"{{{','.join(map(str, numbers))}}}"


def _row(path: str, shape: str, arrays: Sequence[Any]) -> ParameterRow:
    count = sum(math.prod(array.shape) for array in arrays)
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return ParameterRow(path, shape, len(arrays), count, size)


def _merge(rows: Sequence[ParameterRow], keys: Sequence[tuple[str, str]]) -> list[ParameterRow]:
    """Rows with the same key (path, shape) as one, in the order in which they first came."""
    groups: dict[tuple[str, str], list[ParameterRow]] = {}
    for row, key in zip(rows, keys, strict=True):
        groups.setdefault(key, []).append(row)
    return [
        (
            group[0]
            if len(group) == 1
            else ParameterRow(
                *key,
                sum(row.arrays for row in group),
                sum(row.count for row in group),
                sum(row.bytes for row in group),
            )
        )
        for key, group in groups.items()
    ]
