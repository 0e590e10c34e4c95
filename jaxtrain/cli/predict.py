"""`python -m jaxtrain predict WORKDIR --out=predictions.npz`: what a trained model says of inputs
without labels, or of a split of its own data."""

import csv
import os
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain import extras, messages
from jaxtrain.cli.command import Command, new_file, options
from jaxtrain.errors import UserError

if TYPE_CHECKING:  # heavy, and help must answer at once
    import numpy as np

    from jaxtrain.inference.tables import Opened
    from jaxtrain.inference.trained import Trained

FLAGS = {
    "out": "predictions.npz",
    "data.path": "images.npz",
    "data.split": "test",
    "data.image_key": "pixels",
    "checkpoint": "best",
    "experiment": "experiments/digits.py",
    "overwrite": None,
}


def run(arguments: Sequence[str]) -> int:
    """Predicts every row, and writes what was said as .npz or .csv."""
    workdir, given = options("predict", arguments, FLAGS)
    path = new_file("predict", given, (".npz", ".csv"))
    experiment = _experiment(given["experiment"]) if "experiment" in given else None
    extras.require("predict", "orbax.checkpoint", "xxhash")
    from jaxtrain import host_memory
    from jaxtrain.data.text import tokenizers
    from jaxtrain.inference import tables, trained
    from jaxtrain.tasks import NextToken

    host_memory.keep_freed()
    model = trained.load(workdir, checkpoint=given.get("checkpoint", "last"), experiment=experiment)
    if isinstance(model.task, NextToken):
        shown = messages.printable(str(workdir))
        raise UserError(
            f"predict {shown}: a language model says texts, and no rows: python -m jaxtrain sample"
            f" {shown} --prompt=TEXT"
        )
    where, split = f"{workdir}: run.json", given.get("data.split", "")
    if "data.path" in given:
        source = model.source(where, experiment, needed=False)
        kept = (workdir / tokenizers.SAVED).is_file()
        opened = tables.open_path(
            given["data.path"],
            model.inputs,
            source=source,
            split=split,
            image_key=given.get("data.image_key", ""),
            tokenizer=tokenizers.open_tokenizer(workdir) if kept else None,
        )
    else:
        if "data.image_key" in given:
            raise UserError("predict --data.image_key: belongs to --data.path, which is not given")
        source = model.source(where, experiment, needed=True)
        opened = tables.of_run(source, split, model.record["data"].get("fingerprint", ""))
    try:
        found = model.predict_table(opened.table)
    except UserError as error:
        text = str(error)
        flag = f"--data.path={given['data.path']}: " if "data.path" in given else ""
        raise UserError(text if text.startswith("--data.") else f"{flag}{text}") from error
    _write(path, model, opened, found)
    which = model.averaged or "its parameters"
    print(f"step {model.step} ({which}): {opened.what} -> {path}")
    return 0


def _experiment(file: str) -> Any:
    """What the function `experiment` of a file returns; the user named the file, so it is run."""
    path = Path(file)
    flag = f"predict --experiment={messages.printable(file)}"
    if not path.is_file():
        raise UserError(f"{flag}: no such file{messages.did_you_mean_path(file)}")
    if path.suffix != ".py":
        raise UserError(f"{flag}: must be the Python file of the experiment")
    made = runpy.run_path(file).get("experiment")
    if not callable(made):
        raise UserError(
            f"{flag}: has no function `experiment`; write def experiment(): return"
            " jaxtrain.Run(...) there, and jaxtrain.main(experiment) under"
            ' if __name__ == "__main__":'
        )
    return made()


def _write(path: Path, model: "Trained", opened: "Opened", found: "dict[str, np.ndarray]") -> None:
    """Writes the file whole or not at all."""
    import numpy as np

    from jaxtrain import durable_files

    ids = found.pop("id")
    rows: dict[str, Any] = {"id": ids}
    if opened.names is not None:
        rows["filename"] = np.array(opened.names)[ids]
    names = {"class_names": np.array(model.class_names)} if model.class_names else {}
    # NumPy adds the suffix to a name that lacks it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix.lower()}")
    try:
        if path.suffix.lower() == ".csv":
            _write_csv(temporary, model, rows, found)
        else:
            arrays: dict[str, Any] = {**rows, **found, **names, "step": np.int64(model.step)}
            np.savez(temporary, **arrays)
        durable_files.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_csv(
    path: Path, model: "Trained", rows: Mapping[str, Any], found: "dict[str, np.ndarray]"
) -> None:
    """A line for each row: its answers, those of several numbers as columns of their own."""
    columns: dict[str, Any] = dict(rows)
    prediction = found.get("prediction")
    if prediction is not None and prediction.ndim == 1 and (words := model.names_of(prediction)):
        columns["class"] = words
    first = [name for name in ("prediction", "value", "probability") if name in found]
    for name in [*first, *(name for name in found if name not in first)]:
        value = found[name]
        flat = value.reshape(len(value), -1)
        if value.ndim == 1:
            columns[name] = value
        else:
            columns |= {f"{name}_{place}": flat[:, place] for place in range(flat.shape[1])}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


COMMAND = Command(
    "WORKDIR --out=FILE.npz|.csv [--data.path=INPUTS] [--checkpoint=last|best|STEP]",
    "what a trained model says of inputs without labels, or of its own test split",
    run,
    FLAGS,
)
