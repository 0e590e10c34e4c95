"""Plots of predictions: the confusion matrix, the worst mistakes with their images, and what was
predicted of numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtrain.report.page import history
from jaxtrain.report.page.history import History
from jaxtrain.report.page.plots import Plot
from jaxtrain.report.page.style import LIGHT

MOST_POINTS = 5000
"""Points of a scatter; more would hide one another."""
MOST_ANNOTATED = 25
"""Classes up to which the matrix shows its numbers and names."""


def draw_predictions(histories: Sequence[History]) -> list[Plot]:
    """The confusion matrix and the worst mistakes of a single run that has predictions, or their
    scatter by the targets."""
    if len(histories) != 1:
        return []
    plots = []
    found = history.confusion(histories[0].predictions)
    if found is not None:
        plots.append(Plot("confusion", "Confusion", _confusion_figure(*found)))
    if wrong := history.mistakes(histories[0].predictions):
        plots.append(Plot("mistakes", "Worst mistakes", _mistakes_figure(wrong)))
    if (numbers := history.targets(histories[0].predictions)) is not None:
        plots.append(Plot("predictions", "Predictions", _scatter_figure(*numbers)))
    return plots


def _scatter_figure(targets_N: np.ndarray, predictions_N: np.ndarray) -> Any:
    """What was predicted by what was true; of very many numbers every few."""
    from matplotlib.figure import Figure

    every = -(-len(targets_N) // MOST_POINTS)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ends = [float(pick(targets_N)) for pick in (np.min, np.max)]
    axes.plot(ends, ends, color=LIGHT["right"], linewidth=1.2)
    axes.scatter(
        targets_N[::every], predictions_N[::every], s=6, color=LIGHT["c0"], alpha=0.5, linewidths=0
    )
    axes.set_title(f"Predictions of {len(targets_N):,} numbers")
    axes.set_xlabel("target")
    axes.set_ylabel("prediction")
    return figure


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
        1
        - heat
        + heat * np.where(right[..., None], to_rgb(LIGHT["right"]), to_rgb(LIGHT["wrong"])),
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
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}",
                ha="center",
                va="center",
                color=LIGHT["ink"],
            )
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
                picture if picture.ndim == 1 else picture[:, 0], color=LIGHT["c0"], linewidth=1.2
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
            color=LIGHT["wrong"],
        )
    return figure
