"""Plots of curves, and what all plots share: drawn by matplotlib without a display or global state.

A figure is drawn once; the page embeds it as SVG (`svg.py`) and the run's folder gets it as PNG.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtrain.report.metrics_file import is_clock
from jaxtrain.report.page import history
from jaxtrain.report.page.history import Curve, History
from jaxtrain.report.page.style import LIGHT, curve_color
from jaxtrain.report.terminal.tables import clean, rate_text, value_text

if TYPE_CHECKING:  # matplotlib takes a second to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cut = Literal["", "upper", "lower", "zero"]

CURVE_INCHES = (7.2, 3.8)
DPI = 160
"""Pixels an inch of the PNG files; figures have 72, which are the units of the SVG."""
MARGIN = 3
"""What matplotlib leaves free at the edge of a figure, in units of the SVG."""
MOST_NOTES = 120
LABEL_GAP = 0.07
"""The least distance of two labels, as a part of the height of the axes."""
ROUND_STEPS = (1, 2, 2.5, 5, 10)


class Quantity(NamedTuple):
    """Something to plot over the steps: its key in metrics.jsonl, its title, and how a value is
    written."""

    key: str
    title: str
    text: Callable[[float], str]


class Point(NamedTuple):
    """A point of a plot with a note: its place in units of the SVG, the name of its colour (see
    `style.LIGHT`), and the note."""

    x: float
    y: float
    color: str
    note: str


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawn figure: `name` is that of its file, `description` what it shows, in words."""

    name: str
    description: str
    figure: "Figure"
    points: Sequence[Point] = ()


def quantities(histories: Sequence[History]) -> list[Quantity]:
    """What there is to plot: the loss and the metric first, then learning rate, throughput and the
    rest.

    >>> run = History(
    ...     Path("r"),
    ...     {},
    ...     [{"step": 1, "split": "train", "loss": 2.0, "examples_per_second": 9.0}],
    ...     {},
    ... )
    >>> [quantity.title for quantity in quantities([run])]
    ['Loss', 'Examples per second']
    """
    found = {
        key
        for run in histories
        for line in run.metrics
        for key in line
        if key not in ("step", "split", "epoch")
    }
    found = {
        key
        for key in found
        if any(run.series(key, split)[0] for run in histories for split in history.splits([run]))
    }
    metric = next((run.metric for run in histories if run.metric), None)
    first = [
        key for key in ("loss", metric, "learning_rate", "examples_per_second") if key in found
    ]
    others = sorted(key for key in found if key not in first and not is_clock(key))
    return [
        Quantity(key, clean(key.replace("_", " ").capitalize()), _writer_of(key))
        for key in [*first, *others]
    ]


def wants_log(key: str, curves: Sequence[Curve]) -> bool:
    """Whether a loss spans so much that only a logarithmic axis shows its end."""
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    return (
        (history.smaller_is_better(key) or key == "grad_norm")
        and bool(values)
        and min(values) > 0
        and max(values) > 30 * min(values)
    )


def cut_of(key: str) -> Cut:
    """Which extreme values of `key` the axis may leave out so that the rest can be read.

    >>> cut_of("loss"), cut_of("accuracy"), cut_of("examples_per_second"), cut_of("learning_rate")
    ('upper', 'lower', 'zero', '')
    """
    if is_clock(key):
        return "zero"
    if history.smaller_is_better(key) or key == "grad_norm":
        return "upper"
    return "lower" if "accuracy" in key else ""


def axis_range(
    values: Sequence[float], *, log: bool, cut: Cut = "", shown: Sequence[float] = ()
) -> tuple[float, float]:
    """The range of an axis, never of size zero. `cut` leaves out the greatest 2% (`upper`: spikes
    of a loss) or the least 10% (`lower`: dips of an accuracy), or begins at `zero` (a speed); what
    must be `shown`, such as where curves begin, is never left out.

    >>> axis_range([1.0, 1.0], log=False), axis_range([8.0, 9.0], log=False, cut="zero")
    ((0.5, 1.5), (0.0, 9.0))
    """
    ordered = sorted(values)
    low = 0.0 if cut == "zero" else ordered[len(ordered) // 10 if cut == "lower" else 0]
    high = ordered[min(len(ordered) - 1, math.ceil(0.98 * len(ordered))) if cut == "upper" else -1]
    low, high = min([low, *shown]), max([high, *shown])
    if log:
        return (low, high) if high > low * 1.01 else (low / 2, high * 2)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        room = abs(high) / 2 or 1.0
        return low - room, high + room
    # A range that comes near zero begins there.
    return (0.0 if 0 < low < 0.35 * high else low), high


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions moved apart, as little as need be, so that neighbours are `gap` apart and (if
    there is room) in [low, high].

    >>> spread([10.0, 11.0, 50.0], 12.0, 0.0, 100.0)
    [4.5, 16.5, 50.0]
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    blocks: list[tuple[float, int]] = []  # (middle, number of members)
    for index in order:
        blocks.append((min(max(positions[index], low), high), 1))
        while (
            len(blocks) > 1
            and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2 - 1e-9
        ):
            (middle, size), (above, more) = blocks.pop(), blocks.pop()
            half = gap * (size + more - 1) / 2
            merged = (middle * size + above * more) / (size + more)
            blocks.append((max(min(merged, high - half), low + half), size + more))
    placed = [
        middle + gap * (member - (size - 1) / 2)
        for middle, size in blocks
        for member in range(size)
    ]
    return [place for _, place in sorted(zip(order, placed, strict=True))]


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
        clean(f"{curve.label} {value}") if curve.label else ""
        for curve, value in zip(curves, texts, strict=True)
    ]


def last_finite(values: Sequence[float]) -> float:
    """The last finite value, or nan."""
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def draw_curves(histories: Sequence[History]) -> list[Plot]:
    """A plot for each quantity that has a finite value, see `quantities`."""
    plots = []
    for quantity in quantities(histories):
        found = history.curves(histories, quantity.key)
        if any(math.isfinite(value) for curve in found for value in curve.values):
            plots.append(_curve_plot(found, quantity))
    return plots


def write_png(plots: Sequence[Plot], folder: Path) -> None:
    """Writes each plot as `NAME.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        plot.figure.savefig(folder / f"{plot.name}.png", dpi=DPI, metadata={"Software": "jaxtrain"})


def is_ours(path: Path) -> bool:
    """Whether a file is a plot that `write_png` wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"Software\0jaxtrain" in file.read(4096)


def _curve_plot(curves: Sequence[Curve], quantity: Quantity) -> Plot:
    from matplotlib.figure import Figure

    log = wants_log(quantity.key, curves)
    figure = Figure(figsize=CURVE_INCHES, dpi=72, layout="constrained")
    figure.suptitle(quantity.title, x=MARGIN / figure.bbox.width, ha="left")
    axes = figure.add_subplot()
    _set_axes(axes, curves, quantity, log=log)
    # Faint curves first, so that they lie behind.
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        _draw_curve(axes, curve, log=log)
    labels = _label_ends(axes, curves, quantity.text, log=log)
    # The layout is found once; SVG and PNG share it, and the points are where the SVG has them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    description = f"{quantity.title}: {', '.join(labels)}"
    points = [point for curve in curves for point in _points(axes, curve, quantity.text, log=log)]
    return Plot(_file_name(quantity.key), description, figure, points)


def _set_axes(axes: "Axes", curves: Sequence[Curve], quantity: Quantity, *, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    finite = [value for curve in curves for value in curve.values if _can_draw(value, log=log)]
    low, high = axis_range(finite, log=log, cut=cut_of(quantity.key), shown=_ends(curves, log=log))
    if log:
        margin = (high / low) ** 0.04
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        factors = (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=factors, numticks=6))
    else:
        margin = (high - low) * 0.04
        axes.set_ylim(low if low == 0 else low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.text(value)))
    steps = [step for curve in curves for step in curve.steps]
    first, last = min(0, *steps), max(steps)
    margin = 0.012 * ((last - first) or 1)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")


def _ends(curves: Sequence[Curve], *, log: bool) -> list[float]:
    """Where each curve begins and ends, as far as it can be drawn."""
    drawable = ([value for value in curve.values if _can_draw(value, log=log)] for curve in curves)
    return [value for values in drawable if values for value in (values[0], values[-1])]


def _draw_curve(axes: "Axes", curve: Curve, *, log: bool) -> None:
    values = [value if _can_draw(value, log=log) else math.nan for value in curve.values]
    axes.plot(
        curve.steps,
        values,
        color=_hex(curve),
        linewidth=1.1 if curve.faint else 1.25 if curve.color is None else 2,
        alpha=0.4 if curve.faint else 1,
        marker="o" if len(curve.steps) == 1 else None,
        markersize=6,
    )
    # Where a value is not finite the line has a gap, and the upper edge a mark.
    lost = [
        step
        for step, value in zip(curve.steps, curve.values, strict=True)
        if not math.isfinite(value)
    ]
    if lost:
        axes.plot(
            lost[:MOST_NOTES],
            [1.0] * len(lost[:MOST_NOTES]),
            "x",
            color=LIGHT["wrong"],
            markersize=5,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _label_ends(
    axes: "Axes", curves: Sequence[Curve], text: Callable[[float], str], *, log: bool
) -> list[str]:
    """Writes the labels at the ends of the curves, which need no legend then, and moves them apart
    where they would meet; returns them."""
    labels = zip(curves, end_labels(curves, text), strict=True)
    named = [(curve, label, last_finite(curve.values)) for curve, label in labels if label]
    named = [found for found in named if _can_draw(found[2], log=log)]
    low, high = (math.log10(limit) if log else limit for limit in axes.get_ylim())
    heights = [
        ((math.log10(value) if log else value) - low) / ((high - low) or 1) for *_, value in named
    ]
    heights = [min(max(height, 0.0), 1.0) for height in heights]
    gap = min(LABEL_GAP, 1 / max(len(named), 1))
    for (curve, label, _), height in zip(named, spread(heights, gap, 0.0, 1.0), strict=True):
        axes.annotate(
            _short(label, 29),
            (1.015, height),
            xycoords="axes fraction",
            color=_hex(curve),
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
    return [label for _, label, _ in named]


def _points(
    axes: "Axes", curve: Curve, text: Callable[[float], str], *, log: bool
) -> Iterator[Point]:
    """The points of a curve that has few enough to be pointed at."""
    if curve.faint or len(curve.steps) > MOST_NOTES:
        return
    height = axes.figure.bbox.height
    low, high = axes.get_ylim()
    for step, value in zip(curve.steps, curve.values, strict=True):
        label = clean(f"{curve.label}, step {step:,}: ")
        if not math.isfinite(value):
            x, y = axes.get_xaxis_transform().transform((step, 1.0))
            yield Point(x, height - y, "wrong", f"{label}{value}")
        elif _can_draw(value, log=log) and low <= value <= high:
            x, y = axes.transData.transform((step, value))
            yield Point(x, height - y, curve_color(curve.color), f"{label}{text(value)}")


def _can_draw(value: float, *, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _hex(curve: Curve) -> str:
    return LIGHT[curve_color(curve.color)]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def plot_style() -> Iterator[None]:
    """One look for all plots while they are drawn and written; a glyph that the font lacks is a
    box, not a warning."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 13.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["rule"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": LIGHT["rule"],
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.bottom": False,
        "ytick.left": False,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "white",
        "figure.titleweight": "bold",
        "figure.titlesize": 13.5,
        "text.parse_math": False,
        # A curve of many thousand points keeps its shape, and every spike, to within a pixel.
        "path.simplify_threshold": 1.0,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxtrain",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _writer_of(key: str) -> Callable[[float], str]:
    """The function that writes a value of `key` on an axis and at the end of a curve."""
    if "accuracy" in key:
        # Ticks are round; the ends of curves deserve their digits.
        return lambda value: (
            f"{100 * value:.0f}%"
            if abs(value * 100 - round(value * 100)) < 1e-9
            else f"{100 * value:.2f}%"
        )
    if key.endswith("_per_second"):
        return lambda value: rate_text(value).replace(".0", "")
    return lambda value: (
        f"{value:.3g}"
        if abs(value) < 999.5  # beyond, three digits would be written as 1e+03
        else value_text(key, int(value) if float(value).is_integer() else value)
    )


def _file_name(key: str) -> str:
    """A key as a file's name; keys are a user's, so only letters, digits and underscores pass."""
    return (
        "throughput"
        if key == "examples_per_second"
        else "".join(character if character.isalnum() else "_" for character in key)[:80]
    )
