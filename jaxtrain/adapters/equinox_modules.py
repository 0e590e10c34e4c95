"""Equinox modules, which are written for one example: run over the batch by `jax.vmap`.

Parameters are the arrays of floats and complex numbers, as `eqx.is_inexact_array` has it, by the
names of the fields; other arrays are the collection `constants`, and what `eqx.nn.State` holds is
the collection `state`. Equinox itself is never imported.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.adapters import calling, training_switch
from jaxtrain.adapters.interface import Functions, Variables
from jaxtrain.errors import UserError
from jaxtrain.tree import PyTree, path_text


def is_equinox(model: Any) -> bool:
    """Whether something is an Equinox module, a pair of one and its state, or a class of them."""
    if isinstance(model, tuple) and len(model) == 2:
        return is_equinox(model[0]) and type(model[1]).__name__ == "State"
    kind = model if isinstance(model, type) else type(model)
    return any(base.__module__.startswith("equinox.") for base in kind.__mro__) and not (
        "eqx_transform" in kind.__name__
    )


def is_factory(model: Any) -> bool:
    """Whether something is a function `key -> module` or `key -> (module, state)`."""
    if not callable(model) or (is_equinox(model) and not isinstance(model, type)):
        return False
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return False
    return "key" in parameters and "rngs" not in parameters


def functions(model: Any) -> Functions:
    """The two pure functions of an Equinox module that is made, of a pair `(module, state)`, or of
    a function of `key` that makes one of both."""
    factory = is_factory(model)
    static = _Static.of(_made(model, jax.random.key(0)) if factory else model)
    call = calling.of(static.module.__call__, type(static.module).__name__)
    axis = _axis_name(static.module)

    def init(key: jax.Array, inputs: Any) -> Variables:
        whole = _made(model, key) if factory else model
        return jax.tree.map(jnp.copy, static.variables(whole))

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        module, state = static.whole(variables, train=train)
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        takes_state = state is not None and "state" in call.parameters
        keys = None
        if call.random and key is not None:
            keys = jax.random.split(key, jax.tree.leaves(inputs)[0].shape[0])

        def one(inputs: Any, key: Any) -> Any:
            given = call.keys(key) | ({"state": state} if takes_state else {})
            arguments, options = call.arguments(inputs, train=train, given=given)
            return module(*arguments, **options)

        over = (0, None if keys is None else 0)
        out = (0, None) if takes_state else 0
        found = jax.vmap(one, in_axes=over, out_axes=out, axis_name=axis)(inputs, keys)
        if not takes_state:
            return found, rest
        outputs, new = found
        return outputs, rest | {"state": static.state_of(new)} if train else rest

    asks = calling.asking_for_a_key(apply, call.name) if call.random else apply
    return Functions(init, asks, model)


@dataclasses.dataclass(frozen=True)
class _Static:
    """A module (and its state) as its structure and what is no array."""

    module: Any
    structure: Any
    leaves: tuple[tuple[str, str, Any], ...]
    """For each leaf its collection ("" for what is no array), its path, and itself if it is no
    array."""
    state: Any
    """The structure of its `eqx.nn.State`, or None."""
    state_paths: tuple[str, ...]
    """For each leaf of the state its path: the layer's, and what it is there."""

    @classmethod
    def of(cls, model: Any) -> "_Static":
        module, state = model if isinstance(model, tuple) else (model, None)
        found, structure = jax.tree_util.tree_flatten_with_path(module)
        leaves = tuple(
            (kind := _kind(leaf), path_text(path), None if kind else leaf) for path, leaf in found
        )
        if state is None:
            return cls(module, structure, leaves, None, ())
        return cls(module, structure, leaves, jax.tree.structure(state), _state_paths(state))

    def variables(self, model: Any) -> Variables:
        """The arrays of a module, by collection and path."""
        module, state = model if isinstance(model, tuple) else (model, None)
        found: Variables = {"params": {}}
        for (kind, path, _), leaf in zip(self.leaves, jax.tree.leaves(module), strict=True):
            if kind:
                _put(found.setdefault(kind, {}), path.split("/"), leaf)
        if state is not None:
            found["state"] = self.state_of(state)
        return found

    def state_of(self, state: Any) -> PyTree:
        """The arrays of an `eqx.nn.State`, by the layers that they belong to."""
        found: dict[str, Any] = {}
        for path, leaf in zip(self.state_paths, jax.tree.leaves(state), strict=True):
            _put(found, path.split("/"), leaf)
        return found

    def whole(self, variables: Variables, *, train: bool) -> tuple[Any, Any]:
        """The module in training or evaluation, and its state."""
        leaves = [
            _get(variables[kind], path.split("/")) if kind else _switched(path, leaf, train)
            for kind, path, leaf in self.leaves
        ]
        module = jax.tree.unflatten(self.structure, leaves)
        if self.state is None:
            return module, None
        states = [_get(variables["state"], path.split("/")) for path in self.state_paths]
        return module, jax.tree.unflatten(self.state, states)


def _switched(path: str, leaf: Any, train: bool) -> Any:
    on = training_switch.value_in_training(path.rpartition("/")[2], argument=False)
    return leaf if on is None or not isinstance(leaf, bool) else on == train


def _state_paths(state: Any) -> tuple[str, ...]:
    """A path for each leaf of an `eqx.nn.State`: where its index stands in the module, as
    `eqx.nn.make_with_state` notes it (`Net.norms[0].state_index`); else its number."""
    values, markers = state.tree_flatten()
    found = []
    for marker, value in zip(markers, values, strict=True):
        steps = re.findall(r"\.(\w+)|\[([^\]]+)\]", marker) if isinstance(marker, str) else []
        place = [name or key.strip("'\"") for name, key in steps]
        for path, _ in jax.tree_util.tree_flatten_with_path(value)[0]:
            found.append("/".join([*place, *filter(None, [path_text(path)])]))
    apart = all(found) and len(set(found)) == len(found)
    return tuple(found) if apart else tuple(map(str, range(len(found))))


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return ""
    return "params" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "constants"


def _put(tree: dict[str, Any], path: list[str], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _get(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _made(model: Callable[..., Any], key: jax.Array) -> Any:
    calling.check_factory(model, "key")
    made = model(key=key)
    if not is_equinox(made):
        raise UserError(
            f"model={getattr(model, '__name__', model)!r}: called with key it gave"
            f" {type(made).__name__}; expected an Equinox module, or a pair (module, state)"
        )
    return made


def _axis_name(module: Any) -> Any:
    """The axis over the batch, as the layers of the module call it (`eqx.nn.BatchNorm`)."""
    names = {name for name in _axis_names(module, set()) if name is not None}
    if len(names) > 1:
        raise UserError(
            f"model={type(module).__name__}: its layers name several axes"
            f" ({', '.join(sorted(map(str, names)))}); there is one, over the batch"
        )
    return names.pop() if names else "batch"


def _axis_names(node: Any, seen: set[int]) -> Iterator[Any]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, list | tuple):
        for part in node:
            yield from _axis_names(part, seen)
    elif isinstance(node, dict):
        yield from _axis_names(list(node.values()), seen)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        if isinstance(name := getattr(node, "axis_name", None), str):
            yield name
        values = [getattr(node, field.name, None) for field in dataclasses.fields(node)]
        yield from _axis_names(values, seen)
