"""Sums in one order, whatever the shapes: what a model says of a token is then the same to the bit
in one pass over a whole text and token by token beside a cache, alone and in a batch, packed with
others or not.

A product of matrices adds in an order that depends on how many rows it has, and a compiler rounds
`a * b + c` once or twice, as it pleases: that is all that differs between such passes. Here every
sum adds its numbers one after the other, so that zeros change nothing wherever they stand: masked
keys, empty slots, padding. And what leaves a multiplication is turned into an integer and back, so
that no addition can be drawn into it. Compiled or not, it is for checking, not for speed.

Held by tests on CPU. Values must come in the same order: a ring of a cache gives its keys in the
order of their positions if it is made by `cache.empty(..., ordered=True)`.
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
_UNSEALED = {
    "add",
    "sub",
    "neg",
    "abs",
    "max",
    "min",
    "select_n",
    "reduce_max",
    "argmax",
    "copy",
} | {
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "concatenate",
    "slice",
    "gather",
    "scatter",
    "dynamic_slice",
    "dynamic_update_slice",
    "pad",
    "iota",
    "rev",
    "stop_gradient",
}
"""What leaves these no addition can be drawn into: they only add, choose or move."""

_APPROXIMATED = {
    *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erf_inv", "erfc"),
    *("sin", "cos", "tan", "rsqrt", "sqrt", "cbrt"),
}
"""Functions that a compiler has more than one version of."""


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with all products and sums in the order of their numbers.

    >>> exactly(lambda x_BD: (x_BD @ jnp.ones((3, 2))).sum(axis=1))(jnp.ones((1, 3))).tolist()
    [6.0]

    It may be called inside of `jit` and outside. What stands in a loop of the program stays as it
    is, so blocks are to be unrolled.
    """

    def exact(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        outputs = _Exact(_hidden_zero(leaves)).run(program.jaxpr, program.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return exact


def _hidden_zero(leaves: Sequence[Any]) -> jax.Array:
    """A zero that no compiler knows: whether a number is not itself."""
    for leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and jnp.size(leaf):
            first = jnp.ravel(jnp.asarray(leaf))[0]
            return jnp.isnan(first).astype(jnp.uint32)
    return jnp.uint32(0)


class _Exact:
    """Runs traced programs."""

    def __init__(self, zero: jax.Array) -> None:
        self._zero = zero

    def run(self, program: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a traced program, step by step."""
        values: dict[Any, Any] = dict(zip(program.constvars, constants, strict=True))
        values |= zip(program.invars, arguments, strict=True)

        def value(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else values[variable]

        for step in program.eqns:
            inputs, name = [value(variable) for variable in step.invars], step.primitive.name
            if name == "dot_general":
                outputs = [self._product(inputs[0], inputs[1], step.params)]
            elif name == "reduce_sum" and jnp.issubdtype(inputs[0].dtype, jnp.floating):
                outputs = [_sum(inputs[0], step.params["axes"])]
            elif name in _INLINED:
                inner = step.params[_INLINED[name]]
                outputs = self.run(inner.jaxpr, inner.consts, inputs)
            elif name in _APPROXIMATED:
                outputs = [self._sealed(_in_blocks(step.primitive, inputs[0], step.params))]
            else:
                found = step.primitive.bind(*inputs, **step.params)
                outputs = found if step.primitive.multiple_results else [found]
                if name not in _UNSEALED:
                    outputs = [self._sealed(output) for output in outputs]
            values |= zip(step.outvars, outputs, strict=True)
        return [value(variable) for variable in program.outvars]

    def _sealed(self, x: Any) -> Any:
        """The same numbers, by way of integers."""
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        whole = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, whole)
        bits = bits ^ jnp.broadcast_to(self._zero.astype(whole), bits.shape)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    def _product(self, left: jax.Array, right: jax.Array, params: Any) -> jax.Array:
        """`lax.dot_general`, one product after the other."""
        (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
        left_free = [dim for dim in range(left.ndim) if dim not in (*left_sum, *left_batch)]
        right_free = [dim for dim in range(right.ndim) if dim not in (*right_sum, *right_batch)]
        wide = jnp.promote_types(left.dtype, jnp.float32)
        # the dims of the sum first, then those of the batch, of the left and of the right
        left = left.transpose(*left_sum, *left_batch, *left_free)
        left = jnp.expand_dims(left, tuple(range(left.ndim, left.ndim + len(right_free))))
        right = right.transpose(*right_sum, *right_batch, *right_free)
        before = len(right_sum) + len(right_batch)
        right = jnp.expand_dims(right, tuple(range(before, before + len(left_free))))
        left, right = (
            array.reshape(-1, *array.shape[len(left_sum) :]).astype(wide) for array in (left, right)
        )
        shape = jnp.broadcast_shapes(left.shape[1:], right.shape[1:])

        def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + self._sealed(pair[0] * pair[1]), None

        total, _ = jax.lax.scan(add, jnp.zeros(shape, wide), (left, right), unroll=UNROLL)
        return total.astype(params["preferred_element_type"] or left.dtype)


def _in_blocks(primitive: Any, x: jax.Array, params: Any) -> jax.Array:
    """A function of one number in a loop over blocks of one size, at least two: in any other
    program a compiler might take the version for single numbers, or another width."""
    flat = jnp.ravel(x)
    blocks = max(2, -(-flat.size // BLOCK))
    padded = jnp.pad(flat, (0, blocks * BLOCK - flat.size)).reshape(blocks, BLOCK)
    found = jax.lax.map(lambda block: primitive.bind(block, **params), padded)
    return found.reshape(-1)[: flat.size].reshape(x.shape)


BLOCK = 64
UNROLL = 8
"""Numbers added in a turn of the loop."""


def _sum(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    """The sum over some dims, one number after the other."""
    kept = [dim for dim in range(x.ndim) if dim not in dims]
    x = x.transpose(*dims, *kept).reshape(-1, *(x.shape[dim] for dim in kept))
    zeros = jnp.zeros(x.shape[1:], x.dtype)
    return jax.lax.scan(lambda total, part: (total + part, None), zeros, x, unroll=UNROLL)[0]
