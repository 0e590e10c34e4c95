"""A run read back from its folder: configuration, metrics and predictions, and the curves that can
be drawn from them.

What is missing or malformed is left out of the report; a folder that holds no run at all is an
error.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.report import changes_file
from jaxtrain.report.changes_file import Change
from jaxtrain.report.metrics_file import is_clock, read_metrics, read_samples

SPLITS = ("train", "validation", "test")
"""The sets that any run may have; others bear the names that --evaluate gave them."""
NOT_SETTINGS = (
    *("compare_meshes", "compare_steps", "processes", "process", "coordinator", "hang_seconds"),
    *("max_restarts", "workdir", "resume", "from_run", "allow_config_change", "force_unlock"),
    *("eval_only", "profile_steps", "traceback", "checkpoint", "rewind"),
)
"""What says how one start behaved, and nothing of what was trained."""
NOT_METRICS = ("step", "split", "epoch", "tokens", "loss", "learning_rate", "grad_norm")
MOST_CLASSES = 5000


@dataclasses.dataclass(frozen=True)
class History:
    """One run: `run` is its run.json, `metrics` its lines, `predictions` the arrays of
    predictions.npz (empty if there are none)."""

    folder: Path
    run: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    predictions: Mapping[str, np.ndarray]
    samples: Sequence[Mapping[str, Any]] = ()
    """The lines of its samples.jsonl: `step`, `prompt`, `text`."""
    changes: Sequence[Change] = ()
    """Its changes.jsonl: what was changed while it trained."""

    @property
    def name(self) -> str:
        """What the run calls itself, or its folder's name."""
        return str(self.run.get("name") or self.folder.name)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration with dotted names."""
        return flat(self.run.get("config"))

    @property
    def metric(self) -> str | None:
        """The first value besides the loss that is a measure of quality, `accuracy` if there is
        one."""
        keys = [key for line in self.metrics for key, value in line.items() if _is_number(value)]
        known = dict.fromkeys(key for key in keys if key not in NOT_METRICS and not is_clock(key))
        return "accuracy" if "accuracy" in known else next(iter(known), None)

    def series(self, key: str, split: str) -> tuple[list[int], list[float]]:
        """Steps and values of `key`; non-finite values are kept."""
        lines = [
            line
            for line in self.metrics
            if line.get("split") == split
            and _is_number(line.get(key))
            and _is_number(line.get("step"))
        ]
        return [int(line["step"]) for line in lines], [float(line[key]) for line in lines]

    def last(self, key: str, split: str) -> float | None:
        """The last value, or None."""
        return next(reversed(self.series(key, split)[1]), None)

    def best(self, key: str, split: str) -> tuple[int, float] | None:
        """Step and value of the best: the smallest loss or error, the greatest of anything else;
        None if none is finite."""
        pairs = [
            (step, value)
            for step, value in zip(*self.series(key, split), strict=True)
            if math.isfinite(value)
        ]
        return (min if smaller_is_better(key) else max)(
            pairs, key=lambda pair: pair[1], default=None
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a plot: its label, the number of its colour (None is gray), and whether it is
    drawn faint, behind the others."""

    label: str
    color: int | None
    steps: Sequence[int]
    values: Sequence[float]
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs with one configuration but for the seed: the settings in which it differs from other
    groups, and the places of its runs among all."""

    settings: Mapping[str, Any]
    runs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """The mean of some runs, their sample standard deviation (n - 1; None for a single one), and
    how many they are."""

    mean: float
    deviation: float | None
    count: int


def statistic(values: Sequence[float | None]) -> Statistic | None:
    """What is to be said of the values that are there; None if there are none.

    >>> statistic([1.0, 3.0, None])
    Statistic(mean=2.0, deviation=1.4142135623730951, count=2)

    One value that is not finite makes the mean one: runs that diverged are not left out.
    """
    there = np.array([value for value in values if value is not None], np.float64)
    if not len(there):
        return None
    if not np.isfinite(there).all():
        return Statistic(math.nan, None if len(there) == 1 else math.nan, len(there))
    deviation = float(there.std(ddof=1)) if len(there) > 1 else None
    return Statistic(float(there.mean()), deviation, len(there))


def groups(histories: Sequence[History]) -> list[Group]:
    """The runs by configuration, the seed left out, in the order of their first run.

    >>> runs = [
    ...     History(Path("r"), {"config": {"seed": seed, "rate": rate}}, [], {})
    ...     for rate in (1, 2)
    ...     for seed in (0, 1)
    ... ]
    >>> [(group.settings, group.runs) for group in groups(runs)]
    [({'rate': 1}, (0, 1)), ({'rate': 2}, (2, 3))]
    """
    settings = [key for key in differing(histories) if key != "seed"]
    found: dict[str, list[int]] = {}
    for index, run in enumerate(histories):
        chosen = [run.name, *(run.config.get(key) for key in settings)]
        found.setdefault(json.dumps(chosen, default=str), []).append(index)
    return [
        Group({key: histories[runs[0]].config.get(key) for key in settings}, tuple(runs))
        for runs in found.values()
    ]


def results(histories: Sequence[History]) -> list[tuple[str, str, list[float | None]]]:
    """What runs are compared by: set, metric, and the last value of each run (None if it has
    none). The test split comes first, then the validation split, then further sets."""
    metric = next((run.metric for run in histories if run.metric), None)
    order = ["test", "validation", *(name for name in splits(histories) if name not in SPLITS)]
    found = []
    for split in order:
        for key in dict.fromkeys([metric, "loss"]):
            values = [run.last(key, split) if key else None for run in histories]
            if key and any(value is not None for value in values):
                found.append((split, key, values))
    return found


def splits(histories: Sequence[History]) -> list[str]:
    """The sets that some of the runs have numbers of, the usual ones first."""
    found = {str(line.get("split")) for run in histories for line in run.metrics}
    named = dict.fromkeys(str(line.get("split")) for run in histories for line in run.metrics)
    return [*(name for name in SPLITS if name in found), *(n for n in named if n not in SPLITS)]


def load(folder: str | os.PathLike[str]) -> History:
    """Reads a run's folder.

    `UserError` if it has neither run.json nor metrics.jsonl, or if one of them is damaged.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists() and not (folder / "metrics.jsonl").exists():
        raise UserError(
            f"{folder}: neither run.json nor metrics.jsonl there; give the folder of a run"
        )
    return History(
        folder,
        _read_run(folder / "run.json"),
        read_metrics(folder / "metrics.jsonl"),
        _read_predictions(folder / "predictions.npz"),
        read_samples(folder / "samples.jsonl"),
        changes_file.read(folder),
    )


def curves(histories: Sequence[History], key: str) -> list[Curve]:
    """The curves of `key`: for one run those of its splits, for several one or two of each run in
    its colour.

    >>> run = History(
    ...     Path("r"),
    ...     {},
    ...     [
    ...         {"step": 1, "split": "train", "loss": 2.0},
    ...         {"step": 1, "split": "validation", "loss": 1.5},
    ...     ],
    ...     {},
    ... )
    >>> [(curve.label, curve.values) for curve in curves([run], "loss")]
    [('train', [2.0]), ('validation', [1.5])]
    """
    found = []
    labels = names(histories)
    for index, history in enumerate(histories):
        names_of_sets = splits([history])
        series = {split: history.series(key, split) for split in names_of_sets}
        series = {
            split: (steps, [_drawable(value) for value in values])
            for split, (steps, values) in series.items()
        }
        # Of several runs one held-out curve each: the validation split's, or the first set's.
        shown = next((name for name in names_of_sets if name not in ("train", "test")), "")
        held_out = bool(series.get(shown, ([], []))[0])
        for split, (steps, values) in series.items():
            if not steps:
                continue
            if len(histories) == 1:
                color = {name: place for place, name in enumerate(_COLORED)}
                named = [name for name in names_of_sets if name not in SPLITS]
                color |= {name: len(_COLORED) + place for place, name in enumerate(named)}
                found.append(Curve(split, color.get(split), steps, values))
            elif split in (shown, "train"):
                faint = split == "train" and held_out
                found.append(
                    Curve("" if faint else labels[index], index, steps, values, faint=faint)
                )
    # A single curve takes the first colour: gray is for the training curve beside others.
    return [dataclasses.replace(found[0], color=0)] if len(found) == 1 else found


_COLORED = ("validation", "test")
"""The sets whose colours are the first ones; that of the train split is gray."""


def names(histories: Sequence[History]) -> list[str]:
    """A name for each run that no other has: its own, else its folder's if all are called the same,
    else both, else with a number.

    >>> names(
    ...     [
    ...         History(Path("runs/x"), {"name": "digits"}, [], {}),
    ...         History(Path("runs/y"), {"name": "digits"}, [], {}),
    ...     ]
    ... )
    ['x', 'y']
    """
    own, folders = (
        [history.name for history in histories],
        [history.folder.name for history in histories],
    )
    both = [f"{name} {folder}" for name, folder in zip(own, folders, strict=True)]
    for choices in (own, folders if len(set(own)) == 1 else both):
        if len(set(choices)) == len(choices):
            return choices
    return [f"{name} {index}" for index, name in enumerate(own, start=1)]


def differing(histories: Sequence[History]) -> list[str]:
    """The settings in which the runs differ.

    >>> runs = [
    ...     History(Path(p), {"config": {"seed": s, "model": {"depth": 2}}}, [], {})
    ...     for p, s in (("a", 0), ("b", 1))
    ... ]
    >>> differing(runs)
    ['seed']
    """
    configs = [history.config for history in histories]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key.partition(".")[0] not in NOT_SETTINGS
        and any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted names; lists stay values.

    >>> flat({"model": {"depth": 2, "widths": [8, 8]}})
    {'model.depth': 2, 'model.widths': [8, 8]}
    """
    values: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        name = f"{prefix}.{key}" if prefix else str(key)
        values |= flat(value, name) if isinstance(value, dict) and value else {name: value}
    return values


def smaller_is_better(key: str) -> bool:
    """Whether a value is something to bring down.

    >>> (
    ...     smaller_is_better("loss"),
    ...     smaller_is_better("mean_absolute_error"),
    ...     smaller_is_better("accuracy"),
    ... )
    (True, True, False)
    """
    return any(
        word in key for word in ("loss", "error", "perplexity", "bits", "mse", "mae", "distance")
    )


def confusion(predictions: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]] | None:
    """Counts (label, prediction) and the classes' names, or None if there are no predictions or too
    many classes to count in pairs."""
    if class_numbers(predictions.get("label")) is None:
        return None
    label, prediction = predictions["label"], predictions["prediction"]
    names_C = [str(name) for name in predictions.get("class_names", ())]
    size = max(len(names_C), int(max(label.max(), prediction.max())) + 1)
    if size > MOST_CLASSES:
        return None
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (label, prediction), 1)
    return counts, names_C + [str(index) for index in range(len(names_C), size)]


def mistakes(predictions: Mapping[str, np.ndarray], limit: int = 24) -> list[dict[str, Any]]:
    """The worst of the wrong predictions: id, image, names of label and prediction, and the
    probability the label was given."""
    counted = confusion(predictions)
    if counted is None or "worst_id" not in predictions or "worst_image" not in predictions:
        return []
    names_C, found = counted[1], []
    ids = predictions["worst_id"]
    for number, row, image in zip(
        ids.tolist(),
        predictions.get("worst_row", ids).tolist(),  # rows of runs before it were the ids
        predictions["worst_image"],
        strict=False,
    ):
        if (
            not 0 <= row < len(predictions["label"])
            or predictions["label"][row] == predictions["prediction"][row]
        ):
            continue
        probability = (
            predictions["probability"][row].item() if "probability" in predictions else math.nan
        )
        label, prediction = (names_C[predictions[key][row]] for key in ("label", "prediction"))
        found.append(
            {
                "id": number,
                "image": image,
                "label": label,
                "prediction": prediction,
                "probability": probability,
            }
        )
    return found[:limit]


def grey(images: np.ndarray) -> np.ndarray:
    """Pictures of any numeric type as uint8, by one scale for all of them so that they can be
    compared."""
    images = np.nan_to_num(images.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = images.min(initial=0.0), images.max(initial=0.0)
    return np.round((images - low) * (255.0 / ((high - low) or 1.0))).astype(np.uint8)


def _drawable(value: float) -> float:
    """The value, unless arithmetic on axes would overflow or underflow with it."""
    if abs(value) > 1e100:
        return math.copysign(math.inf, value)
    return 0.0 if abs(value) < 1e-100 else value


def _read_run(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from error
    return content if isinstance(content, dict) else {}


def _read_predictions(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return {}
    if targets(arrays) is not None:
        return arrays
    label, prediction = (class_numbers(arrays.get(key)) for key in ("label", "prediction"))
    if label is None or prediction is None or len(label) != len(prediction):
        return {}
    return arrays


def targets(predictions: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """The finite numbers that were to be predicted and the predictions, in a row each, or None if
    there are none."""
    target, prediction = (predictions.get(key) for key in ("target", "prediction"))
    if target is None or prediction is None or target.shape != prediction.shape:
        return None
    if target.dtype.kind not in "iuf" or prediction.dtype.kind not in "iuf":
        return None
    kept = np.isfinite(target) & np.isfinite(prediction)
    return (target[kept], prediction[kept]) if kept.any() else None


def class_numbers(array: np.ndarray | None) -> np.ndarray | None:
    """The array, or None if it does not hold a class for each of at least one example."""
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        return None
    return None if array.min() < 0 else array


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
