"""What is looked at before anything is compiled: the model, the labels, and the held-out sets of a
run."""

import re
from typing import Any

import jax
import numpy as np

from jaxtrain import config, messages, tasks
from jaxtrain.data import label_checks
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table, column
from jaxtrain.errors import UserError
from jaxtrain.fields import fields_of, is_component
from jaxtrain.models import Pretrained
from jaxtrain.runner import build
from jaxtrain.runner.compile import Execution
from jaxtrain.train import check
from jaxtrain.train.recipe import Recipe

SPARSE = 8
"""Classes that may be absent from a split, besides half of them, before its greatest label is taken
for a mistake."""
UNUSED = 1000
"""Embeddings of a new model, besides half of them, that may belong to no id before it is said."""


def model(run: config.Run, train: Table, recipe: Recipe, execution: Execution) -> check.Checked:
    """Runs model and task on shapes alone, and says what should be said once. Whatever does not fit
    is an error here, before anything is compiled."""
    device = execution.mesh.local_devices[0]
    if run.offload != "none" and "pinned_host" not in {
        memory.kind for memory in device.addressable_memories()
    }:
        raise UserError(
            f"--offload={run.offload}: programs on {device.device_kind} cannot reach the host's"
            " memory; drop it"
        )
    part = run.batch_size // run.microbatches
    if run.microbatches > 1 and part % execution.parts:
        raise UserError(
            f"--microbatches={run.microbatches}: a part of {part} examples is not divisible by"
            f" {execution.parts} {execution.parts_word}; use fewer parts"
        )
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, *field.shape), field.dtype)
        for name, field in train.fields.items()
    }

    try:
        found = check.check(recipe, batch)
    except UserError as error:
        raise UserError(_in_flags(str(error), run)) from error
    task: Any = recipe.task
    if tasks.has_hook(task, "check", found.outputs):
        task.check(found.outputs, _classes(task, train))
    for note in (*found.notes, *token_notes(run, train)):
        messages.warn(note)
    return found


def _in_flags(said: str, run: config.Run) -> str:
    """What a model says of its own fields, in the words of the command line."""
    match = re.match(rf"{type(run.model).__name__}\.(\w+)=", said)
    if match is None or not is_component(run.model):
        return said
    fields = {field.name for field in fields_of(run.model)}
    if match[1] not in fields:
        return said
    length = getattr(run.data, "length", None)
    tokens = re.search(r"the input has (\d+) tokens", said)
    shorter = ""
    if match[1] == "max_length" and tokens and isinstance(length, int):
        # A task may let the model see one token more or fewer than a row has to predict.
        shorter = f", or --data.length={run.model.max_length + length - int(tokens[1])}"
    # A stored model is as it is: its fields are no flags.
    if any(isinstance(each, Pretrained) for each in run.offers.get("model", {}).values()):
        what = said.partition(";")[0].replace(f"{type(run.model).__name__}.", "the model's ")
        return f"{what}; it is stored so{shorter.replace(', or', ': give')}"
    flag = said.replace(f"{type(run.model).__name__}.", "--model.", 1)
    return flag.replace(" positions=rotary", " --model.positions=rotary") + shorter


def token_notes(run: config.Run, train: Table) -> list[str]:
    """A note if the data's tokenizer has far fewer ids than the model, be it new or what a run
    starts from; `UserError` if it has more than the model has embeddings."""
    known = getattr(run.model, "vocabulary", None)
    tokenizer = getattr(train, "tokenizer", None)
    if tokenizer is None or not isinstance(known, int):
        return []
    if known < tokenizer.vocabulary:
        raise UserError(
            f"--model.vocabulary={known}: the data's tokenizer has {tokenizer.vocabulary} ids; give"
            " --data.tokenizer=DIR, the folder of the model whose parameters the run starts from,"
            f" or set --model.vocabulary={tokenizer.vocabulary} for a new one"
            f"{_with_vocabulary(run, tokenizer.vocabulary)}"
        )
    if 2 * tokenizer.vocabulary > known:
        return []
    has = (
        f"the data's tokenizer ({messages.printable(tokenizer.name)}) has {tokenizer.vocabulary}"
        " ids"
    )
    if run.init_from:
        return [
            (
                f"{has}, the stored model {known}: is it that model's?"
                " --data.tokenizer=DIR names the folder that holds it"
            )
        ]
    if known - tokenizer.vocabulary < UNUSED:
        return []
    return [
        (
            f"{has}, the new model {known} embeddings, all random: --init_from=DIR with"
            " --data.tokenizer=DIR starts from a stored model and its tokenizer;"
            f" --model.vocabulary={tokenizer.vocabulary} is enough for a new one"
        )
    ]


def _with_vocabulary(run: config.Run, ids: int) -> str:
    """The offered models with as many embeddings, as the end of a message."""
    offered = run.offers.get("model", {}).items()
    names = [name for name, model in offered if getattr(model, "vocabulary", None) == ids]
    return f", or choose --model={' or '.join(names[:3])}, with as many" if names else ""


def _classes(task: Any, table: Table) -> int | None:
    """How many classes the data has, without the label that the task ignores; None if its labels
    say nothing, such as one 255 far from all others."""
    labels = column(table, getattr(task, "target", "label"))
    ignore = getattr(task, "ignore", None)
    if labels is None and ignore is not None and table.num_classes == ignore + 1:
        return None  # the label to be ignored was counted, and nobody can count without reading all
    if labels is None or table.class_names is not None or labels.dtype.kind not in "iu":
        return table.num_classes
    found = np.unique(labels)
    found = found[found != ignore]
    if not found.size or found[-1] >= 2 * found.size + SPARSE:
        return None
    count = 1 + int(found[-1])
    return count if table.num_classes is None else min(count, table.num_classes)


def labels(run: config.Run, splits: Splits, found: check.Checked) -> Splits:
    """The splits with their labels checked, at once or as they are read; by the classes that the
    model's outputs have."""
    return label_checks.checked(splits, run.task, found.outputs, run.data)


def held_out(
    run: config.Run, splits: Splits, recipe: Recipe, execution: Execution, found: check.Checked
) -> None:
    """Runs model and task on the shapes of the held-out splits; what does not fit there must not be
    found out after the training."""
    for name, table in splits.held_out.items():
        alike = dict(table.fields) == dict(splits.train.fields)
        # Of a model that keeps nothing the shapes of an example say all.
        if alike and not found.state.collections:
            continue
        size = build.evaluation_size(run, table, execution)
        other = {
            field: jax.ShapeDtypeStruct((size, *spec.shape), spec.dtype)
            for field, spec in table.fields.items()
        }
        try:
            check.evaluated(recipe, found.state, other)
        except Exception as error:  # whatever the model says of a shape that is not its own
            flag = label_checks.flag_of(name, build.expression_of(run, name))
            reason = messages.one_line(str(error))
            if not alike:
                raise UserError(f"{flag}: does not fit what is trained on ({reason})") from error
            kept = ", ".join(found.state.collections)
            raise UserError(
                f"{flag}: the model cannot be run on its {size} rows at a time ({reason}); it keeps"
                f" {kept}, perhaps of the size of a training batch, so try"
                f" --eval_batch_size={run.batch_size}"
            ) from error


def padding(run: config.Run, splits: Splits, execution: Execution, found: check.Checked) -> None:
    """`UserError` if the last batch of a held-out set is padded and the task's loss does not look
    at `weight`: padding would count as examples."""
    if found.reads_weight:
        return
    for name, table in splits.held_out.items():
        size = build.evaluation_size(run, table, execution)
        if not len(table) % size:
            continue
        kind = type(run.task).__name__
        raise UserError(
            f"task={kind}: its loss does not look at batch['weight'], which is 0 for the"
            f" {-len(table) % size} rows that fill the last batch of {name} ({len(table)} examples"
            f" in batches of {size}); give {{'loss': metrics.weighted(loss_B,"
            " batch.get('weight'))}"
        )
