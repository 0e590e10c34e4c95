"""Products in fp8: a function's dense products, and their gradients, with operands of eight bits
and one scale a tensor.

Each operand is multiplied by what brings its largest magnitude to the largest number of its format,
is rounded, and the float32 result of the product is scaled back. Operands of the forward pass are
float8_e4m3fn (448 at most, 3 bits of mantissa), incoming gradients float8_e5m2 (57,344 at most, 2
bits): Micikevicius et al. 2022, arXiv 2209.05433. The scales come from the tensor as it is now
("current scaling"), not from its past ("delayed scaling"), so there is no state; the price is one
pass over each operand, and one number reduced over the devices where it is sharded.

The function is traced to a jaxpr, which is then run with other products. A `dot_general` handed to
each layer would be less code, but it reaches only layers that have such a field: not a pair of
functions, not NNX modules once they are made, not a product that a model writes itself (the tied
head of `Transformer`, an `einsum`, attention of somebody's own). Here any model will do.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

Dims = tuple[tuple[int, ...], tuple[int, ...]]
"""The contracting dims of the left and of the right operand."""

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
MIN_SCALED = 1e-30
"""A tensor with no number as large as this keeps scale 1: the inverse of its scale would overflow
float32."""


def with_fp8_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of pytrees of arrays, whose dense products run in fp8.

    >>> product = with_fp8_products(lambda x, y: x @ y)
    >>> product(jnp.full((2, 4), 3.0), jnp.ones((4, 2))).round(5).tolist()
    [[12.0, 12.0], [12.0, 12.0]]

    A dense product is a `dot_general` of two floating-point operands without batch dims; its result
    keeps its dtype. Products of attention, which have batch dims, and convolutions stay as they
    are. Products are also found inside `jit`, `jax.checkpoint`, `lax.scan` and `lax.cond`; those
    inside `lax.while_loop`, `shard_map`, a kernel, or a function with derivatives of its own
    (`custom_jvp`, `custom_vjp`) stay as they are. It can be differentiated once, backwards;
    arguments are positional.
    """

    @functools.wraps(function)
    def in_fp8(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)

        def flat(*leaves: Any) -> Any:
            return function(*structure.unflatten(leaves))

        traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        return jax.tree.unflatten(
            jax.tree.structure(shapes), core.jaxpr_as_fun(_rewrite(traced))(*leaves)
        )

    return in_fp8


INNER_JAXPRS: dict[str, tuple[str, ...]] = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
    "scan": ("jaxpr",),
    "cond": ("branches",),
}
"""The parameters of primitives in which products are looked for: those that stay as they were when
only what they compute changes."""


def _spec(atom: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what goes into an equation, or comes out."""
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def _is_dense(equation: core.JaxprEqn) -> bool:
    if equation.primitive.name != "dot_general":
        return False
    (over_left, _), (batch, _) = equation.params["dimension_numbers"]
    return (
        bool(over_left)
        and not batch
        and all(jnp.issubdtype(_spec(operand).dtype, jnp.floating) for operand in equation.invars)
    )


def _rewrite(jaxpr: Any) -> Any:
    """The jaxpr (closed or not, or several) with other products; its inputs, outputs, constants,
    names and sources are as they were. Where it holds none, it is the same object."""
    if isinstance(jaxpr, tuple | list):
        several = type(jaxpr)(map(_rewrite, jaxpr))
        return jaxpr if _same(several, jaxpr) else several
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    # from jax 0.12 on open and closed are one type, which keeps its constants
    if type(inner) is not type(jaxpr):
        changed = _rewrite(inner)
        return jaxpr if changed is inner else jaxpr.replace(jaxpr=changed)
    equations = [_replace(equation) for equation in jaxpr.eqns]
    return jaxpr if _same(equations, jaxpr.eqns) else jaxpr.replace(eqns=equations)


def _same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(first, second, strict=True))


def _replace(equation: core.JaxprEqn) -> core.JaxprEqn:
    """One equation with other products, or the same object."""
    if not _is_dense(equation):
        names = INNER_JAXPRS.get(equation.primitive.name, ())
        inner = {name: _rewrite(equation.params[name]) for name in names}
        if all(value is equation.params[name] for name, value in inner.items()):
            return equation
        return equation.replace(params=equation.params | inner)
    contracting, _ = equation.params["dimension_numbers"]
    dtype = _spec(equation.outvars[0]).dtype
    shapes = [_spec(operand) for operand in equation.invars]
    (call,) = jax.make_jaxpr(lambda left, right: _dense(left, right, contracting, dtype))(
        *shapes
    ).eqns
    return call.replace(
        invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(left: jax.Array, right: jax.Array, contracting: Dims, dtype: Any) -> jax.Array:
    """The product of two arrays of any dtype over these dims, in fp8."""
    return _forward(left, right, contracting, dtype)[0]


def _forward(
    left: jax.Array, right: jax.Array, contracting: Dims, dtype: Any
) -> tuple[jax.Array, Any]:
    """The product, and what the backward pass needs: the operands in eight bits, which is also a
    quarter of the memory of float32.

    The empty arrays carry the dtypes of the operands, for what is kept must be arrays.
    """
    left_fp8, right_fp8 = quantize(left, FORWARD), quantize(right, FORWARD)
    kept = left_fp8, right_fp8, jnp.zeros(0, left.dtype), jnp.zeros(0, right.dtype)
    return _product(left_fp8, right_fp8, contracting, lax.Precision.DEFAULT).astype(dtype), kept


def _backward(
    contracting: Dims, dtype: Any, kept: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of both operands: products of the incoming gradient, in e5m2, with the other
    operand, in e4m3."""
    del dtype
    left, right, like_left, like_right = kept
    gradient_fp8 = quantize(gradient, BACKWARD)
    over_left, over_right = contracting
    free_left = tuple(dim for dim in range(left[0].ndim) if dim not in over_left)
    free_right = tuple(dim for dim in range(right[0].ndim) if dim not in over_right)
    rows, columns = tuple(range(len(free_left))), tuple(range(len(free_left), gradient.ndim))
    # A product lists the free dims of its left operand, then those of its right one, each in their
    # order: they are put back.
    pairs_right, pairs_left = (
        sorted(zip(over_right, over_left, strict=True)),
        sorted(zip(over_left, over_right, strict=True)),
    )
    to_left = _product(gradient_fp8, right, (columns, free_right), lax.Precision.HIGHEST)
    to_left = _move_dims(to_left, (*free_left, *(dim for _, dim in pairs_right)))
    to_right = _product(left, gradient_fp8, (free_left, rows), lax.Precision.HIGHEST)
    to_right = _move_dims(to_right, (*(dim for _, dim in pairs_left), *free_right))
    return to_left.astype(like_left.dtype), to_right.astype(like_right.dtype)


_dense.defvjp(_forward, _backward)


def quantize(values: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """An array in an fp8 format and the float32 scale that it has to be multiplied with.

    >>> eight_bits, scale = quantize(jnp.array([0.5, -1.0, 2.0]), jnp.float8_e4m3fn)
    >>> eight_bits.tolist(), round(448 * float(scale), 5)
    ([112.0, -224.0, 448.0], 2.0)

    The scale is 1 where the largest magnitude is below 1e-30 or not finite. Infinities become NaN,
    which every format has, so that an overflow is seen downstream and never saturates.
    """
    largest = jnp.max(jnp.abs(values), initial=0.0).astype(jnp.float32)
    top = float(jnp.finfo(dtype).max)
    usable = jnp.isfinite(largest) & (largest >= MIN_SCALED)
    safe = jnp.where(usable, largest, top)
    # A product with the inverse: XLA makes one of a division on some layouts only, and layouts
    # should agree in every bit.
    scaled = values.astype(jnp.float32) * (top / safe)
    return jnp.where(jnp.isfinite(scaled), scaled, jnp.nan).astype(dtype), safe * (1.0 / top)


def _product(
    left: tuple[jax.Array, jax.Array],
    right: tuple[jax.Array, jax.Array],
    contracting: Dims,
    accumulate: lax.Precision,
) -> jax.Array:
    """The product of two scaled fp8 arrays, float32.

    The operands enter as fp8: of this XLA makes an fp8 kernel for an H100 (Triton) and an RTX 4090
    (cuBLASLt), while of operands that are widened and scaled first, the pattern of the literature,
    it makes a bfloat16 kernel. At `Precision.DEFAULT` tensor cores may add up in fewer bits than
    float32 has, which is faster and does for the forward pass; at `HIGHEST`, for gradients,
    cuBLASLt adds up in float32 (XLA's `cuda_blas_lt.cc`).
    """
    wide = lax.dot_general(
        left[0],
        right[0],
        (contracting, ((), ())),
        precision=accumulate,
        preferred_element_type=jnp.float32,
    )
    return wide * (left[1] * right[1])


def _move_dims(values: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """An array whose dim i becomes dim `dims[i]`."""
    return jnp.transpose(values, [dims.index(dim) for dim in range(len(dims))])
