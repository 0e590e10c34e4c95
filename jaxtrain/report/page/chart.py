"""Charts as small inline SVG: hairlines, labels at the ends of the curves, colours from CSS
variables, so that a page can be light or dark.

The variables are --ink, --muted, --rule and --c0 to --c7 (see the style sheet in `page.py`).
Geometry that the PNG plots share is here too.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jaxtrain.report.page.history import Curve

Cut = Literal["", "upper", "lower", "zero"]

WIDTH, HEIGHT = 520, 250
TOP, BOTTOM = 14, 26
CHARACTER = 6.7
"""Width of a character of a label, about."""
NUM_COLORS = 8
MOST_POINTS = 600
HOVER_POINTS = 120


def chart(
    curves: Sequence[Curve],
    *,
    title: str,
    text: Callable[[float], str],
    log: bool = False,
    cut: Cut = "",
) -> str:
    """One chart as an `<svg>` element; `text` words a value of the y axis, `cut` says which wild
    values may leave it (see `axis_range`).

    >>> svg = chart(
    ...     [Curve("train", None, [1, 2, 3], [2.0, 1.0, 0.5])], title="Loss", text="{:.1f}".format
    ... )
    >>> svg.startswith("<svg") and ">0.5<" in svg
    True

    Non-finite values are gaps in the line, marked on the upper edge. An empty string if there is
    nothing finite to draw.
    """
    finite = [
        (x, y)
        for curve in curves
        for x, y in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(y) and (y > 0 or not log)
    ]
    if not finite:
        return ""
    low_y, high_y = axis_range([y for _, y in finite], log=log, cut=cut)
    low_x, high_x = min(0, *(x for x, _ in finite)), max(x for x, _ in finite)
    labels = end_labels(curves, text)
    rows = y_ticks(low_y, high_y, log=log)
    left = CHARACTER * max(len(text(value)) for value in rows) + 10
    right = min(CHARACTER * max(map(len, labels)) + 14, 200)
    scale = (lambda y: math.log10(y)) if log else (lambda y: y)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (scale(y) - scale(low_y)) / ((scale(high_y) - scale(low_y)) or 1)
        return left + across * (WIDTH - left - right), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    parts = [f'<svg class="chart" {view}><title>{html.escape(title)}</title>']
    parts += _grid(low_x, high_x, rows, place, text)
    # Faint curves first, so that they lie behind.
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        parts += _line(curve, place, text, log=log)
    parts += _end_labels(curves, labels, place, WIDTH - right + 8, log=log)
    return "".join(parts) + "</svg>"


def axis_range(values: Sequence[float], *, log: bool, cut: Cut = "") -> tuple[float, float]:
    """The range of an axis: never of size zero; by `cut` without a wild `upper` 2% (the spikes of a
    loss), without the lowest 10% (`lower`: what an accuracy was before the first epoch) or always
    from `zero` (a speed).

    >>> axis_range([1.0, 1.0], log=False), axis_range([8.0, 9.0], log=False, cut="zero")
    ((0.5, 1.5), (0.0, 9.0))
    """
    ordered = sorted(values)
    low = 0.0 if cut == "zero" else ordered[len(ordered) // 10 if cut == "lower" else 0]
    high = ordered[min(len(ordered) - 1, math.ceil(0.98 * len(ordered))) if cut == "upper" else -1]
    if log:
        return (low, high) if high > low * 1.01 else (low / 2, high * 2)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        room = abs(high) / 2 or 1.0
        return low - room, high + room
    # A range that comes near zero begins there.
    return (0.0 if 0 < low < 0.35 * high else low), high


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in [low, high], about `count` of them.

    >>> ticks(0, 800)
    [0.0, 200.0, 400.0, 600.0, 800.0]
    """
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [
        float(f"{index * step:.12g}")
        for index in range(first, first + 3 * count)
        if index * step <= high + 1e-9 * span
    ]


def y_ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Ticks of a value axis; on a logarithmic one 1, 2 and 5 of each decade, or the decades
    alone."""
    if not log:
        return ticks(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    fine = [value for value in fine if low <= value <= high]
    coarse = [10.0**power for power in decades if low <= 10.0**power <= high]
    return fine if len(fine) <= 6 else coarse[:: math.ceil(len(coarse) / 6)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved apart, as little as need be, so that neighbours are `gap` apart and (if
    there is room) in [low, high].

    >>> spread([10.0, 11.0, 50.0], 12.0, 0.0, 100.0)
    [4.5, 16.5, 50.0]
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    blocks: list[list[float]] = []  # [middle, number of members]
    for index in order:
        blocks.append([min(max(positions[index], low), high), 1])
        while (
            len(blocks) > 1
            and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2 - 1e-9
        ):
            (middle, size), (above, more) = blocks.pop(), blocks.pop()
            half = gap * (size + more - 1) / 2
            merged = (middle * size + above * more) / (size + more)
            blocks.append([max(min(merged, high - half), low + half), size + more])
    placed = [
        middle + gap * (member - (size - 1) / 2)
        for middle, size in blocks
        for member in range(int(size))
    ]
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def thin(
    steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[list[int], list[float]]:
    """A long series with fewer points that keeps every spike: of each bucket the least and the
    greatest, and the very last."""
    if len(steps) <= most:
        return list(steps), list(values)
    edges = [len(steps) * bucket // (most // 2) for bucket in range(most // 2 + 1)]
    kept = {len(steps) - 1}
    for start, stop in itertools.pairwise(edges):
        # A value that isn't a number compares as neither, so it is kept by name.
        kept |= {next((i for i in range(start, stop) if not math.isfinite(values[i])), start)}
        kept |= {
            min(range(start, stop), key=values.__getitem__),
            max(range(start, stop), key=values.__getitem__),
        }
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def end_labels(curves: Sequence[Curve], text: Callable[[float], str]) -> list[str]:
    """What stands at the end of each curve: its name and last value, or the value alone where there
    is no other curve.

    >>> end_labels(
    ...     [Curve("a", 0, [1], [2.0]), Curve("b", 1, [1], [3.0]), Curve("", 1, [1], [3.0])],
    ...     "{:g}".format,
    ... )
    ['a 2', 'b 3', '']
    """
    texts = [text(last_finite(curve.values)) for curve in curves]
    if len(curves) == 1:
        return texts
    return [
        f"{curve.label} {value}" if curve.label else ""
        for curve, value in zip(curves, texts, strict=True)
    ]


def last_finite(values: Sequence[float]) -> float:
    """The last finite value, or nan."""
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def color(index: int | None) -> str:
    """The CSS colour of a curve.

    >>> color(None), color(9)
    ('var(--muted)', 'var(--c1)')
    """
    return "var(--muted)" if index is None else f"var(--c{index % NUM_COLORS})"


def _grid(
    low_x: int,
    high_x: int,
    rows: Sequence[float],
    place: Callable[..., tuple[float, float]],
    text: Callable,
) -> Iterator[str]:
    start, end = place(low_x, rows[0])[0], place(high_x, rows[0])[0]
    for value in rows:
        _, y = place(low_x, value)
        yield f'<line class="rule" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield (
            f'<text class="tick" x="{start - 8:.1f}" y="{y + 4:.1f}"'
            f' text-anchor="end">{html.escape(text(value))}</text>'
        )
    for value in ticks(low_x, high_x):
        if value == int(value):
            x, _ = place(value, rows[0])
            yield (
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}"'
                f' text-anchor="middle">{value:,.0f}</text>'
            )


def _line(
    curve: Curve,
    place: Callable[..., tuple[float, float]],
    text: Callable[[float], str],
    *,
    log: bool,
) -> Iterator[str]:
    steps, values = thin(curve.steps, curve.values)
    path, pen, points = [], "M", []
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value) and (value > 0 or not log):
            x, y = place(step, value)
            if TOP - 2 <= y <= HEIGHT - BOTTOM + 2:
                points.append((x, y, step, value))
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
            if not math.isfinite(value):
                x, note = place(step, 1.0)[0], f"step {step:,}: {value}"
                yield (
                    f'<text class="bad" x="{x:.1f}" y="10"'
                    f' text-anchor="middle">×<title>{note}</title></text>'
                )
    style = f'style="--c:{color(curve.color)}"'
    kind = "faint" if curve.faint else "back" if curve.color is None else ""
    if len(path) > 1:
        # An inner <svg> clips what leaves the axis, without the ids that a <clipPath> would need.
        box = f"0 {TOP - 3} {WIDTH} {HEIGHT - TOP - BOTTOM + 6}"
        frame = (
            f'<svg y="{TOP - 3}" width="{WIDTH}" height="{HEIGHT - TOP - BOTTOM + 6}"'
            f' viewBox="{box}">'
        )
        yield f'{frame}<path class="curve {kind}" {style} d="{"".join(path)}"/></svg>'
    if len(path) == len(points) == 1:
        yield (
            f'<circle class="dot" {style} cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3.2"/>'
        )
    if len(points) <= HOVER_POINTS and not curve.faint:
        for x, y, step, value in points:
            note = html.escape(f"{curve.label}, step {step:,}: {text(value)}")
            yield (
                f'<circle class="hit" {style} cx="{x:.1f}" cy="{y:.1f}"'
                f' r="5"><title>{note}</title></circle>'
            )


def _end_labels(
    curves: Sequence[Curve], labels: Sequence[str], place: Callable, x: float, *, log: bool
) -> Iterator[str]:
    named = [
        (curve, label, last_finite(curve.values))
        for curve, label in zip(curves, labels, strict=True)
        if label
    ]
    named = [
        (curve, label, place(0, value)[1])
        for curve, label, value in named
        if math.isfinite(value) and (value > 0 or not log)
    ]
    named = [(curve, label, min(max(y, TOP), HEIGHT - BOTTOM)) for curve, label, y in named]
    gap = min(14.0, (HEIGHT - TOP - BOTTOM) / max(len(named), 1))
    heights = spread([y for _, _, y in named], gap, TOP, HEIGHT - BOTTOM) if named else []
    for (curve, label, _), y in zip(named, heights, strict=True):
        shown = label if len(label) <= 29 else label[:28] + "…"
        note = f"<title>{html.escape(label)}</title>" if shown != label else ""
        yield (
            f'<text class="name" style="--c:{color(curve.color)}" x="{x:.1f}"'
            f' y="{y + 4:.1f}">{html.escape(shown)}{note}</text>'
        )
