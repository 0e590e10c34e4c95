"""The levers of memory: recomputing, parts of a batch, the host's memory, small averages, and a
state that is taken over and not copied.

Dims: B batch, D width, T tokens.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.adapters import functions
from jaxtrain.models import layers
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import NAMES, AdamW
from jaxtrain.parallel import mesh, sharding
from jaxtrain.runner import compile as programs
from jaxtrain.tasks import Classification
from jaxtrain.train import state, steps, train_step


class Stack(nn.Module):
    """Two blocks with dropout: compiled in a fifth of a transformer's time, with all that
    recomputing has to deal with."""

    @nn.compact
    def __call__(self, x_BD: jax.Array, *, train: bool) -> jax.Array:
        for index in range(2):
            branch = layers.Dropout(0.1)(
                nn.gelu(layers.dense(16, ("embed", "mlp"), name=f"mlp{index}")(x_BD)), train
            )
            x_BD = layers.block_end(
                x_BD + layers.dense(8, ("mlp", "embed"), name=f"out{index}")(branch)
            )
        return x_BD


PARTS = (Stack(), Classification(), AdamW(learning_rate=0.01))
RANDOM = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RANDOM.normal(size=(8, 8)), jnp.float32),
    "label": jnp.asarray(RANDOM.integers(0, 8, 8), jnp.int32),
}
TOKENS_BT = jnp.asarray(RANDOM.integers(0, 8, (8, 13)), jnp.int32)


def trained(
    where: jax.sharding.Mesh | None = None, **options: Any
) -> tuple[list[float], state.TrainState, int]:
    """Losses of two steps, the state after them, and the bytes of the state that the program
    copies."""
    now = state.init_state(*PARTS, BATCH, mesh=where, **options)
    batch = BATCH if where is None else jax.device_put(BATCH, sharding.batch(where))
    compiled = steps.make_train_step(*PARTS, mesh=where, **options).lower(now, batch).compile()
    copied, losses = programs._undonated_bytes(now, compiled), []
    for _ in range(2):
        now, sums = compiled(now, batch)
        losses.append(float(sums["loss"][0]))
    return losses, now, copied


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], state.TrainState, int]:
    return trained()


@pytest.mark.parametrize("remat", ["dots", "dense", "blocks"])
def test_recomputing_changes_no_number(remat: str, plain: Any) -> None:
    """Dropout included: the second forward pass draws what the first one drew."""
    losses, _, copied = trained(remat=remat)
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    assert copied == plain[2] == 0
    now = state.init_state(*PARTS, BATCH)
    found, expected = (
        jax.device_get(steps.make_gradients(*PARTS, remat=each)(now, BATCH)[0])
        for each in (remat, "none")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, expected
    )


def test_blocks_keep_less_than_products_and_products_less_than_all() -> None:
    """By the numbers that the backward pass is given; jax's own accounting of residuals."""
    from jax._src.ad_checkpoint import saved_residuals  # jax.ad_checkpoint prints them only

    model = Transformer(vocabulary=8, width=16, depth=4, heads=2)
    variables = functions(model).init(jax.random.key(0), TOKENS_BT)

    def bytes_kept(remat: str) -> int:
        def loss(params: Any) -> jax.Array:
            return functions(model).apply({"params": params}, TOKENS_BT, train=True)[0].sum()

        kept = saved_residuals(
            loss if remat == "none" else jax.checkpoint(loss, policy=train_step.REMAT[remat]),
            variables["params"],
        )
        return sum(
            aval.size * aval.dtype.itemsize
            for aval, source in kept
            if "from the argument" not in source
        )

    sizes = [bytes_kept(remat) for remat in ("blocks", "dense", "dots", "none")]
    assert sizes == sorted(set(sizes)), sizes
    places = 8 * 13  # sequences, and tokens of one
    assert sizes[0] >= 4 * places * 16 * 4  # four blocks, 16 wide, float32


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_the_optimizer_in_the_memory_of_the_host(precision: str, close: float, plain: Any) -> None:
    where = mesh.make("data:2")
    losses, now, copied = trained(where, offload="optimizer", precision=precision)
    np.testing.assert_allclose(losses, plain[0], rtol=close)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(now.opt_state)} == {"pinned_host"}
    assert "pinned_host" not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(now.params)}
    moments, whole = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(now.opt_state)),
        sum(leaf.nbytes for leaf in jax.tree.leaves(now) if leaf is not now.key),
    )
    assert (
        programs.state_bytes(now, host=True) == moments
        and programs.state_bytes(now) == whole - moments + 8
    )
    assert copied == 0


def test_what_reproducible_steps_hold_besides() -> None:
    """Of a sharded state each device has a whole copy while it computes; and the gradients of each
    of its logical shards, with their sum."""
    whole, split = (
        state.init_state(*PARTS, BATCH, mesh=mesh.make(text)) for text in ("data:2", "fsdp:2")
    )
    gradients_of_all = 2 * (8 * 16 + 16 + 16 * 8 + 8) * 4
    found = programs._reproducible_memory(split, None, mesh.make("fsdp:2"), 4)
    assert (
        found["whole state while computing"]
        == programs.state_bytes(whole)
        > programs.state_bytes(split)
    )
    assert found["gradients of 4 logical shards and their sum"] == 5 * gradients_of_all
    assert "whole state while computing" not in programs._reproducible_memory(
        whole, None, mesh.make("data:2"), 4
    )


def test_averages_in_bfloat16(plain: Any) -> None:
    losses, now, copied = trained(optimizer_state="bf16")
    np.testing.assert_allclose(losses, plain[0], rtol=2e-2)
    moments = [leaf for leaf in jax.tree.leaves(now.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments if leaf.size > 1} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(now.params)} == {jnp.dtype(jnp.float32)}
    assert copied == 0


def test_copies_of_parameters_are_not_rounded() -> None:
    message = (
        "--optimizer_state=bf16: DoG keeps copies of the parameters in its state, and would round"
        " them; use --optimizer_state=fp32"
    )
    with pytest.raises(ValueError, match="^--optimizer_state") as caught:
        state.init_state(*PARTS[:2], NAMES["dog"], BATCH, optimizer_state="bf16")
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "precision"), [("fsdp:4", "fp16")])
def test_a_state_is_taken_over_whole(text: str, precision: str) -> None:
    assert trained(mesh.make(text), precision=precision)[2] == 0


def test_a_state_that_is_kept_is_noticed() -> None:
    """The check itself: a program that donates nothing copies every byte."""
    now = state.init_state(*PARTS, BATCH)
    kept = jax.jit(steps.make_train_step(*PARTS).__wrapped__).lower(now, BATCH).compile()
    assert programs._undonated_bytes(now, kept) == programs.state_bytes(now)
