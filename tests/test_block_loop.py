"""Blocks in a loop: the numbers of a model without one, on every mesh; and what FSDP gathers and
keeps of them.

Dims: B batch, T tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import block_loop
from jaxtrain.adapters import functions
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import AdamW
from jaxtrain.parallel import mesh, sharding
from jaxtrain.tasks import NextToken
from jaxtrain.train import state, steps

RANDOM = np.random.default_rng(0)
TOKENS_BT = jnp.asarray(RANDOM.integers(0, 32, (8, 17)), jnp.int32)
# Two turns of two kinds, and a block that is left; heads share keys.
OPTIONS: dict[str, Any] = {
    "vocabulary": 32,
    "width": 32,
    "depth": 5,
    "heads": 4,
    "key_heads": 2,
    "max_length": 16,
    "pattern": ("window", "full"),
    "window": 4,
}
LOOPED = Transformer(**OPTIONS, scan=True)


def losses(model: Any, text: str | None = None, *, count: int, **options: Any) -> list[float]:
    """The losses of so many steps, on a mesh or on one device."""
    where = None if text is None else mesh.make(text)
    parts = (model, NextToken(), AdamW(learning_rate=0.003))
    batch: Any = {"tokens": TOKENS_BT}
    now = state.init_state(*parts, batch, mesh=where, **options)
    batch = batch if where is None else jax.device_put(batch, sharding.batch(where))
    step, found = steps.make_train_step(*parts, mesh=where, **options), []
    for _ in range(count):
        now, sums = step(now, batch)
        found.append(float(sums["loss"][0] / sums["loss"][1]))
    return found


def test_a_loop_on_a_mesh_of_all_axes_changes_no_loss() -> None:
    options = OPTIONS | {"pattern": ("window",), "depth": 3}
    plain = losses(Transformer(**options), count=20)
    found = losses(Transformer(**options, scan=True), "data:2,fsdp:2,tensor:2", count=20)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert plain[-1] < plain[0] - 0.5


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return losses(Transformer(**OPTIONS), count=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["data:8", "fsdp:8", "tensor:2", "fsdp:4,tensor:2", "data:2,fsdp:4"]
)
@pytest.mark.parametrize("remat", ["none", "dots", "blocks"])
@pytest.mark.parametrize("scan", [False, True])
def test_on_every_mesh_and_recomputed_neither(
    text: str, remat: str, scan: bool, plain: list[float]
) -> None:
    model = Transformer(**OPTIONS, scan=scan)
    found = losses(model, text, count=20, remat=remat)
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def by_steps(x: jax.Array, weights: list[jax.Array], extras: jax.Array) -> jax.Array:
    """What `run` should do, turn by turn in Python."""
    for index, weight in enumerate(weights):
        x = BLOCKS[index % 2](x, {"w": weight}, extras[index])
    return x


BLOCKS = [
    lambda x, params, extra: jnp.tanh(x @ params["w"]) + extra,
    lambda x, params, extra: x * extra + jnp.sin(x @ params["w"]),
]


@pytest.mark.parametrize("depth", [1, 5, 6])
@pytest.mark.parametrize("keep", [None, jax.checkpoint_policies.nothing_saveable])
def test_any_number_of_blocks(depth: int, keep: Any) -> None:
    weights = [jnp.asarray(RANDOM.normal(size=(3, 3)), jnp.float32) for _ in range(depth)]
    extras = jnp.asarray(RANDOM.normal(size=depth), jnp.float32)
    x = jnp.asarray(RANDOM.normal(size=(2, 3)), jnp.float32)

    def looped(x: jax.Array, weights: list[jax.Array], extras: jax.Array) -> jax.Array:
        names = [f"block{index}" for index in range(depth)]
        trees = [{"w": weight} for weight in weights]
        with block_loop.told(keep=keep):
            return block_loop.run(BLOCKS, x, trees, extras, names=names)

    for ours, by_hand in zip(
        *(
            jax.tree.leaves(
                jax.value_and_grad(lambda *all, f=f: f(*all).sum(), (0, 1, 2))(x, weights, extras)
            )
            for f in (looped, by_steps)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ours, by_hand, rtol=2e-5, atol=1e-5)


def test_a_model_says_which_blocks_it_loops_over() -> None:
    assert block_loop.looped(LOOPED) == tuple(f"block{index}" for index in range(5))
    assert not block_loop.looped(Transformer(**OPTIONS))
    assert not block_loop.looped((lambda key, x: {}, lambda params, x: x))


def test_the_backward_pass_is_not_given_gathered_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the kernels it holds the stack alone, which is split, and not what the loop made whole."""
    from jax._src.ad_checkpoint import saved_residuals  # jax.ad_checkpoint prints them only

    model = Transformer(**OPTIONS | {"pattern": ("full",), "depth": 4}, scan=True)
    apply = functions(model).apply
    init = functions(model).init
    params = jax.eval_shape(init, jax.random.key(0), TOKENS_BT[:7, :13])["params"]
    grid = mesh.make("fsdp:8")
    place = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec())

    @jax.custom_vjp
    def whole(leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, place)

    whole.defvjp(lambda leaf: (whole(leaf), None), lambda _, gradient: (gradient,))

    def kernels_kept(policy: Any) -> set[str]:
        """The shapes of whole kernels that come out of the loop."""
        monkeypatch.setattr(block_loop, "all_but_gathered", policy)
        layout = block_loop.Layout(lambda _, stack: stack, lambda _, leaf: whole(leaf))

        def loss(params: Any) -> jax.Array:
            with block_loop.told(layout=layout):
                return apply({"params": params}, TOKENS_BT[:7, :13], train=True)[0].sum()

        kernels = {(4, *leaf.shape) for leaf in jax.tree.leaves(params["block0"]) if leaf.ndim > 1}
        return {
            str(aval.shape)
            for aval, source in saved_residuals(loss, params)
            if aval.shape in kernels and "output of scan" in source
        }

    assert not kernels_kept(block_loop.all_but_gathered)
    assert "(4, 32, 128)" in kernels_kept(jax.checkpoint_policies.everything_saveable)


def test_what_is_told_holds_inside_only() -> None:
    with block_loop.told(keep=len), block_loop.told(layout=None):
        assert block_loop._TOLD.get().keep is len
    assert block_loop._TOLD.get(block_loop.NOTHING) == block_loop.NOTHING
