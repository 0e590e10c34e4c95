"""The training step: a batch's trip from raw examples to the next state, top to bottom.

prepare -> augment -> cast -> model -> task -> gradients (as sums, over all microbatches) -> clip ->
optimizer -> average. All that comes out of the first half is a sum, never a mean, so microbatches,
logical shards and processes add up exactly. Nothing here is compiled: `steps.py` does that.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain import adapters, block_loop, late_logits, messages, metrics, precision, rng, tree
from jaxtrain.errors import UserError
from jaxtrain.optimizers import evaluation_params, trained
from jaxtrain.parallel import fsdp, sharding
from jaxtrain.precision import loss_scale, stochastic_rounding
from jaxtrain.train import auxiliary_losses, collection_sums, frozen, hyper, padding
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import (
    Placement,
    TrainState,
    on_device,
    parameter_axes,
    place,
    working_opt_state,
)
from jaxtrain.tree import Batch


def _products(primitive: Any, *shapes: Any, **params: Any) -> bool:
    """The policy that keeps the results of products, and of cuDNN's attention, which is two of
    them."""
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or jax.checkpoint_policies.dots_saveable(primitive, *shapes, **params)


REMAT: dict[str, Any] = {
    "dots": _products,
    "dense": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.save_only_these_names("block"),
}
"""What the backward pass may keep of the forward pass, by the names of --remat; models mark the
ends of their blocks (`layers.block_end`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """What a batch, or a part of one, contributes to an update."""

    gradients: tree.PyTree
    """Of the summed loss, by the trained parameters, None for the others. Of complex parameters the
    conjugate of jax's: the way up, as for real ones."""
    sums: metrics.Sums
    """(sum, count) of the task's metrics."""
    collections: dict[str, tree.PyTree]
    """The model's other variables after the part; of several parts the mean is kept, for an average
    of running averages is the running average of the mean. Whole numbers are what the pass added to
    them: sums of large ones, such as a table's, would overflow."""


def train_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    places: Placement | None = None,
) -> tuple[TrainState, metrics.Sums]:
    """One update by one raw batch: the new state and the (sum, count) of every metric.

    `places` spares the abstract initialization that else says where the state lies.
    """
    axes = parameter_axes(recipe, batch) if places is None else places.axes
    places = _placement(recipe, state, batch, mesh, places, axes)
    total = gradients(recipe, state, batch, mesh=mesh, places=places)
    size = jax.tree.leaves(dict(batch))[0].shape[0]
    return update(recipe, state, total, batch_size=size, axes=axes, places=places)


def gradients(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    *,
    mesh: Mesh | None = None,
    places: Placement | None = None,
    shard: int | jax.Array = 0,
) -> Total:
    """The total of a raw batch, over all its microbatches.

    `places` says where parameters lie on the mesh; `shard` gives parts of one batch random streams
    of their own.
    """
    recipe = hyper.bind(recipe, state.hyper)
    batch = padding.replaced(prepared(recipe, batch, mesh), recipe.dtype)
    batch = padding.ignored_replaced(batch, recipe.task, recipe.dtype)
    batch = augmented(recipe, state, batch, shard)
    batch = drawn(recipe, state, batch, shard)

    def one(part: Batch, index: int | jax.Array) -> Total:
        key = jax.random.fold_in(
            rng.stream(state.key, "dropout", state.step), shard * recipe.microbatches + index
        )
        return _of_part(recipe, state, part, key, places)

    return (
        one(batch, 0)
        if recipe.microbatches == 1
        else _over_microbatches(one, batch, recipe.microbatches, mesh)
    )


def prepared(recipe: Recipe, batch: Batch, mesh: Mesh | None) -> Batch:
    """A raw batch as the model wants it, laid out on the mesh."""
    batch = dict(batch)
    if mesh is not None and mesh.size > 1:
        batch = jax.lax.with_sharding_constraint(batch, sharding.batch(mesh))
    return batch if recipe.prepare is None else recipe.prepare(batch)


def augmented(recipe: Recipe, state: TrainState, batch: Batch, shard: int | jax.Array = 0) -> Batch:
    """A prepared batch, augmented by example; mixtures draw for each logical shard."""
    if recipe.augment is None:
        return batch
    keys_B = _keys_of_examples(rng.stream(state.key, "augment", state.step), batch, shard)
    mixture = rng.stream(state.key, "mixture", state.step)
    return recipe.augment(
        batch,
        keys_B,
        mixture if isinstance(shard, int) and shard == 0 else jax.random.fold_in(mixture, shard),
    )


def drawn(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    shard: int | jax.Array = 0,
    *,
    evaluates: bool = False,
) -> Batch:
    """A batch with what the task draws of each example, such as the tokens that it hides: anew at
    each step, and in evaluation always the same."""
    task: Any = recipe.task
    if not hasattr(task, "draw"):
        return batch
    name, step = ("task in evaluation", 0) if evaluates else ("task", state.step)
    return task.draw(batch, _keys_of_examples(rng.stream(state.key, name, step), batch, shard))


def _keys_of_examples(key: jax.Array, batch: Batch, shard: int | jax.Array) -> jax.Array:
    """A key for each example by its id, or its place where there are no ids."""
    rows = jax.tree.leaves(dict(batch))[0].shape[0]
    ids_B = (
        batch["id"]
        if "id" in batch
        else jnp.arange(rows, dtype=jnp.uint32) + jnp.uint32(shard) * np.uint32(rows)
    )
    return rng.per_example(key, ids_B)


def _apply(recipe: Recipe, places: Placement | None) -> adapters.Apply:
    """The model on whole parameters, in the precision of the recipe."""
    apply = adapters.functions(recipe.model).apply
    if places is not None:
        apply = fsdp.with_gathered_parameters(
            apply,
            places.axes,
            places.state.params,
            places.mesh,
            looped=block_loop.looped(recipe.model),
        )
    # Cast first, gather then: half the bytes.
    return precision.apply_in(precision.POLICIES[recipe.precision], apply)


def _of_part(
    recipe: Recipe, state: TrainState, part: Batch, key: jax.Array, places: Placement | None
) -> Total:
    """Forward and backward of one microbatch."""
    inputs = recipe.task.inputs(part)
    apply, trains = _apply(recipe, places), recipe.optimizer.trained(state.params)

    def forward(
        params: tree.PyTree, inputs: Any, key: jax.Array
    ) -> tuple[Any, dict[str, tree.PyTree]]:
        return apply({"params": params} | state.collections, inputs, train=True, key=key)

    if recipe.remat != "none":
        forward = _recomputed(forward, REMAT[recipe.remat], block_loop.looped(recipe.model))

    def loss(
        leaves: tree.PyTree,
    ) -> tuple[jax.Array, tuple[metrics.Sums, dict[str, tree.PyTree], jax.Array]]:
        params = trained.merged(trains, leaves, state.params)
        result, changed = forward(params, inputs, key)
        collections, sown = adapters.split_sown(changed, state.collections)
        sums = auxiliary_losses.task_sums(recipe.task, result, part, sown, recipe.aux_losses)
        value, count = sums["loss"]
        if state.scaling is None:
            return value, (sums, collections, jnp.float32(1))
        # The scale meets the mean loss, as its authors mean it: the sum of a large batch would
        # overflow by itself.
        factor = state.scaling.scale / jax.lax.stop_gradient(jnp.maximum(count, 1))
        return value * factor, (sums, collections, factor)

    (_, (sums, collections, factor)), gradients = jax.value_and_grad(loss, has_aux=True)(
        trained.only(trains, state.params)
    )
    gradients = jax.tree.map(_upward, gradients)
    if state.scaling is not None:
        gradients = jax.tree.map(lambda gradient: gradient / factor, gradients)
    return Total(gradients, sums, collection_sums.added(collections, state.collections))


def _recomputed(forward: Any, policy: Any, looped: Sequence[str]) -> Any:
    """A forward pass of which the backward pass keeps only what the policy lets it.

    Around a loop it would compute all turns again before it went back through the last, and hold
    what they keep; so the blocks of a loop are recomputed in it, one by one.
    """
    if not looped:
        return jax.checkpoint(forward, policy=policy)

    def told(*arguments: Any) -> Any:
        with block_loop.told(keep=policy):
            return forward(*arguments)

    return told


def _upward(gradient: jax.Array) -> jax.Array:
    """The direction in which the loss rises: of a complex parameter the conjugate of what jax calls
    its gradient."""
    return jnp.conj(gradient) if jnp.iscomplexobj(gradient) else gradient


def _over_microbatches(
    one: Callable[[Batch, Any], Total], batch: Batch, count: int, mesh: Mesh | None
) -> Total:
    """The total over the parts. Each starts from the step's own collections, so batch statistics
    move once a step however many parts there are."""

    rows = jax.tree.leaves(dict(batch))[0].shape[0]
    if rows % count:
        raise UserError(
            f"microbatches={count}: must divide the batch of {rows} examples; nearest:"
            f" {messages.nearest_divisors(rows, count)}"
        )

    def split(array: jax.Array) -> jax.Array:
        # Part m takes examples m, m + count, ...: each device's share of the batch then gives an
        # even share of every part.
        return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, dict(batch))
    if (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) == "cpu":
        # Unrolled, for convolutions in a loop are slow there; elsewhere a loop keeps the memory of
        # one part.
        results = [
            one(jax.tree.map(lambda array, index=index: array[index], parts), index)
            for index in range(count)
        ]
        whole = jax.tree.map(
            lambda *leaves: functools.reduce(collection_sums.add, leaves), *results
        )
    else:
        shapes = jax.eval_shape(one, jax.tree.map(lambda array: array[0], parts), 0)
        zeros = jax.tree.map(collection_sums.zeros, shapes)

        def body(carry: Total, item: Any) -> tuple[Total, None]:
            return jax.tree.map(collection_sums.add, carry, one(*item)), None

        whole, _ = jax.lax.scan(body, zeros, (parts, jnp.arange(count)))
    collections = collection_sums.mean(whole.collections, count)
    return dataclasses.replace(whole, collections=collections)


def mean_gradients(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    places: Placement | None = None,
) -> tuple[tree.PyTree, metrics.Sums]:
    """The gradient of the mean loss, before clipping, and the sums; nothing is changed."""
    places = _placement(recipe, state, batch, mesh, places)
    total = gradients(recipe, state, batch, mesh=mesh, places=places)
    count = jnp.maximum(total.sums["loss"][1], 1e-9)
    return jax.tree.map(lambda gradient: gradient / count, total.gradients), dict(total.sums)


def update(
    recipe: Recipe,
    state: TrainState,
    total: Total,
    *,
    batch_size: int,
    axes: tree.PyTree,
    places: Placement | None = None,
) -> tuple[TrainState, metrics.Sums]:
    """One update by the total of a batch of `batch_size` examples.

    `axes` are the logical axes of the parameters, by which the optimizer knows what each is. The
    sums are those of the total, `learning_rate` (where it is known) and `grad_norm` (before
    clipping); under loss scaling `loss_scale` and `skipped`, and a skipped step counts in no other
    metric.
    """
    bound = hyper.bind(recipe, state.hyper)
    count = jnp.maximum(total.sums["loss"][1], 1e-9)
    gradients = jax.tree.map(lambda gradient: gradient / count, total.gradients)
    norm = optax.tree.norm(gradients)
    gradients = _clipped(gradients, norm, bound.clip_norm)
    rate = bound.optimizer.learning_rate * bound.schedule.multiplier(state.step, bound.total_steps)
    trains = bound.optimizer.trained(state.params)
    transform = bound.optimizer.transform(state.params, rate, axes)
    updates, opt_state = transform.update(
        gradients,
        working_opt_state(bound, state, transform),
        state.params,
        value=total.sums["loss"][0] / count,  # some of Optax's own look at the loss
        grad=gradients,
    )
    rate = bound.optimizer.logged_rate(rate, opt_state)
    if recipe.optimizer_state == "bf16":
        opt_state = stochastic_rounding.to_bf16(
            opt_state, rng.stream(state.key, "rounding", state.step)
        )
    moved = optax.apply_updates(trained.only(trains, state.params), updates)
    params = trained.merged(trains, moved, state.params)
    collections = collection_sums.after(total.collections, state.collections)
    one = jnp.float32(1)
    sums = dict(total.sums)
    if rate is not None:
        sums["learning_rate"] = (jnp.float32(rate), one)
    sums["grad_norm"] = (norm, one)
    new = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        collections=frozen.kept(trains, state.collections, collections),
        ema=_average(bound.ema_decay, state, params, trains),
        hyper=state.hyper,
        key=state.key,
        position=recipe.order.advance(state.position, batch_size),
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
        new, sums = _unless_overflown(old, new, sums, total, state.scaling)
    if places is not None:
        # Nothing else says that the new state should lie as the old one did.
        new = _placed(new, places.state, offload=recipe.offload)
    return new, sums


def _clipped(gradients: tree.PyTree, norm: jax.Array, most: Any) -> tree.PyTree:
    """The gradients, scaled down to a norm of at most `most`; None is no bound."""
    if most is None:
        return gradients
    return jax.tree.map(
        lambda gradient: gradient * jnp.minimum(1.0, most / (norm + 1e-9)), gradients
    )


def _unless_overflown(
    state: TrainState,
    new: TrainState,
    sums: metrics.Sums,
    total: Total,
    scaling: loss_scale.LossScale,
) -> tuple[TrainState, metrics.Sums]:
    """The new state, or the old one where a gradient is not finite: then only the step, the
    position and the scale move on."""
    finite = loss_scale.all_finite((total.gradients, total.sums["loss"]))
    parts = ("params", "opt_state", "collections", "ema")
    kept = {
        name: loss_scale.select(finite, getattr(new, name), getattr(state, name)) for name in parts
    }
    zero, one = jnp.float32(0), jnp.float32(1)
    counted = jax.tree.map(lambda number: jnp.where(finite, number, zero), dict(sums))
    counted |= {
        "loss_scale": (scaling.scale, one),
        "skipped": (jnp.where(finite, zero, one), one),
    }
    return dataclasses.replace(new, **kept, scaling=loss_scale.update(scaling, finite)), counted


def _placed(new: TrainState, shardings: TrainState, *, offload: str) -> TrainState:
    if offload == "optimizer":
        # A constraint says nothing of memories; only a transfer does.
        moved = jax.device_put(new.opt_state, shardings.opt_state)
        rest = dataclasses.replace(new, opt_state=None)
        rest = jax.lax.with_sharding_constraint(
            rest, dataclasses.replace(shardings, opt_state=None)
        )
        return dataclasses.replace(rest, opt_state=moved)
    return jax.lax.with_sharding_constraint(new, shardings)


def _average(
    decay: jax.Array | None, state: TrainState, params: tree.PyTree, trains: tree.PyTree
) -> tree.PyTree:
    """The next average, of the trained parameters; that of the others is what they are."""
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def one(keep: bool, old: jax.Array, new: jax.Array) -> jax.Array:
        if not keep:
            return _widened(new, old.dtype)
        new = _widened(new, old.dtype)
        return (now * old + (1.0 - now) * new).astype(old.dtype)

    return jax.tree.map(one, trains, state.ema, params)


def _widened(leaf: jax.Array, dtype: Any) -> jax.Array:
    """A leaf in a dtype that holds its own, with the bits that it is stored with: the compiler
    would leave out a rounding that is widened again at once."""
    if leaf.dtype == dtype:
        return leaf
    stored = jnp.finfo(leaf.dtype)
    return jax.lax.reduce_precision(leaf.astype(dtype), stored.nexp, stored.nmant)


def evaluation_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    places: Placement | None = None,
) -> metrics.Sums:
    """The sums of a raw batch in evaluation."""
    bound = hyper.bind(recipe, state.hyper)
    places = _placement(recipe, state, batch, mesh, places)
    batch = to_evaluate(bound, state, batch, mesh)
    return dict(bound.task.loss(outputs(bound, state, batch, places), batch, train=False))


def to_evaluate(recipe: Recipe, state: TrainState, batch: Batch, mesh: Mesh | None) -> Batch:
    """A raw batch as evaluation sees it."""
    batch = padding.replaced(prepared(recipe, batch, mesh), recipe.dtype, by_row=False)
    return drawn(recipe, state, batch, evaluates=True)


def prediction_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    places: Placement | None = None,
) -> dict[str, jax.Array]:
    """What the model says of each example, by the task's `examine`, with its `id` and `weight`."""
    bound = hyper.bind(recipe, state.hyper)
    places = _placement(recipe, state, batch, mesh, places)
    raw, batch = batch, prepared(bound, batch, mesh)
    batch = drawn(bound, state, batch, evaluates=True)
    return _examined(bound, outputs(bound, state, batch, places), raw, batch, mesh)


def measuring_step(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None = None,
    places: Placement | None = None,
) -> tuple[metrics.Sums, dict[str, jax.Array]]:
    """The sums of a raw batch in evaluation and what the task's `examine` says of each example, by
    one forward pass."""
    bound = hyper.bind(recipe, state.hyper)
    places = _placement(recipe, state, batch, mesh, places)
    raw, batch = batch, to_evaluate(bound, state, batch, mesh)
    result = outputs(bound, state, batch, places)
    sums = dict(bound.task.loss(result, batch, train=False))
    return sums, _examined(bound, result, raw, batch, mesh)


def _examined(
    recipe: Recipe, result: Any, raw: Batch, batch: Batch, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """What the task's `examine` says, with `id` and `weight`; that of the task and that of the
    batch multiplied, for either may leave an example out."""
    kept = {name: raw[name] for name in ("id", "weight") if name in raw}
    task: Any = recipe.task
    found = dict(task.examine(result, batch))
    rows = jax.tree.leaves(dict(batch))[0].shape[0]
    for name, array in found.items():
        if jnp.shape(array)[:1] != (rows,):
            raise UserError(
                f"task {type(task).__name__}: examine gives {name!r} of shape {jnp.shape(array)};"
                f" every array must have a row for each of the {rows} examples"
            )
    if "weight" in found and "weight" in kept:
        own, weight = found["weight"], kept["weight"]
        kept["weight"] = own * weight.reshape(weight.shape + (1,) * (own.ndim - weight.ndim))
    found |= kept
    if mesh is None:
        return found
    # Every process can read an array only if it holds the whole of it.
    return jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))


def outputs(
    recipe: Recipe, state: TrainState, batch: Batch, places: Placement | None = None
) -> Any:
    """What the model says of a prepared batch in evaluation: no dropout, running averages, averaged
    parameters if there are."""
    variables = {"params": evaluated_params(recipe, state)} | state.collections
    apply, inputs = _apply(recipe, places), recipe.task.inputs(batch)
    try:
        return apply(variables, inputs, train=False)[0]
    except adapters.NeedsKey:
        return _by_example(apply, variables, inputs, _evaluation_keys(state, batch))


def evaluated_params(recipe: Recipe, state: TrainState) -> tree.PyTree:
    """The parameters that evaluation uses: the average, those that the optimizer is to be judged
    by, or the raw ones."""
    if state.ema is None:
        opt_state = on_device(recipe, state.opt_state)
        return evaluation_params(recipe.optimizer, opt_state, state.params)
    # The average of narrow floats is wider than they are, and the model computes as in training
    return jax.tree.map(
        lambda mean, leaf: mean if mean.dtype == leaf.dtype else mean.astype(leaf.dtype),
        state.ema,
        state.params,
    )


def _evaluation_keys(state: TrainState, batch: Batch) -> jax.Array:
    """A key for each example, made of the seed and its id: what a model draws in evaluation depends
    neither on the batch around an example nor on the step."""
    rows = jax.tree.leaves(dict(batch))[0].shape[0]
    ids_B = batch["id"] if "id" in batch else jnp.arange(rows, dtype=jnp.int32)
    return rng.per_example(rng.stream(state.key, "evaluation", 0), ids_B)


def _by_example(
    apply: adapters.Apply, variables: adapters.Variables, inputs: Any, keys_B: jax.Array
) -> Any:
    """The outputs of a model that draws, each example with its own key."""

    def one(key: jax.Array, inputs: Any) -> Any:
        alone = jax.tree.map(lambda array: array[None], inputs)
        outputs = late_logits.whole(apply(variables, alone, train=False, key=key)[0])
        return jax.tree.map(lambda array: array[0], outputs)

    return jax.vmap(one)(keys_B, inputs)


def _placement(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    mesh: Mesh | None,
    known: Placement | None,
    axes: tree.PyTree | None = None,
) -> Placement | None:
    """Where the state lies, or None where there is only one place for it."""
    if mesh is None or (mesh.size == 1 and recipe.offload == "none"):
        return None
    return known or place(recipe, state, batch, mesh, axes)
