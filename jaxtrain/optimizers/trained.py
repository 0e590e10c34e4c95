"""Which parameters are trained: the one decision, and trees with and without the others.

A parameter is trained if it is an array of floats or complex numbers and no rule freezes it.
Gradients, norms, optimizers and averages see the trained ones only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import tree
from jaxtrain.errors import UserError
from jaxtrain.tree import PyTree


def mask(params: PyTree, frozen: tuple[str, ...] = ()) -> PyTree:
    """True for each parameter that is trained, False for each other.

    >>> mask({"body": jnp.ones(2), "head": jnp.ones(2), "ids": jnp.arange(3)}, ("body",))
    {'body': False, 'head': True, 'ids': False}

    `params` may be abstract; `frozen` are path patterns. `UserError` if a pattern matches nothing,
    or if nothing is left to be trained.
    """
    rules = tuple((pattern, False) for pattern in frozen)
    ruled = tree.match(rules, params, name="--optimizer.frozen", default=True)
    decided = jax.tree.map(lambda free, leaf: bool(free and has_gradient(leaf)), ruled, params)
    leaves = jax.tree.leaves(decided)
    if leaves and not any(leaves):
        if frozen:
            raise UserError(
                f"--optimizer.frozen={','.join(frozen)}: freezes every parameter; leave at least"
                " one to be trained"
            )
        raise UserError(
            f"model: none of its {len(leaves)} parameters is an array of floats, such as"
            f" {next(iter(tree.flatten(params)))}; nothing can be trained"
        )
    return decided


def has_gradient(leaf: Any) -> bool:
    """Whether an array holds floats or complex numbers: what a gradient can be taken of."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def only(trained: PyTree, values: PyTree, absent: Any = None) -> PyTree:
    """The values of the trained parameters, and `absent` in place of each other.

    >>> only({"body": False, "head": True}, {"body": 1, "head": 2})
    {'body': None, 'head': 2}
    """
    return jax.tree.map(lambda keep, value: value if keep else absent, trained, values)


def merged(trained: PyTree, values: PyTree, rest: PyTree) -> PyTree:
    """The values of the trained parameters (`only` of a tree), and `rest` of all others.

    >>> merged({"body": False, "head": True}, {"body": None, "head": 2}, {"body": 3, "head": 4})
    {'body': 3, 'head': 2}
    """
    new = iter(jax.tree.leaves(values))
    return jax.tree.map(lambda keep, old: next(new) if keep else old, trained, rest)
