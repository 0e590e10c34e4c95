"""`python -m jaxtrain export WORKDIR --out=weights.safetensors`: the plain parameters of a run, for
other programs and for `--init_from`; with `--format` as the files of another toolkit."""

import os
from collections.abc import Sequence
from typing import Any

from jaxtrain import extras, messages
from jaxtrain.cli import export_formats
from jaxtrain.cli.command import Command, new_file, options
from jaxtrain.errors import UserError

FLAGS = {
    "out": "weights.safetensors",
    "checkpoint": "best",
    "params": "raw",
    "merge": None,
    "overwrite": None,
    "format": "hugging_face",
    "to": "DIR",
    "dtype": "bfloat16",
    "tokenizer": "DIR",
}
CHOICES = ("auto", "average", "raw")


def run(arguments: Sequence[str]) -> int:
    """Writes the parameters of a step, the average where there is one, and the model's other
    variables."""
    workdir, given = options("export", arguments, FLAGS)
    form = export_formats.chosen(given)
    path = (
        export_formats.new_folder(given)
        if form in export_formats.FOLDERS
        else new_file("export", given, (".safetensors",))
    )
    choice = given.get("params", "auto")
    if choice not in CHOICES:
        raise UserError(
            f"export --params={messages.shown(choice)}: unknown; valid: {', '.join(CHOICES)}"
            f"{messages.did_you_mean(choice, CHOICES)}"
        )
    extras.require("export", "safetensors", "orbax.checkpoint", "xxhash")
    # Reading files needs no card, and a run may be using it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxtrain.checkpoints import arrays, variables, weights_file
    from jaxtrain.inference import trained

    record = trained.read_record(workdir)
    step = trained.chosen_step(workdir, given.get("checkpoint", "last"))
    stored = variables.of_step(workdir / "checkpoints" / str(step), choice=choice)
    values = stored.read()
    merges = "merge" in given
    if merges:
        values = _merged(values, trained.lora_of(record, None, f"{workdir}: run.json"))
    if form:
        told = export_formats.write(form, path, record, values, given)
        print(f"step {step} ({stored.averaged or 'the raw parameters'}): {told} -> {path}")
        return 0
    metadata = {
        "step": step,
        "params": stored.averaged or "raw",
        "merged": merges,
        "digest": arrays.digest(values),
        "name": record["name"],
        "config": record["config"],
        "class_names": record["data"].get("class_names") or [],
        "inputs": record.get("inputs"),
    }
    weights_file.write(path, values, metadata)
    size = messages.bytes_text(sum(value.nbytes for value in values.values()))
    which = (stored.averaged or "the raw parameters") + (", adapters merged" if merges else "")
    print(f"step {step} ({which}): {len(values)} arrays, {size} -> {path}")
    return 0


def _merged(values: dict[str, Any], lora: Any) -> dict[str, Any]:
    """The parameters of the plain model, with the adapters multiplied out."""
    import numpy as np

    from jaxtrain.models.lora import merged

    if lora is None:
        raise UserError("export --merge: the run trained no adapters; drop --merge")
    return {path: np.asarray(array) for path, array in merged(values, lora.scale).items()}


COMMAND = Command(
    "WORKDIR --out=FILE|--format=hugging_face --to=DIR [--checkpoint=last|best|STEP] [--merge]",
    "plain parameters as a file, or as another toolkit's",
    run,
    FLAGS,
)
