"""The end of a run: predictions on the held-out split, the report, the summary. The run is
committed, so nothing that a process does here alone may fail it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain import config, messages
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table
from jaxtrain.processes import group, heartbeat
from jaxtrain.report.page import history
from jaxtrain.report.terminal import tables
from jaxtrain.report.terminal.progress import Progress
from jaxtrain.runner import build
from jaxtrain.runner.compile import Execution
from jaxtrain.train import evaluate, train_step
from jaxtrain.train.lowering import Programs
from jaxtrain.train.state import TrainState

MOST_PREDICTED = 2**28
"""Bytes of predictions beyond which they are not written, such as pictures."""
MOST_SHOWN = 12
"""Metrics of a split that the summary shows; a task may have one for each of a thousand classes."""
WORST = 24
"""How many of the worst mistakes keep their images for the report."""


def finish(
    run: config.Run,
    folder: Path,
    splits: Splits,
    programs: Programs,
    execution: Execution,
    state: TrainState,
    progress: Progress,
    *,
    seconds: float,
    more: Mapping[str, str],
) -> None:
    """Writes predictions.npz, if the task can say what a prediction is, and the report, and shows
    the summary with `more` rows."""
    heartbeat.beat("ending")
    table = splits.test if splits.test is not None else splits.validation
    if hasattr(run.task, "examine") and table is not None:
        with _warn_on_error("predictions", collective=True):
            size = _predicted_bytes(run, table, programs, state)
            if size > MOST_PREDICTED:
                messages.warn(
                    f"predictions not written: they would take {messages.bytes_text(size)}"
                )
                found = None
            else:
                batches = build.batches(run, table, execution)
                found = evaluate.predictions(programs.predict_step, state, batches)
            if group.is_main() and found is not None:
                with _warn_on_error("predictions"):
                    write_predictions(folder, table, found)
    if not group.is_main():
        return
    page = write_report(run, folder)
    with _warn_on_error("summary"):
        done = history.load(folder)
        values = {
            (split, name): done.last(name, split)
            for split in splits.held_out
            for name in _shown_metrics(done, split)
        }
        rows = {
            f"{split} {name}": tables.value_text(name, value)
            for (split, name), value in values.items()
            if value is not None
        }
        rows |= dict(more) | {"time": tables.duration_text(seconds), "workdir": str(folder)}
        progress.show(
            tables.named_values(f"{run.name}: done", rows | ({"report": str(page)} if page else {}))
        )


def _shown_metrics(done: history.History, split: str) -> list[str]:
    """The metrics of the last line of a split that the summary shows."""
    last = next((line for line in reversed(done.metrics) if line.get("split") == split), {})
    others = (name for name in last if name not in history.NOT_METRICS)
    return ["loss", *(name for name in others if not history.is_clock(name))][:MOST_SHOWN]


def write_report(run: config.Run, folder: Path) -> Path | None:
    """Writes report.html and the plots, if the run wants them."""
    if not run.report:
        return None
    with _warn_on_error("report"):
        from jaxtrain.report.page import html  # draws with matplotlib, which takes a second to load

        return html.write_report([folder], folder / "report.html")
    return None


def _predicted_bytes(run: config.Run, table: Table, programs: Programs, state: TrainState) -> int:
    """How many bytes the predictions of a whole table take."""
    rows = run.eval_batch_size
    batch = {
        name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
        for name, field in table.fields.items()
    } | {
        "id": jax.ShapeDtypeStruct((rows,), np.int32),
        "weight": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    found = jax.eval_shape(
        lambda state, batch: train_step.prediction_step(programs.recipe, state, batch), state, batch
    )
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found)) / rows
    return round(each * len(table))


def write_predictions(folder: Path, table: Table, found: dict[str, np.ndarray]) -> None:
    """Writes what the model says of every example of a table, as the task's `examine` has it; where
    it has classes (`label` and `prediction`), with the images of its worst mistakes, for the
    report."""
    arrays: dict[str, Any] = {name: array for name, array in found.items() if name != "weight"}
    ids = arrays.pop("id")
    if "weight" in found and not (found["weight"] == 1).all():
        arrays["weight"] = found["weight"]
    if history.class_numbers(found.get("label")) is not None and "prediction" in found:
        wrong = np.flatnonzero(found["label"] != found["prediction"])
        badness = found.get("loss", -found.get("probability", np.zeros(len(ids))))
        worst = wrong[np.argsort(-badness[wrong], kind="stable")][:WORST]
        names = table.class_names or [str(one) for one in range(int(found["label"].max()) + 1)]
        arrays |= {"worst_id": ids[worst], "worst_row": worst, "class_names": np.array(names)}
        if "image" in table.fields and len(worst):
            arrays["worst_image"] = table.read(ids[worst])["image"]
    np.savez(folder / "predictions.npz", **arrays)


@contextlib.contextmanager
def _warn_on_error(what: str, *, collective: bool = False) -> Iterator[None]:
    """Turns an error into a warning: the training is done and committed, a picture of it may fail.

    Not so the error of one process in what all processes of a group do together: the others wait
    in a collective for the one that failed, so its error must end the group.
    """
    try:
        yield
    except Exception as error:
        if collective and jax.process_count() > 1:
            raise
        messages.warn(
            f"{what} not written: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
