"""What comes later has its place: states stacked over seeds, orders of one's own, outputs that are
trees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from test_run import start

from jaxtrain import metrics
from jaxtrain.data import order, pipeline
from jaxtrain.data.table import ArrayTable
from jaxtrain.models import MLP
from jaxtrain.optimizers import SGD, AdamW
from jaxtrain.parallel import mesh
from jaxtrain.tasks import Classification
from jaxtrain.train import lowering
from jaxtrain.train.recipe import Recipe
from jaxtrain.train.state import init_state
from jaxtrain.train.steps import make_train_step, make_train_steps

ROWS = {
    "image": np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32),
    "label": np.arange(24, dtype=np.int32) % 3,
}
PARTS = (MLP(num_classes=3, widths=(4,)), Classification(), AdamW())
BATCH = {name: jnp.asarray(array[:8]) for name, array in ROWS.items()}


def raw(tree: Any) -> Any:
    """Keys as the numbers that they are, so that NumPy can compare them."""
    return jax.tree.map(
        lambda leaf: np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
        tree,
    )


def member(stacked: Any, index: int) -> Any:
    """One of a stack of trees."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def test_states_stack_over_seeds() -> None:
    """Every number of a stacked state is that of the state made alone, and so is a step of it."""
    seeds = jnp.arange(3, dtype=jnp.uint32)
    stacked = jax.vmap(lambda seed: init_state(*PARTS, BATCH, seed=seed))(seeds)
    step = make_train_step(*PARTS)
    after, _ = jax.vmap(step.__wrapped__, in_axes=(0, None))(stacked, BATCH)
    for seed in range(3):
        alone = init_state(*PARTS, BATCH, seed=seed)
        assert int(alone.position.seed) == seed
        jax.tree.map(np.testing.assert_array_equal, raw(alone), raw(member(stacked, seed)))
        stepped, _ = step(alone, BATCH)
        jax.tree.map(
            lambda one, many: np.testing.assert_allclose(one, many, rtol=2e-5, atol=1e-7),
            stepped.params,
            member(after.params, seed),
        )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Of every three examples two come from the first `split` rows and one from the rest; the
    position is of another shape than the shuffled one's."""

    split: int
    length: int

    def start(self, seed: Any) -> dict[str, Any]:
        return {"taken": np.zeros(2, np.uint32)}

    def ids(self, position: dict[str, Any], count: int, xp: Any = np) -> Any:
        place = position["taken"][0] + xp.arange(count, dtype=xp.uint32)
        first = (place - place // 3) % self.split
        rest = self.split + (place // 3) % (self.length - self.split)
        return xp.where(place % 3 == 2, rest, first).astype(xp.int32)

    def advance(self, position: dict[str, Any], count: int) -> dict[str, Any]:
        more = np.array([count, 1], np.uint32)
        return {"taken": position["taken"] + more}


def test_another_order_takes_the_place_of_the_shuffled_one() -> None:
    """Over data on the device and over a stream: the same examples, and the position moves as the
    order itself says."""
    mixture, seen = Mixture(6, 24), []
    recipe = Recipe(*PARTS, order=mixture)
    programs = lowering.lower(recipe, BATCH, mesh.make("data:1"))
    state = programs.initialize(0)
    data = {name: jnp.asarray(array) for name, array in ROWS.items()}
    steps = make_train_steps(*PARTS, batch_size=8, order=mixture)
    once, _ = steps(init_state(*PARTS, BATCH, order=mixture), data, jnp.int32(3))
    assert once.position["taken"].tolist() == [24, 3]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pipeline.BatchLoader(
        ArrayTable(dict(ROWS)),
        order=mixture,
        position=jax.device_get(state.position),
        batch_size=8,
        sharding=where,
    ) as stream:
        for _ in range(3):
            batch = next(stream)
            seen += batch["id"].tolist()
            state, _ = programs.train_step(state, batch)
    assert sum(row >= 6 for row in seen) == 8
    assert state.position["taken"].tolist() == [24, 3]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
        once.params,
        state.params,
    )


def test_an_order_without_a_length_counts_on_and_has_no_ids() -> None:
    shuffled = order.Shuffled()
    position = shuffled.advance(shuffled.start(0), 7)
    assert int(position.offset) == 7
    with pytest.raises(ValueError, match=r"^order: Shuffled\(\) has no length; give Shuffled\(num"):
        shuffled.ids(position, 3)


class Heads(nn.Module):
    """Outputs that are a tree: hidden states, the head's kernel, and a loss of the model's own."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        hidden = nn.relu(nn.Dense(6)(x.reshape(len(x), -1)))
        kernel = self.param("head", nn.initializers.lecun_normal(), (6, 4))
        return {"hidden": hidden, "head": kernel, "own": 1e-3 * jnp.square(hidden).sum(-1)}


@dataclasses.dataclass(frozen=True)
class HiddenTask(Classification):
    """Cross-entropy from hidden states and head, and the model's own loss beside it."""

    def loss(self, outputs: Any, batch: Any, *, train: bool = True) -> metrics.Sums:
        logits = outputs["hidden"] @ outputs["head"]
        sums = super().loss(logits, batch, train=train)
        total, count = sums["loss"]
        weights = batch.get("weight", jnp.ones(len(logits)))
        return sums | {"loss": (total + (outputs["own"] * weights).sum(), count)}


def test_a_loss_may_consume_a_tree_of_outputs(tmp_path: Any) -> None:
    """A step against one by hand, then a whole run with evaluation."""
    task, optimizer = HiddenTask(), SGD(learning_rate=0.1, momentum=0.0)
    parts = (Heads(), task, optimizer)
    state = init_state(*parts, BATCH)
    params = jax.tree.map(jnp.copy, state.params)

    def by_hand(params: Any) -> jax.Array:
        dense = params["Dense_0"]
        hidden = jax.nn.relu(BATCH["image"] @ dense["kernel"] + dense["bias"][None])
        logits = hidden @ params["head"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["label"])
        return (loss + 1e-3 * jnp.square(hidden).sum(-1)).mean()

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(by_hand)(params))
    after, _ = make_train_step(*parts)(state, BATCH)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        after.params,
        expected,
    )
    assert start(tmp_path / "run", "--steps=2", model=Heads(), task=HiddenTask()) == 0
