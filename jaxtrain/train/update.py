"""The update: from the total of a batch to the next state. clip -> optimizer -> average, and a step
whose gradients overflowed changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain import metrics, rng, tree
from jaxtrain.data import order
from jaxtrain.precision import loss_scale, stochastic_rounding
from jaxtrain.train import hyper
from jaxtrain.train.gradients import Total
from jaxtrain.train.recipe import Batch, Recipe
from jaxtrain.train.state import Position, TrainState, state_shardings, working_opt_state


def update(
    recipe: Recipe,
    state: TrainState,
    total: Total,
    batch: Batch,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[TrainState, metrics.Sums]:
    """One update by the total of a batch; `batch` shows shapes only.

    The sums are those of the total and `learning_rate` and `grad_norm` (before clipping); under
    loss scaling `loss_scale` and `skipped`, and a skipped step counts in no other metric.
    """
    bound = hyper.bind(recipe, state.hyper)
    count = jnp.maximum(total.sums["loss"][1], 1e-9)
    gradients = jax.tree.map(lambda gradient: gradient / count, total.gradients)
    norm = optax.tree.norm(gradients)
    if bound.clip_norm is not None:
        gradients = jax.tree.map(
            lambda gradient: gradient * jnp.minimum(1.0, bound.clip_norm / (norm + 1e-9)), gradients
        )
    rate = bound.optimizer.learning_rate * bound.schedule.multiplier(state.step, bound.total_steps)
    transform = bound.optimizer.transform(state.params, rate)
    updates, opt_state = transform.update(gradients, working_opt_state(bound, state), state.params)
    if recipe.optimizer_state == "bf16":
        opt_state = stochastic_rounding.to_bf16(
            opt_state, rng.stream(state.key, "rounding", state.step)
        )
    params = optax.apply_updates(state.params, updates)
    one = jnp.float32(1)
    sums = dict(total.sums) | {"learning_rate": (jnp.float32(rate), one), "grad_norm": (norm, one)}
    new = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        collections=total.collections,
        ema=_average(bound.ema_decay, state, params),
        hyper=state.hyper,
        key=state.key,
        position=_advance(state.position, batch_size, recipe.num_examples),
        scaling=state.scaling,
    )
    if state.scaling is not None:
        # The old state where the new one lies: one selection cannot read two memories.
        old = (
            state
            if recipe.offload == "none"
            else dataclasses.replace(
                state, opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device)
            )
        )
        new, sums = _unless_overflown(old, new, sums, total)
    if mesh is not None and (mesh.size > 1 or recipe.offload != "none"):
        # Nothing else says that the new state should lie as the old one did.
        new = _placed(new, state_shardings(recipe, batch, new, mesh), offload=recipe.offload)
    return new, sums


def _unless_overflown(
    state: TrainState, new: TrainState, sums: metrics.Sums, total: Total
) -> tuple[TrainState, metrics.Sums]:
    """The new state, or the old one where a gradient is not finite: then only the step, the
    position and the scale move on."""
    finite = loss_scale.all_finite((total.gradients, total.sums["loss"]))
    parts = ("params", "opt_state", "collections", "ema")
    kept = {
        name: loss_scale.keep(finite, getattr(new, name), getattr(state, name)) for name in parts
    }
    scaling = loss_scale.update(state.scaling, finite)
    zero, one = jnp.float32(0), jnp.float32(1)
    counted = jax.tree.map(lambda number: jnp.where(finite, number, zero), dict(sums))
    counted |= {
        "loss_scale": (state.scaling.scale, one),
        "skipped": (jnp.where(finite, zero, one), one),
    }
    return dataclasses.replace(new, **kept, scaling=scaling), counted


def _placed(new: TrainState, places: TrainState, *, offload: str) -> TrainState:
    if offload == "optimizer":
        # A constraint says nothing of memories; only a transfer does.
        moved = jax.device_put(new.opt_state, places.opt_state)
        rest = dataclasses.replace(new, opt_state=None)
        rest = jax.lax.with_sharding_constraint(rest, dataclasses.replace(places, opt_state=None))
        return dataclasses.replace(rest, opt_state=moved)
    return jax.lax.with_sharding_constraint(new, places)


def _average(decay: jax.Array | None, state: TrainState, params: tree.PyTree) -> tree.PyTree:
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(
        lambda old, new: (now * old + (1.0 - now) * new).astype(old.dtype), state.ema, params
    )


def _advance(position: Position, count: int, length: int | None) -> Position:
    if length is None:
        return dataclasses.replace(position, offset=position.offset + np.uint32(count))
    epoch, offset = order.advance(
        position.epoch, position.offset, np.uint32(count), np.uint32(length)
    )
    return dataclasses.replace(position, epoch=epoch, offset=offset)
