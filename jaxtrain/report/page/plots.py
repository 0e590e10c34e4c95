"""Plots: the curves, the confusion matrix and the worst mistakes as PNG files, drawn by matplotlib
without a display or global state."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.report.metrics_file import is_clock
from jaxtrain.report.page import history
from jaxtrain.report.page.chart import (
    Cut,
    axis_range,
    end_labels,
    last_finite,
    spread,
    thin,
    ticks,
    y_ticks,
)
from jaxtrain.report.page.history import Curve, History
from jaxtrain.report.terminal.tables import rate_text, value_text

INK, MUTED, RULE = "#1c1e21", "#6a7078", "#e3e3de"
RIGHT, WRONG = "#2f6fb0", "#d2553f"
PALETTE = ("#2463a8", "#c2571a", "#1f7f5c", "#8348a8", "#b03052", "#7a6a10", "#1b7f92", "#5c6470")
DPI = 160
MOST_ANNOTATED = 25

Panel = tuple[str, str, Callable[[float], str]]


def panels(histories: Sequence[History]) -> list[Panel]:
    """What there is to plot: (key, title, how to word a value), the loss and the metric first, then
    rate, throughput and the rest.

    >>> run = History(
    ...     Path("r"),
    ...     {},
    ...     [{"step": 1, "split": "train", "loss": 2.0, "examples_per_second": 9.0}],
    ...     {},
    ... )
    >>> [title for _, title, _ in panels([run])]
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
        if any(run.series(key, split)[0] for run in histories for split in history.SPLITS)
    }
    metric = next((run.metric for run in histories if run.metric), None)
    first = [
        key for key in ("loss", metric, "learning_rate", "examples_per_second") if key in found
    ]
    others = sorted(key for key in found if key not in first and not is_clock(key))
    return [(key, key.replace("_", " ").capitalize(), _wording(key)) for key in [*first, *others]]


def wants_log(key: str, curves: Sequence[Curve]) -> bool:
    """Whether a loss spans so much that only a logarithmic axis shows its end."""
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    return (
        history.smaller_is_better(key)
        and bool(values)
        and min(values) > 0
        and max(values) > 30 * min(values)
    )


def cut_of(key: str) -> Cut:
    """Which wild values may leave the chart of `key` so that the rest can be read.

    >>> cut_of("loss"), cut_of("accuracy"), cut_of("examples_per_second"), cut_of("learning_rate")
    ('upper', 'lower', 'zero', '')
    """
    if is_clock(key):
        return "zero"
    return (
        "upper"
        if history.smaller_is_better(key) or key == "grad_norm"
        else "lower"
        if "accuracy" in key
        else ""
    )


def write_plots(histories: Sequence[History], folder: Path) -> list[Path]:
    """Writes what can be drawn into `folder`: loss.png, accuracy.png, learning_rate.png,
    throughput.png, and of a single run confusion.png and mistakes.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    with _style():
        for key, title, text in panels(histories):
            found = history.curves(histories, key)
            if any(math.isfinite(value) for curve in found for value in curve.values):
                figures[_file_name(key)] = _curve_figure(
                    found, title, text, log=wants_log(key, found), cut=cut_of(key)
                )
        if len(histories) == 1:
            found = history.confusion(histories[0].predictions)
            if found is not None:
                figures["confusion"] = _confusion_figure(*found)
            if wrong := history.mistakes(histories[0].predictions):
                figures["mistakes"] = _mistakes_figure(wrong)
        paths = [folder / f"{name}.png" for name in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            figure.savefig(path, dpi=DPI)
    return paths


def _curve_figure(
    curves: Sequence[Curve], title: str, text: Callable[[float], str], *, log: bool, cut: Cut
) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    finite = [
        value
        for curve in curves
        for value in curve.values
        if math.isfinite(value) and (value > 0 or not log)
    ]
    low, high = axis_range(finite, log=log, cut=cut)
    margin = (high / low) ** 0.04 if log else (high - low) * 0.04
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(
        (low / margin, high * margin) if log else (low if low == 0 else low - margin, high + margin)
    )
    axes.yaxis.set_major_locator(FixedLocator(y_ticks(low, high, log=log)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    end = max(step for curve in curves for step in curve.steps)
    axes.xaxis.set_major_locator(
        FixedLocator([tick for tick in ticks(0, end) if tick == int(tick)])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")
    for curve in sorted(curves, key=lambda curve: not curve.faint):
        steps, values = thin(
            curve.steps,
            [
                value if math.isfinite(value) and (value > 0 or not log) else math.nan
                for value in curve.values
            ],
        )
        shade = MUTED if curve.color is None else PALETTE[curve.color % len(PALETTE)]
        width = 0.8 if curve.faint else 1.1 if curve.color is None else 1.9
        axes.plot(
            steps,
            values,
            color=shade,
            linewidth=width,
            alpha=0.35 if curve.faint else 1,
            marker="o" if len(steps) == 1 else None,
            markersize=5,
        )
    _label_ends(axes, curves, text, log=log)
    return figure


def _label_ends(
    axes: Any, curves: Sequence[Curve], text: Callable[[float], str], *, log: bool
) -> None:
    """Names at the ends of the curves instead of a legend, moved apart where they would meet."""
    named = [
        (curve, label, last_finite(curve.values))
        for curve, label in zip(curves, end_labels(curves, text), strict=True)
        if label
    ]
    named = [
        (curve, label, value)
        for curve, label, value in named
        if math.isfinite(value) and (value > 0 or not log)
    ]
    low, high = (math.log10(limit) if log else limit for limit in axes.get_ylim())
    heights = [
        ((math.log10(value) if log else value) - low) / ((high - low) or 1) for *_, value in named
    ]
    heights = [min(max(height, 0.0), 1.0) for height in heights]
    for (curve, label, _), height in zip(
        named, spread(heights, 0.065, 0.0, 1.0) if named else [], strict=True
    ):
        shade = MUTED if curve.color is None else PALETTE[curve.color % len(PALETTE)]
        label = label if len(label) <= 29 else label[:28] + "…"
        axes.annotate(
            label,
            (1.01, height),
            xycoords="axes fraction",
            color=shade,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Any:
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    size = len(names)
    inches = min(max(0.48 * size + 1.6, 4.2), 12)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axes = figure.add_subplot()
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = np.eye(size, dtype=bool)
    # What is right by its share of the label, what is wrong by comparison with the commonest
    # mistake, as on the page.
    worst = max(int(counts[~right].max(initial=0)), 1)
    heat = np.where(
        right, 0.45 * counts / total, np.where(counts > 0, 0.15 + 0.6 * counts / worst, 0.0)
    )[..., None]
    axes.imshow(
        1 - heat + heat * np.where(right[..., None], to_rgb(RIGHT), to_rgb(WRONG)),
        interpolation="nearest",
    )
    axes.set_title(
        f"Confusion: {int(counts.sum() - np.trace(counts)):,} of {int(counts.sum()):,} wrong"
    )
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if size <= MOST_ANNOTATED:
        short = [name if len(name) <= 14 else name[:13] + "…" for name in names]
        axes.set_xticks(range(size), short, rotation=90 if max(map(len, short)) > 3 else 0)
        axes.set_yticks(range(size), short)
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=INK)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def _mistakes_figure(mistakes: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    columns = min(len(mistakes), 6)
    rows = math.ceil(len(mistakes) / columns)
    figure = Figure(figsize=(1.35 * columns + 0.3, 1.75 * rows + 0.5), layout="constrained")
    figure.suptitle("Worst mistakes: prediction (label)", x=0.01, ha="left")
    pictures = history.grey(np.stack([mistake["image"] for mistake in mistakes]))
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index >= len(mistakes):
            continue
        picture = pictures[index]
        if picture.ndim <= 2:
            axes.plot(
                picture if picture.ndim == 1 else picture[:, 0], color=PALETTE[0], linewidth=1.2
            )
        else:
            axes.imshow(
                picture[..., :3] if picture.shape[-1] >= 3 else picture[..., 0],
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
        words = [mistakes[index][key] for key in ("prediction", "label")]
        axes.set_title(
            "{} ({})".format(*(word if len(word) <= 12 else word[:11] + "…" for word in words)),
            loc="center",
            color=WRONG,
        )
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """One look for all plots, for the time of drawing only; a glyph that the font lacks is a box,
    not a warning."""
    import matplotlib

    look = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "figure.facecolor": "white",
        "text.parse_math": False,
        "figure.titleweight": "bold",
        "figure.titlesize": 10,
    }
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _wording(key: str) -> Callable[[float], str]:
    if "accuracy" in key:
        # Ticks are round; the ends of curves deserve their digits.
        return lambda value: (
            f"{100 * value:.0f}%"
            if abs(value * 100 - round(value * 100)) < 1e-9
            else f"{100 * value:.2f}%"
        )
    if key.endswith("_per_second"):
        return lambda value: rate_text(value).replace(".0", "")
    return lambda value: f"{value:.3g}" if abs(value) < 1e4 else value_text(key, float(value))


def _file_name(key: str) -> str:
    """A key as a file's name; keys are a user's, so only letters, digits and underscores pass."""
    return (
        "throughput"
        if key == "examples_per_second"
        else "".join(character if character.isalnum() else "_" for character in key)[:80]
    )
