"""Gradients: what one batch says, from raw examples to sums of gradients and metrics.

In the order of a batch's trip: prepare -> augment -> cast -> model -> task -> gradients. All that
comes out is a sum, never a mean, so microbatches, logical shards and processes add up exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain import adapters, metrics, precision, rng, tree
from jaxtrain.optimizers import evaluation_params
from jaxtrain.parallel import fsdp, sharding
from jaxtrain.train import hyper
from jaxtrain.train.recipe import Batch, Recipe
from jaxtrain.train.state import TrainState, parameter_places, working_opt_state

REMAT: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_saveable,
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
    """Of the summed loss."""
    sums: metrics.Sums
    """(sum, count) of the task's metrics."""
    collections: dict[str, tree.PyTree]
    """The model's other variables after the part; of several parts the mean is kept, for an average
    of running averages is the running average of the mean."""


def total(
    recipe: Recipe,
    state: TrainState,
    batch: Batch,
    *,
    mesh: Mesh | None = None,
    shard: int | jax.Array = 0,
) -> Total:
    """The total of a raw batch, over all its microbatches; `shard` gives parts of one batch random
    streams of their own."""
    recipe = hyper.bind(recipe, state.hyper)
    batch = augmented(recipe, state, prepared(recipe, batch, mesh), shard)

    def one(part: Batch, index: int | jax.Array) -> Total:
        key = jax.random.fold_in(
            rng.stream(state.key, "dropout", state.step), shard * recipe.microbatches + index
        )
        return _of_part(recipe, state, part, key, mesh)

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
    rows = jax.tree.leaves(dict(batch))[0].shape[0]
    ids_B = (
        batch["id"]
        if "id" in batch
        else jnp.arange(rows, dtype=jnp.uint32) + jnp.uint32(shard) * np.uint32(rows)
    )
    keys_B = rng.per_example(rng.stream(state.key, "augment", state.step), ids_B)
    mixture = rng.stream(state.key, "mixture", state.step)
    return recipe.augment(
        batch,
        keys_B,
        mixture if isinstance(shard, int) and shard == 0 else jax.random.fold_in(mixture, shard),
    )


def outputs(recipe: Recipe, state: TrainState, batch: Batch, mesh: Mesh | None) -> Any:
    """What the model says of a prepared batch in evaluation: no dropout, running averages, averaged
    parameters if there are."""
    params = state.ema
    if params is None:
        params = evaluation_params(recipe.optimizer, working_opt_state(recipe, state), state.params)
    inputs = recipe.task.inputs(batch)
    return _apply(recipe, inputs, params, mesh)(
        {"params": params} | state.collections, inputs, train=False
    )[0]


def _apply(recipe: Recipe, inputs: Any, params: tree.PyTree, mesh: Mesh | None) -> adapters.Apply:
    """The model on whole parameters, in the precision of the recipe."""
    apply = adapters.functions(recipe.model).apply
    if mesh is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (inputs, params)
        )
        apply = fsdp.gathering(apply, *parameter_places(recipe, *shapes, mesh), mesh)
    # Cast first, gather then: half the bytes.
    return precision.apply_in(precision.POLICIES[recipe.precision], apply)


def _of_part(
    recipe: Recipe, state: TrainState, part: Batch, key: jax.Array, mesh: Mesh | None
) -> Total:
    """Forward and backward of one microbatch."""
    inputs = recipe.task.inputs(part)
    apply = _apply(recipe, inputs, state.params, mesh)

    def forward(
        params: tree.PyTree, inputs: Any, key: jax.Array
    ) -> tuple[Any, dict[str, tree.PyTree]]:
        return apply(
            {"params": params} | state.collections, inputs, train=True, rngs={"dropout": key}
        )

    if recipe.remat != "none":
        forward = jax.checkpoint(forward, policy=REMAT[recipe.remat])

    def loss(
        params: tree.PyTree,
    ) -> tuple[jax.Array, tuple[metrics.Sums, dict[str, tree.PyTree], jax.Array]]:
        result, collections = forward(params, inputs, key)
        sums = dict(recipe.task.loss(result, part))
        value, count = sums["loss"]
        if state.scaling is None:
            return value, (sums, collections, jnp.float32(1))
        # The scale meets the mean loss, as its authors mean it: the sum of a large batch would
        # overflow by itself.
        factor = state.scaling.scale / jax.lax.stop_gradient(jnp.maximum(count, 1))
        return value * factor, (sums, collections, factor)

    (_, (sums, collections, factor)), gradients = jax.value_and_grad(loss, has_aux=True)(
        state.params
    )
    if state.scaling is not None:
        gradients = jax.tree.map(lambda gradient: gradient / factor, gradients)
    return Total(gradients, sums, collections)


def _over_microbatches(
    one: Callable[[Batch, Any], Total], batch: Batch, count: int, mesh: Mesh | None
) -> Total:
    """The total over the parts. Each starts from the step's own collections, so batch statistics
    move once a step however many parts there are."""

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
        whole = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *results)
    else:
        shapes = jax.eval_shape(one, jax.tree.map(lambda array: array[0], parts), 0)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def body(carry: Total, item: Any) -> tuple[Total, None]:
            return jax.tree.map(jnp.add, carry, one(*item)), None

        whole, _ = jax.lax.scan(body, zeros, (parts, jnp.arange(count)))
    return dataclasses.replace(whole, collections=mean(whole.collections, count))


def mean(collections: dict[str, tree.PyTree], count: int) -> dict[str, tree.PyTree]:
    """The mean of summed collections, in their own dtypes."""
    return jax.tree.map(lambda leaf: (leaf / count).astype(leaf.dtype), collections)
