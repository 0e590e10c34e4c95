"""The training program: one step, or several, compiled for a state and its data, behind the feed
that drives it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import config, tree
from jaxtrain.data import pipeline
from jaxtrain.data.table import Table
from jaxtrain.parallel import sharding
from jaxtrain.train import feeds, gradients, reproducible
from jaxtrain.train import steps as train_steps
from jaxtrain.train.recipe import Batch, Options, Recipe
from jaxtrain.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Training:
    """The compiled training program behind its feed, and what it needs."""

    feed: feeds.Feed
    per_call: int
    flops_per_step: float
    memory: dict[str, int]
    """Bytes on one device by what they are for."""
    copied: int = 0
    """Bytes of the state that the program does not take over but keeps twice; none, unless
    something is wrong."""


def compile_training(
    run: config.Run,
    state: TrainState,
    train: Table,
    data: Batch | None,
    recipe: Options,
    mesh: Mesh,
    *,
    per_call: int | None,
) -> Training:
    """Compiles the training step for this state and data; `per_call` None lets the program's size
    decide."""
    parts = (run.model, run.task, run.optimizer)
    platform = mesh.devices.flat[0].platform
    # XLA counts the body of a loop once, and off the CPU the parts are a loop
    repeats = 1 if platform == "cpu" else run.microbatches
    if run.reproducible:
        return _reproducible(run, state, train, data, recipe, mesh, per_call=per_call)
    if data is None:
        batch = {
            name: jax.ShapeDtypeStruct(
                (run.batch_size, *field.shape), field.dtype, sharding=sharding.batch(mesh)
            )
            for name, field in train.fields.items()
        }
        batch["id"] = jax.ShapeDtypeStruct(
            (run.batch_size,), jnp.int32, sharding=sharding.batch(mesh)
        )
        single = train_steps.make_train_step(*parts, mesh=mesh, **recipe)
        lowered = single.lower(state, batch)
        compiled = lowered.compile()
        feed = feeds.StreamFeed(
            _checked(single) if run.debug_nans else compiled, _stream(run, state, train, mesh)
        )
        return Training(
            feed,
            1,
            repeats * feeds.flops_of(lowered),
            _memory(state, data, compiled),
            _copied(state, compiled),
        )
    steps = train_steps.make_train_steps(*parts, batch_size=run.batch_size, mesh=mesh, **recipe)
    count = feeds.device_count(1, data)
    lowered = steps.single.lower(state, data, count)
    flops = repeats * feeds.flops_of(lowered)
    if run.debug_nans:
        return Training(
            feeds.ResidentFeed(_checked(steps.single), None, data),
            1,
            flops,
            _memory(state, data, lowered.compile()),
        )
    chosen = per_call or feeds.steps_per_call(lowered, platform, run.log_every)
    compiled = (
        lowered.compile() if chosen == 1 else steps.several.lower(state, data, count).compile()
    )
    feed = feeds.ResidentFeed(compiled, None if chosen == 1 else compiled, data)
    return Training(feed, chosen, flops, _memory(state, data, compiled), _copied(state, compiled))


def _reproducible(
    run: config.Run,
    state: TrainState,
    train: Table,
    data: Batch | None,
    recipe: Options,
    mesh: Mesh,
    *,
    per_call: int | None,
) -> Training:
    """Training by one-device programs; they are compiled at their first call."""
    made = Recipe(run.model, run.task, run.optimizer, **recipe)
    rows = run.batch_size // run.logical_shards
    part = {
        name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
        for name, field in train.fields.items()
    }
    part["id"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    lowered = jax.jit(lambda state, part: gradients.total(made, state, part)).lower(whole, part)
    flops = run.logical_shards * feeds.flops_of(lowered)
    trainer = reproducible.Trainer(made, mesh, run.logical_shards)
    chosen = (
        1
        if data is None
        else per_call or feeds.steps_per_call(lowered, mesh.devices.flat[0].platform, run.log_every)
    )
    source = _stream(run, state, train, mesh) if data is None else data
    memory = _reproducible_memory(state, data, mesh, run.logical_shards // mesh.size)
    return Training(feeds.ReproducibleFeed(trainer, source, run.batch_size), chosen, flops, memory)


def _stream(run: config.Run, state: TrainState, train: Table, mesh: Mesh) -> pipeline.Stream:
    place = jax.device_get(state.position)
    start = {"seed": int(place.seed), "epoch": int(place.epoch), "offset": int(place.offset)}
    return pipeline.Stream(train, batch_size=run.batch_size, sharding=sharding.batch(mesh), **start)


def _checked(jitted: Any) -> Any:
    """The step as --debug_nans needs it: one that made a NaN runs again, operation by operation, so
    that jax can say which one it was."""
    # takes over no state: there must be something to run again from
    kept = jax.jit(jitted.__wrapped__)

    def call(*arguments: Any) -> Any:
        result = kept(*arguments)
        numbers = [
            leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        if any(np.isnan(number).any() for number in jax.device_get(numbers)):
            jitted.__wrapped__(*arguments)  # raises FloatingPointError
        return result

    return call


def _memory(state: TrainState, data: Batch | None, compiled: Any) -> dict[str, int]:
    analysis = None if compiled is None else compiled.memory_analysis()
    parts: Mapping[str, tree.PyTree] = {
        "parameters": (state.params, state.collections),
        "optimizer state": state.opt_state,
        "averaged parameters": state.ema,
        "data": data,
    }
    sizes = {name: state_bytes(part) for name, part in parts.items()}
    sizes["gradients, activations, scratch"] = int(getattr(analysis, "temp_size_in_bytes", 0) or 0)
    return {name: size for name, size in sizes.items() if size}


def _reproducible_memory(
    state: TrainState, data: Batch | None, mesh: Mesh, each: int
) -> dict[str, int]:
    """What reproducible steps hold besides: a whole state where only a part is kept, and the
    gradients of each of a device's logical shards."""
    leaves = jax.tree.leaves(state)
    whole = sharding.bytes_per_device(leaves, [sharding.replicated(mesh)] * len(leaves))
    more = {
        "whole state while computing": whole if whole > state_bytes(state) else 0,
        f"gradients of {each} logical shard{'s' if each > 1 else ''} and their sum": (
            (each + 1) * 4 * tree.size(state.params)
        ),
    }
    return _memory(state, data, None) | {name: size for name, size in more.items() if size}


def _copied(state: TrainState, compiled: Any) -> int:
    """Bytes of a donated state that its successor does not lie in."""
    analysis = compiled.memory_analysis()
    taken = getattr(analysis, "alias_size_in_bytes", None)
    if taken is None:
        return 0
    # a GPU's program counts what lies in the host's memory apart
    taken += getattr(analysis, "host_alias_size_in_bytes", 0)
    return max(0, state_bytes(state) + state_bytes(state, host=True) - taken)


def state_bytes(state: tree.PyTree, *, host: bool = False) -> int:
    """How many bytes of a state, or of a part, each device holds; or its host does for it
    (--offload)."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(state)
        if hasattr(leaf, "sharding") and (leaf.sharding.memory_kind == "pinned_host") == host
    ]
    return sharding.bytes_per_device(leaves, [leaf.sharding for leaf in leaves])
