"""Sums in one order, whatever the shapes: what a model says of a token is then the same to the bit
in one pass over a whole text and token by token beside a cache, alone and in a batch.

A product of matrices adds in an order that depends on how many rows it has, and so does a compiled
sum. Here both are multiplied out and added by halves: numbers i and i + n/2, for n the next power
of two, and so on. Zeros at the end change nothing, so a cache may have more slots than there are
tokens, up to the next power of two.

It runs operation by operation, outside of `jit`: a compiler that sees several at once rounds them
as one here and apart there. This is for checking, not for speed: products are held whole before
they are added, and a token of a small model takes about a second where a compiled step takes a
millisecond.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Calls whose program is looked into, and where they keep it."""


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with all products and sums in the order of halves.

    >>> exactly(lambda x_BD: (x_BD @ jnp.ones((3, 2))).sum(axis=1))(jnp.ones((1, 3))).tolist()
    [6.0]

    Call it outside of `jit`. What stands in a loop of the program stays as it is, so blocks are to
    be unrolled.
    """

    def exact(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _run(program.jaxpr, program.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return exact


def _run(program: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The outputs of a traced program, step by step."""
    values: dict[Any, Any] = dict(zip(program.constvars, constants, strict=True))
    values |= zip(program.invars, arguments, strict=True)

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for step in program.eqns:
        inputs, name = [value(variable) for variable in step.invars], step.primitive.name
        if name == "dot_general":
            outputs = [_product(inputs[0], inputs[1], step.params)]
        elif name == "reduce_sum" and jnp.issubdtype(inputs[0].dtype, jnp.floating):
            outputs = [_sum(inputs[0], step.params["axes"])]
        elif name in _INLINED:
            inner = step.params[_INLINED[name]]
            outputs = _run(inner.jaxpr, inner.consts, inputs)
        else:
            found = step.primitive.bind(*inputs, **step.params)
            outputs = found if step.primitive.multiple_results else [found]
        values |= zip(step.outvars, outputs, strict=True)
    return [value(variable) for variable in program.outvars]


def _product(left: jax.Array, right: jax.Array, params: Any) -> jax.Array:
    """`lax.dot_general`, every product held before any is added."""
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    left_free = [dim for dim in range(left.ndim) if dim not in (*left_sum, *left_batch)]
    right_free = [dim for dim in range(right.ndim) if dim not in (*right_sum, *right_batch)]
    left = left.transpose(*left_batch, *left_free, *left_sum)
    right = right.transpose(*right_batch, *right_free, *right_sum)
    batch, free = len(left_batch), len(left_batch) + len(left_free)
    left = jnp.expand_dims(left, tuple(range(free, free + len(right_free))))
    right = jnp.expand_dims(right, tuple(range(batch, free)))
    wide = jnp.promote_types(left.dtype, jnp.float32)
    products = left.astype(wide) * right.astype(wide)
    total = _sum(products, range(products.ndim - len(left_sum), products.ndim))
    return total.astype(params["preferred_element_type"] or left.dtype)


def _sum(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    """The sum over some dims, by halves."""
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    shape = tuple(x.shape[dim] for dim in kept)
    x = x.transpose(*kept, *dims).reshape(*shape, -1)
    size = max(1, 1 << (x.shape[-1] - 1).bit_length())
    x = jnp.pad(x, [(0, 0)] * len(shape) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]
