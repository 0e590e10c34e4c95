"""The facts of a run: what it is, as the terminal shows it at the start and as run.json keeps
it."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import config, messages, optimizers, precision, tree
from jaxtrain.config import record as run_record
from jaxtrain.data import label_checks
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table, is_image
from jaxtrain.inference import inputs
from jaxtrain.inference import trained as trained_model
from jaxtrain.parallel import mesh as meshes
from jaxtrain.report.terminal import tables
from jaxtrain.runner import workdir
from jaxtrain.runner.build import Lengths
from jaxtrain.runner.compile import Training, state_bytes
from jaxtrain.train import hyper
from jaxtrain.train.lowering import Programs
from jaxtrain.train.state import TrainState


def start_banner(
    run: config.Run, splits: Splits, length: Lengths, mesh: Mesh, folder: str, *, asked: str
) -> dict[str, str]:
    """What a run is, a row each; `asked` is the precision of the command line."""
    device, train = mesh.devices.flat[0], splits.train
    others = [f"{len(table):,} {name}" for name, table in splits.held_out.items()]
    there = jax.device_count(device.platform)
    count = f"{mesh.size}{f' of {there}' if there > mesh.size else ''}"
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = {
        "model": run_record.kind_of(run, "model"),
        "data": (
            f"{run_record.kind_of(run, 'data')}: {', '.join([f'{len(train):,} train', *others])}"
            f"{_row_words(run.data, train)}"
        ),
        **_input_words(train, normalize=run.normalize),
        "optimizer": _optimizer_words(run),
        "length": (
            "evaluation only"
            if run.eval_only
            else f"{length.total:,} steps of {run.batch_size}"
            f" ({length.total / length.per_epoch:.1f} epochs{_token_words(length)})"
        ),
        "devices": f"{count} x {device.device_kind}, mesh {meshes.describe(mesh)}{hosts}",
        "precision": precision_words(run, device, asked=asked),
        "workdir": folder,
    }
    if run.reproducible:
        rows["reproducible"] = (
            f"the same bits on 1 to {run.logical_shards} devices, by {run.logical_shards} logical"
            " shards"
        )
    return rows


def _row_words(data: object, train: Table) -> str:
    """What is counted, where it is not plain examples: rows of tokens."""
    length = getattr(data, "length", None)
    if "tokens" not in train.fields or not isinstance(length, int):
        return ""
    return f" (rows of {messages.counted(length, 'token')})"


def _token_words(length: Lengths) -> str:
    if length.tokens_per_step is None:
        return ""
    return f", {tables.rate_text(length.total * length.tokens_per_step)} tokens"


def _input_words(train: Table, *, normalize: bool) -> dict[str, str]:
    """What is done to the inputs, in a row, unless they are images of bytes."""
    image = train.fields.get("image")
    if image is None or (image.dtype == np.uint8 and len(image.shape) == 3):
        return {}
    done = ("standardized" if normalize else "as they are") if is_image(image) else "whole numbers"
    return {"inputs": f"{image.dtype} {image.shape}, {done}"}


def _optimizer_words(run: config.Run) -> str:
    kind = run_record.kind_of(run, "optimizer")
    if isinstance(run.optimizer, optimizers.FromOptax):
        return f"{kind}, an Optax transformation: its numbers are constants of the program"
    schedule = run_record.kind_of(run, "schedule")
    return f"{kind}, {schedule} schedule, peak rate {run.optimizer.learning_rate:g}"


def precision_words(run: config.Run, device: meshes.Device, *, asked: str) -> str:
    """What is computed in what, TF32 included, which jax uses for float32 unless it is told not
    to."""
    words = [f"{run.precision} (auto)" if asked == "auto" else run.precision]
    tf32 = device.platform == "gpu" and (
        precision.version(getattr(device, "compute_capability", None)) or (0, 0)
    ) >= (8, 0)
    if run.matmul_precision == "fp32":
        words.append("float32 products in full")
    elif tf32:
        words.append("float32 products in TF32")
    if run.optimizer_state == "bf16":
        words.append("optimizer state in bf16")
    return ", ".join(words)


def record(
    run: config.Run,
    argv: Sequence[str],
    splits: Splits,
    length: Lengths,
    programs: Programs,
    trained: Training,
    earlier: dict[str, Any],
    *,
    step: int,
) -> dict[str, Any]:
    """run.json: enough to repeat the run; on a resume from `step` the `earlier` start's facts stay,
    the configuration is today's, and what training had otherwise until then is kept besides."""
    mesh, state = programs.mesh, programs.state
    device = mesh.devices.flat[0]
    now = workdir.describe(run, argv) | {
        "run_id": earlier["run_id"],
        "hyper": hyper.collect(programs.recipe),
        "hyper_rules": hyper.rules(programs.recipe),
        "classes": {name: trained_model.class_of(getattr(run, name)) for name in config.FAMILIES},
        "inputs": inputs.describe(
            # A label that cannot be used is an error where it is trained on.
            run.task,
            label_checks.unchecked(splits.train),
            programs.recipe.prepare,
            run.batch_size,
        ),
        "data": {
            "fingerprint": splits.fingerprint,
            "train": len(splits.train),
            "validation": len(splits.validation or ()),
            "test": len(splits.test or ()),
            "evaluate": {name: len(table) for name, table in splits.evaluate.items()},
            "class_names": list(splits.train.class_names or ()),
        },
        "hardware": {
            "platform": device.platform,
            "device_kind": device.device_kind,
            "host_cpus": os.cpu_count(),
        },
        "mesh": meshes.describe(mesh),
        "devices": mesh.size,
        "processes": jax.process_count(),
        "precision": run.precision,
        "total_steps": length.total,
        "steps_per_epoch": length.per_epoch,
        "tokens_per_step": length.tokens_per_step,
        "steps_per_call": trained.per_call,
        "parameters": tree.size(state.params),
        "state_bytes_per_device": state_bytes(state),
        "memory_estimate": trained.memory,
    }
    if "config" in earlier:
        this = {name: now[name] for name in ("started", "command", "devices", "processes")}
        this |= {"step": step, "changes": _changes(run, earlier["config"], now["config"])}
        now |= {
            "started": earlier["started"],
            "command": earlier["command"],
            "resumed": [*earlier.get("resumed", []), this],
        }
    return now


def _changes(run: config.Run, old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """What a resume trains otherwise than the start before it: the horizon, and what needed a
    permission."""
    harmless = set(config.marked(config.Mark.FREE)) - set(config.LENGTHS)
    found = run_record.differences(run_record.completed(run, old), new)
    return {name: [before, after] for name, before, after in found if name not in harmless}


def earlier_steps_per_call(record: dict[str, Any], run: config.Run, mesh: Mesh) -> int | None:
    """How many steps a dispatch had when the run started, so that it goes on with the same bits;
    None if it ran under other conditions."""
    before = record.get("config", {})
    same = all(before.get(name) == getattr(run, name) for name in ("device_data", "debug_nans"))
    same = same and record.get("hardware", {}).get("platform") == mesh.devices.flat[0].platform
    return record.get("steps_per_call") if same else None


def trained_share(optimizer: optimizers.Optimizer, params: tree.PyTree) -> str:
    """How much of a model is trained, in words."""
    trains, flat = tree.flatten(optimizer.trained(params)), tree.flatten(params)
    sizes = {path: flat[path].size for path, keep in trains.items() if keep}
    layers = sum(path.endswith("lora_a") for path in sizes)
    trained, size = sum(sizes.values()), tree.size(params)
    what = f"adapters on {layers} layers" if layers else "no adapters"
    held = f"{len(sizes)} of {len(flat)} arrays"
    return (
        f"lora: {what}; {trained:,} of {size:,} parameters, {held}, are trained"
        f" ({trained / size:.2%})"
    )


def rule_table(run: config.Run, state: TrainState, axes: tree.PyTree) -> list[str]:
    """Which rule decides which parameter, if the optimizer has rules at all."""
    optimizer = run.optimizer
    if not (
        getattr(optimizer, "rates", ())
        or getattr(optimizer, "decay", ())
        or getattr(optimizer, "frozen", ())
    ):
        return []
    return [
        "parameter, shape, rate, decay",
        *("  ".join(row) for row in optimizers.match_table(optimizer, state.params, axes)),
    ]
