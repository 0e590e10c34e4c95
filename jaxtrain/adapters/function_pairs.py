"""Pairs of functions `(init, apply)`, with or without a state, and Haiku's transforms, which are
such pairs."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.adapters import calling
from jaxtrain.adapters.interface import Functions, Variables
from jaxtrain.errors import UserError


def is_pair(model: Any) -> bool:
    """Whether something is a pair of functions."""
    return isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model)


def of_methods(model: Any) -> tuple[Any, Any] | None:
    """The methods `init` and `apply` of an object that has both, or None."""
    if isinstance(model, type):
        return None
    pair = getattr(model, "init", None), getattr(model, "apply", None)
    return pair if all(callable(part) for part in pair) else None


def functions(model: tuple[Any, Any]) -> Functions:
    """The two pure functions of a pair `init(key, *inputs) -> params` and `apply(params, *inputs)
    -> outputs`, or with a state `init -> (params, state)`, `apply(params, state, *inputs) ->
    (outputs, state)`."""
    if is_haiku(model):
        return _haiku(model)
    init_params, apply_params = _of_inputs(*model)
    start = calling.of(init_params, "(init, apply), its init", skip=1, lenient=True)
    call = calling.of(apply_params, "(init, apply)", skip=1)
    others = set(call.parameters) - {"state"} - set(call.switches) - set(call.random)
    stateful = "state" in call.parameters and bool(others)

    def init(key: jax.Array, inputs: Any) -> Variables:
        arguments, options = start.arguments(inputs, train=False, given=start.keys(key))
        made = init_params(key, *arguments, **options)
        if not stateful:
            return {"params": made}
        parts = _with_state(made, "init", "params")
        return parts | {"state": jax.tree.map(_array, parts["state"])}

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        given = call.keys(key) | ({"state": variables["state"]} if stateful else {})
        arguments, options = call.arguments(inputs, train=train, given=given)
        found = apply_params(variables["params"], *arguments, **options)
        if not stateful:
            return found, {}
        parts = _with_state(found, "apply", "outputs")
        return parts["outputs"], {"state": parts["state"] if train else variables["state"]}

    asks = calling.asking_for_a_key(apply, call.name) if call.random else apply
    return Functions(init, asks, model)


def _of_inputs(init_params: Any, apply_params: Any) -> tuple[Any, Any]:
    """A pair as `functions` takes it. Those of `jax.example_libraries.stax` differ: `init(rng,
    input_shape) -> (output_shape, params)`, `apply(params, inputs, rng=key)`."""
    if list(inspect.signature(init_params).parameters)[1:] != ["input_shape"]:
        return init_params, apply_params

    def init(key: jax.Array, inputs: Any) -> Any:
        return init_params(key, jax.tree.map(jnp.shape, inputs))[1]

    def apply(params: Any, inputs: Any, rng: Any) -> Any:
        return apply_params(params, inputs, rng=rng)

    takes = inspect.signature(apply_params).parameters
    takes_key = any(p.name == "rng" or p.kind is p.VAR_KEYWORD for p in takes.values())
    return init, apply if takes_key else apply_params


def is_haiku(model: Any) -> bool:
    """Whether a pair is what `hk.transform` or `hk.transform_with_state` gives."""
    return is_pair(model) and str(getattr(model[1], "__module__", "")).startswith("haiku.")


def _haiku(model: tuple[Any, Any]) -> Functions:
    init_fn, apply_fn = model
    names = list(inspect.signature(apply_fn).parameters)
    stateful, takes_key = "state" in names, "rng" in names
    original = getattr(apply_fn, "_original_fn", getattr(init_fn, "_original_fn", apply_fn))
    skip = 0 if original is not apply_fn else 1
    name = getattr(original, "__name__", "transform")
    call = calling.of(original, "(init, apply)" if name == "<lambda>" else name, skip=skip)

    def init(key: jax.Array, inputs: Any) -> Variables:
        # Its averages are made by a training pass only.
        arguments, options = call.arguments(inputs, train=True, given=call.keys(key))
        made = init_fn(key, *arguments, **options)
        return _with_state(made, "init", "params") if stateful else {"params": made}

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        arguments, options = call.arguments(inputs, train=train, given=call.keys(key))
        first = [variables["params"], *([variables["state"]] if stateful else [])]
        found = apply_fn(*first, *([key] if takes_key else []), *arguments, **options)
        if not stateful:
            return found, {}
        parts = _with_state(found, "apply", "outputs")
        return parts["outputs"], {"state": parts["state"] if train else variables["state"]}

    asks = calling.asking_for_a_key(apply, name) if call.random or takes_key else apply
    return Functions(init, asks, model)


def _array(leaf: Any) -> Any:
    """A Python number as the array that it would be after a step."""
    return jnp.asarray(np.asarray(leaf)) if isinstance(leaf, bool | int | float | complex) else leaf


def _with_state(made: Any, function: str, first: str) -> dict[str, Any]:
    if not (isinstance(made, tuple) and len(made) == 2):
        raise UserError(
            f"model=(init, apply): apply takes a `state`, so {function} must return ({first},"
            f" state); it gave {type(made).__name__}"
        )
    return {first: made[0], "state": made[1]}
