"""Models of any kind behind one pure interface: Linen, NNX and Equinox modules, Haiku's transforms,
pairs of functions.

`functions(model)` gives `init(key, inputs) -> variables` and `apply(variables, inputs, train=...,
key=...) -> (outputs, collections)`. Variables are `{"params": tree, other collections: trees}` of
plain arrays; `collections` are all of them but the parameters, changed by a training pass (running
averages, say) and given back as they were by any other. What a training pass has sown stands beside
them, see `split_sown`.
"""

from typing import Any

import jax
from flax import linen as nn

from jaxtrain.adapters import (
    equinox_modules,
    function_pairs,
    linen_modules,
    named_axes,
    nnx_modules,
    python_numbers,
)
from jaxtrain.adapters.interface import (
    Apply,
    Functions,
    Init,
    NeedsKey,
    Variables,
    axes_named,
    split_sown,
)
from jaxtrain.adapters.random_streams import Streams, stream
from jaxtrain.errors import UserError

__all__ = [
    "Apply",
    "Functions",
    "Init",
    "NeedsKey",
    "Streams",
    "Variables",
    "functions",
    "logical_axes",
    "split_sown",
    "stream",
    "without_named_axes",
]


def functions(model: Any) -> Functions:
    """The two pure functions of a model of any kind.

    >>> import jax.numpy as jnp
    >>> net = functions(
    ...     (lambda key, x: {"scale": jnp.ones(())}, lambda params, x: params["scale"] * x)
    ... )
    >>> variables = net.init(jax.random.key(0), jnp.ones(2))
    >>> net.apply(variables, jnp.ones(2), train=True)
    (Array([1., 1.], dtype=float32), {})

    `model` is a Linen module; an NNX module, or a function `rngs -> NNX module` (then `init` uses
    its key; a module that is already made keeps its own numbers); an Equinox module, a pair
    `(module, state)`, or a function of `key` that makes one of them; what `hk.transform` or
    `hk.transform_with_state` gives; or a pair `(init, apply)` with `init(key, inputs) -> params`
    and `apply(params, inputs)`, whose `apply` may also take a training switch, `key` or `rngs`, and
    `state`: then both give `(..., state)`. `UserError` for anything else.
    """
    if isinstance(model, Functions):
        return model
    return named_axes.bound(python_numbers.as_constants(_of_kind(model)))


def without_named_axes(model: Any, refusal: str) -> Functions:
    """`functions` of a model that runs in parts of which none is the whole batch: `UserError` where
    it has collectives. `refusal` is what it says; `{axis}` in it is the name of the axis."""
    model = model.model if isinstance(model, Functions) else model
    return named_axes.refused(python_numbers.as_constants(_of_kind(model)), refusal)


def _of_kind(model: Any) -> Functions:
    if isinstance(model, nn.Module):
        return linen_modules.functions(_callable(model))
    if _is_equinox(model):
        return equinox_modules.functions(model)
    if function_pairs.is_pair(model):
        bound = linen_modules.is_bound_pair(model)
        return function_pairs.functions(model) if bound is None else linen_modules.functions(bound)
    _check_instance(model)
    if nnx_modules.is_nnx(model):
        return nnx_modules.functions(_callable(model))
    if (pair := function_pairs.of_methods(model)) is not None:
        return function_pairs.functions(pair)
    kinds = (
        "a Linen module, an NNX module, a function of rngs that makes one, an Equinox module, a"
        " transform of Haiku, or a pair (init, apply)"
    )
    name = getattr(model, "__name__", None) or type(model).__name__
    raise UserError(f"model={name}: not a model; expected {kinds}")


def logical_axes(model: Any, inputs: Any) -> Variables:
    """The logical axes of every variable: a tuple of names (`tree.Axes`), or None where the model
    says nothing.

    >>> kernel_init = nn.with_logical_partitioning(nn.initializers.ones, ("mlp_in", "mlp"))
    >>> logical_axes(nn.Dense(3, kernel_init=kernel_init), jax.ShapeDtypeStruct((1, 2), "float32"))
    {'params': {'bias': None, 'kernel': ('mlp_in', 'mlp')}}

    `inputs` may be abstract: nothing is computed.
    """
    model = model.model if isinstance(model, Functions) else model
    _check_instance(model)
    if not (isinstance(model, nn.Module) or _is_equinox(model) or nnx_modules.is_nnx(model)):
        model = function_pairs.of_methods(model) or model
    if function_pairs.is_pair(model):
        model = linen_modules.is_bound_pair(model) or model
    key = jax.eval_shape(lambda: jax.random.key(0))
    if isinstance(model, nn.Module):
        module = model

        def boxed(key: jax.Array, inputs: Any) -> Variables:
            return linen_modules.boxed_variables(module, key, inputs)

        boxes = jax.eval_shape(lambda key, x: named_axes.with_axes(boxed, key, x), key, inputs)
        return jax.tree.map(
            lambda box: axes_named(getattr(box, "names", None)), boxes, is_leaf=_is_box
        )
    if function_pairs.is_pair(model) or _is_equinox(model):
        shapes = jax.eval_shape(functions(model).init, key, inputs)
        return jax.tree.map(lambda _: None, shapes)
    return nnx_modules.logical_axes(model)


def _is_equinox(model: Any) -> bool:
    return equinox_modules.is_equinox(model) or equinox_modules.is_factory(model)


def _callable(model: Any) -> Any:
    if not callable(model):
        kind = type(model).__name__
        raise UserError(
            f"model={kind}: has no __call__; name the method that is one: class Called({kind}):"
            f" __call__ = {kind}.METHOD"
        )
    return model


def _check_instance(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise UserError(f"model={name}: a class; give a module, such as {name}()")


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)
