"""The programs of a run: its recipe compiled for its data and mesh, and what they need and do."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import adapters, config, sharding, step, tree
from jaxtrain import feed as feeds
from jaxtrain import mesh as meshes
from jaxtrain.data import pipeline, statistics
from jaxtrain.data.splits import Splits
from jaxtrain.data.table import Table
from jaxtrain.recipe import Batch, Options
from jaxtrain.schedules import resolve
from jaxtrain.state import TrainState

MOST_MEASURED = 10_000
"""How many examples of a data set that is not in memory its statistics are measured on."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A run's horizons in steps; 0 is never."""

    total: int
    per_epoch: float
    evaluate: int
    save: int
    keep_every: int | None


def lengths(run: config.Run, num_examples: int) -> Lengths:
    """Turns epochs, percentages and horizons into steps.

    `ValueError` if the batch is larger than the train split: it would hold an example twice.
    """
    if run.batch_size > num_examples:
        raise ValueError(f"--batch_size={run.batch_size}: train split has {num_examples} examples, so a batch would repeat some; use <= {num_examples}")
    per_epoch = num_examples / run.batch_size
    total = run.steps if run.steps is not None else max(1, round((run.epochs or 0) * per_epoch))

    def every(horizon: Any) -> int:
        return max(1, round(horizon.steps(total_steps=total, steps_per_epoch=per_epoch))) if horizon.value else 0

    keep_every = None if run.keep_every is None else every(run.keep_every)
    return Lengths(total, per_epoch, every(run.eval_every), every(run.checkpoint_every), keep_every)


def scaled(batch: Batch) -> Batch:
    """The batch with its image as float32, bytes as 0..1: what is done where images are not standardized."""
    image = batch["image"]
    return dict(batch) | {"image": image.astype(jnp.float32) * np.float32(1 / 255 if image.dtype == jnp.uint8 else 1)}


def options(run: config.Run, train: Table, length: Lengths) -> Options:
    """What the recipe says besides model, task and optimizer."""
    prepare = None
    if "image" in train.fields:
        prepare = scaled
        if run.normalize:
            limit = None if train.arrays is not None else MOST_MEASURED
            prepare = functools.partial(statistics.standardize, statistics=statistics.measure(train, max_examples=limit))
    return Options(
        schedule=resolve(run.schedule, total_steps=length.total, steps_per_epoch=length.per_epoch),
        total_steps=float(length.total),
        prepare=prepare,
        augment=run.augment,
        clip_norm=run.clip_norm,
        ema_decay=run.ema_decay,
        microbatches=run.microbatches,
        num_examples=len(train),
    )


def check_model(run: config.Run, train: Table, recipe: Options, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Runs model and task on shapes alone; returns the abstract batch. Whatever does not fit is an error here, before anything is compiled."""
    meshes.check_batch("batch_size", run.batch_size, mesh)
    if run.microbatches > 1:
        shards = meshes.batch_shards(mesh)
        if (run.batch_size // run.microbatches) % shards:
            part = run.batch_size // run.microbatches
            raise ValueError(f"--microbatches={run.microbatches}: a part of {part} examples is not divisible by {shards} devices; use fewer parts")
    batch = {name: jax.ShapeDtypeStruct((run.batch_size, *field.shape), field.dtype) for name, field in train.fields.items()}

    def forward(batch: Batch) -> Any:
        key = jax.random.key(0)
        batch = batch if recipe["prepare"] is None else recipe["prepare"](dict(batch))
        inputs, functions = run.task.inputs(batch), adapters.functions(run.model)
        variables = functions.init(key, inputs)
        run.optimizer.transform(variables["params"], 1.0).init(variables["params"])  # a rule that decides no parameter is an error
        outputs, _ = functions.apply(variables, inputs, train=False)
        sums = run.task.loss(outputs, batch)
        if run.augment is not None:
            sums = run.task.loss(outputs, run.augment(batch, jax.random.split(key, run.batch_size), key))
        return outputs, sums

    outputs, _ = jax.eval_shape(forward, batch)
    classes = num_classes(train)
    if hasattr(outputs, "shape") and classes is not None and "label" in batch and outputs.shape[-1] < classes:
        raise ValueError(f"--model.num_classes={outputs.shape[-1]}: the data has {classes} classes; set --model.num_classes={classes}")
    return batch


def check_held_out(run: config.Run, splits: Splits, recipe: Options, batch: Batch) -> None:
    """Runs model and task on the shapes of the held-out splits; a test split without labels must not be found out after the training."""

    def forward(batch: Batch, other: Batch) -> Any:
        batch, other = (each if recipe["prepare"] is None else recipe["prepare"](dict(each)) for each in (batch, other))
        functions = adapters.functions(run.model)
        variables = functions.init(jax.random.key(0), run.task.inputs(batch))
        return run.task.loss(functions.apply(variables, run.task.inputs(other), train=False)[0], other, train=False)

    for name, table in (("validation", splits.validation), ("test", splits.test)):
        if table is None or dict(table.fields) == dict(splits.train.fields):
            continue
        other = {field: jax.ShapeDtypeStruct((run.eval_batch_size, *spec.shape), spec.dtype) for field, spec in table.fields.items()}
        try:
            jax.eval_shape(forward, batch, other)
        except Exception as error:  # whatever the model says of a shape that is not its own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"--data.{name}={getattr(run.data, name, '')}: does not fit what is trained on ({reason})") from error


def num_classes(table: Table) -> int | None:
    """How many classes a table's labels need: what it says, or one more than its greatest label if it is in memory."""
    if table.num_classes is not None or table.arrays is None or "label" not in table.arrays:
        return table.num_classes
    return int(table.arrays["label"].max()) + 1


def place_data(run: config.Run, train: Table, mesh: Mesh) -> Batch | None:
    """The train split in device memory, or None if it is to be streamed; `ValueError` if it was asked for and cannot be."""
    if run.device_data == "no":
        return None
    stats = mesh.devices.flat[0].memory_stats() or {}
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    if not pipeline.fits_on_device(train, free):
        if run.device_data == "yes":
            raise ValueError("--device_data=yes: the train split is not in host memory, or larger than half of what is free on the device; use auto")
        return None
    return pipeline.resident_arrays(train, sharding.replicated(mesh))


@dataclasses.dataclass(frozen=True)
class Training:
    """The compiled training program behind its feed, and what it needs."""

    feed: feeds.Feed
    per_call: int
    flops_per_step: float
    memory: dict[str, int]
    """Bytes on one device by what they are for."""


def compile_training(
    run: config.Run, state: TrainState, train: Table, data: Batch | None, recipe: Options, mesh: Mesh, *, per_call: int | None
) -> Training:
    """Compiles the training step for this state and data; `per_call` None lets the program's size decide."""
    parts = (run.model, run.task, run.optimizer)
    platform = mesh.devices.flat[0].platform
    repeats = 1 if platform == "cpu" else run.microbatches  # XLA counts the body of a loop once, and off the CPU the parts are a loop
    if data is None:
        batch = {name: jax.ShapeDtypeStruct((run.batch_size, *field.shape), field.dtype, sharding=sharding.batch(mesh)) for name, field in train.fields.items()}
        batch["id"] = jax.ShapeDtypeStruct((run.batch_size,), jnp.int32, sharding=sharding.batch(mesh))
        single = step.make_train_step(*parts, mesh=mesh, **recipe)
        lowered = single.lower(state, batch)
        compiled = lowered.compile()
        place = jax.device_get(state.position)
        stream = pipeline.Stream(
            train, seed=int(place.seed), batch_size=run.batch_size, epoch=int(place.epoch), offset=int(place.offset), sharding=sharding.batch(mesh)
        )
        return Training(feeds.StreamFeed(_checked(single) if run.debug_nans else compiled, stream), 1, repeats * feeds.flops_of(lowered), _memory(state, data, compiled))
    steps = step.make_train_steps(*parts, batch_size=run.batch_size, mesh=mesh, **recipe)
    count = feeds.device_count(1, data)
    lowered = steps.single.lower(state, data, count)
    flops = repeats * feeds.flops_of(lowered)
    if run.debug_nans:
        return Training(feeds.ResidentFeed(_checked(steps.single), None, data), 1, flops, _memory(state, data, lowered.compile()))
    chosen = per_call or feeds.steps_per_call(lowered, platform, run.log_every)
    compiled = lowered.compile() if chosen == 1 else steps.several.lower(state, data, count).compile()
    feed = feeds.ResidentFeed(compiled, None if chosen == 1 else compiled, data)
    return Training(feed, chosen, flops, _memory(state, data, compiled))


def _checked(jitted: Any) -> Any:
    """The step as --debug_nans needs it: one that made a NaN runs again, operation by operation, so that jax can say which one it was."""
    kept = jax.jit(jitted.__wrapped__)  # takes over no state: there must be something to run again from

    def call(*arguments: Any) -> Any:
        result = kept(*arguments)
        numbers = [leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if any(np.isnan(number).any() for number in jax.device_get(numbers)):
            jitted.__wrapped__(*arguments)  # raises FloatingPointError
        return result

    return call


def evaluation_size(run: config.Run, table: Table, mesh: Mesh) -> int:
    """The batch size of evaluation: as asked for, but no larger than the set needs, and rounded up so that each device has its share."""
    shards = meshes.batch_shards(mesh)
    return -(-min(run.eval_batch_size, len(table)) // shards) * shards


def batches(run: config.Run, table: Table, mesh: Mesh) -> Iterator[Batch]:
    """One pass over a table for evaluation."""
    return pipeline.evaluation_batches(table, evaluation_size(run, table, mesh), sharding.batch(mesh))


def _memory(state: TrainState, data: Batch | None, compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    parts: Mapping[str, tree.PyTree] = {
        "parameters": (state.params, state.collections),
        "optimizer state": state.opt_state,
        "averaged parameters": state.ema,
        "data": data,
    }
    sizes = {name: _bytes_per_device(part) for name, part in parts.items()}
    sizes["gradients, activations, scratch"] = int(getattr(analysis, "temp_size_in_bytes", 0) or 0)
    return {name: size for name, size in sizes.items() if size}


def _bytes_per_device(arrays: tree.PyTree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if hasattr(leaf, "sharding")]
    return sharding.bytes_per_device(leaves, [leaf.sharding for leaf in leaves])


def state_bytes(state: TrainState) -> int:
    """How many bytes of the state each device holds."""
    return _bytes_per_device(state)
