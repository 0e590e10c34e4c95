"""Collectives in a model (`BatchNorm(axis_name="batch")`, `jax.lax.pmean`): over the whole batch.

Models for `jax.pmap` average over a named axis what each device has of a batch. Here a program sees
the whole batch and the compiler divides it, so such an axis is bound with size 1: every collective
over it is the identity, on the numbers of the whole batch.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxtrain.adapters.interface import Functions, NeedsKey, Variables
from jaxtrain.errors import UserError
from jaxtrain.tree import PyTree

_UNBOUND = re.compile(r"unbound axis name: (.+?)(?:\.? To fix this|\.?$)")
_MOST = 8
"""So many names a model may have; more would be one that is never found."""


def bound(functions: Functions) -> Functions:
    """The same functions with each axis bound that they name and that nobody has bound.

    >>> import jax.numpy as jnp
    >>> model = Functions(
    ...     lambda key, x: {"params": {}},
    ...     lambda variables, x, *, train, key=None: (x - jax.lax.pmean(jnp.mean(x), "batch"), {}),
    ...     None,
    ... )
    >>> bound(model).apply({"params": {}}, jnp.array([1.0, 3.0]), train=True)[0].tolist()
    [-1.0, 1.0]

    `UserError` for collectives among some members of an axis only: there is one member.
    """

    def init(key: jax.Array, inputs: Any) -> Variables:
        return with_axes(functions.init, key, inputs)

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        def run(variables: Variables, inputs: Any, key: jax.Array | None) -> Any:
            return functions.apply(variables, inputs, train=train, key=key)

        return with_axes(run, variables, inputs, key)

    return Functions(init, apply, functions.model)


def refused(functions: Functions, refusal: str) -> Functions:
    """The same functions, with `UserError(refusal)` where they name an axis that nobody has bound;
    `{axis}` in it is the name."""

    def apply(
        variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        try:
            return functions.apply(variables, inputs, train=train, key=key)
        except (NameError, NeedsKey) as error:
            if (name := _unbound_axis(error)) is None:
                raise
            raise UserError(refusal.format(axis=name)) from error

    return Functions(functions.init, apply, functions.model)


def with_axes(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """What a function gives, with every axis bound that it names and that nobody has bound."""
    names: list[str] = []
    while True:
        try:
            if names:
                _check(function, names, arguments)
            return _over(function, names)(*arguments)
        except (NameError, NeedsKey) as error:
            name = _unbound_axis(error)
            if name is None or name in names or len(names) >= _MOST:
                raise
            names.append(name)


def _over(function: Callable[..., PyTree], names: list[str]) -> Callable[..., PyTree]:
    for name in names:
        function = _over_one(function, name)
    return function


def _over_one(function: Callable[..., PyTree], name: str) -> Callable[..., PyTree]:
    def run(*arguments: PyTree) -> PyTree:
        # No argument has the axis; only what is made of the axis' own index does.
        found = jax.vmap(function, in_axes=None, axis_size=1, axis_name=name)(*arguments)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return run


def _check(function: Callable[..., PyTree], names: list[str], arguments: Any) -> None:
    """`UserError` for collectives that an axis of one member cannot have; `vmap` would ignore their
    groups without a word."""
    axes = ", ".join(map(repr, names))
    prefix = f"model: its collectives over the axis {axes} run over the whole batch, as one member"
    try:
        # As a function of nothing: the arguments may be of any kind.
        found = jax.make_jaxpr(lambda: function(*arguments), axis_env=[(n, 1) for n in names])()
    except (AssertionError, ValueError, NotImplementedError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{prefix}, and fail: {said.rstrip('.')}; write them for an axis of size 1"
        ) from error
    for equation in _equations(found.jaxpr):
        if any(max(pair) > 0 for pair in equation.params.get("perm", ()) if len(pair) == 2):
            raise UserError(
                f"{prefix}, and {equation.primitive.name} sends to others; let its pairs follow"
                " jax.lax.axis_size, which is 1"
            )
        if equation.params.get("axis_index_groups") is not None:
            raise UserError(
                f"{prefix}, and {equation.primitive.name} has axis_index_groups; leave them out,"
                " so that it takes the whole batch"
            )


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _unbound_axis(error: BaseException | None) -> str | None:
    """The axis that an error says nobody has bound; also where the error came of such a one."""
    while error is not None:
        found = _UNBOUND.search(str(error)) if isinstance(error, NameError) else None
        if found is not None:
            return found[1]
        error = error.__cause__
    return None
