"""Dynamic loss scaling: keeps the gradients of float16 inside its narrow range, and skips the step
where they left it.

float16 rounds to zero below 6e-8, where many gradients of a network lie. So the loss is multiplied
by a scale before the backward pass and the float32 gradients are divided by it. The scale is the
largest that does not overflow, found by trying: an overflow halves it and the step changes nothing;
a long run of good steps doubles it (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). All
scales are powers of two.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxtrain.tree import PyTree

INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**15, 1.0, 2.0**24
GROWTH_STEPS = 2000
"""After so many finite steps in a row the scale is doubled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The scale, and what decides its next value.

    >>> state = LossScale.new()
    >>> state = update(update(state, True), False)
    >>> float(state.scale), int(state.good_steps), int(state.skipped)
    (16384.0, 0, 1)
    """

    scale: jax.Array
    """What the loss is multiplied by, float32."""
    good_steps: jax.Array
    """Finite steps since the scale last changed, int32."""
    skipped: jax.Array
    """Steps whose gradients were not finite, since the beginning, int32."""

    @classmethod
    def new(cls) -> "LossScale":
        """The state before the first step."""
        return cls(jnp.float32(INITIAL_SCALE), jnp.int32(0), jnp.int32(0))


def update(state: LossScale, finite: ArrayLike) -> LossScale:
    """The state after a step whose gradients were `finite`, a bool scalar, or were not.

    An overflow at the smallest scale, 1, changes the scale no more and is still counted: then the
    network itself overflows, and a scale cannot help.
    """
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grows = good_steps >= GROWTH_STEPS
    grown = jnp.where(grows, jnp.minimum(state.scale * 2.0, MAX_SCALE), state.scale)
    return LossScale(
        scale=jnp.where(finite, grown, jnp.maximum(state.scale * 0.5, MIN_SCALE)),
        good_steps=jnp.where(grows, 0, good_steps),
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )


def all_finite(tree: PyTree) -> jax.Array:
    """Whether no number of a tree is infinite or NaN, a bool scalar; what holds neither floats nor
    complex numbers is finite.

    >>> bool(all_finite({"a": jnp.ones(3), "b": jnp.array([0.0, jnp.inf])})), bool(all_finite({}))
    (False, True)
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return (
        jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        if leaves
        else jnp.bool_(True)
    )


def select(finite: ArrayLike, new: PyTree, old: PyTree) -> PyTree:
    """The new tree if `finite`, else the old one, of the same structure, shapes and dtypes.

    >>> select(False, {"a": jnp.ones(2)}, {"a": jnp.zeros(2)})["a"].tolist()
    [0.0, 0.0]

    A selection, not an `if`: both are computed, and under jit it costs one pass over the arrays.
    """
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
