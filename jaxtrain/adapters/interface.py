"""The one pure interface to models of any kind: what `init` and `apply` take and give."""

import dataclasses
from typing import Any, Protocol

import jax

from jaxtrain.errors import UserError
from jaxtrain.tree import Axes, PyTree

Variables = dict[str, PyTree]


class Init(Protocol):
    """Makes the variables of a model for inputs of this shape and dtype."""

    def __call__(self, key: jax.Array, inputs: Any) -> Variables: ...


class Apply(Protocol):
    """Runs a model; all its random streams are made of `key`.

    A tuple of inputs is given as `model(*inputs)`, a mapping as `model(**inputs)`, all else as
    `model(inputs)`. `NeedsKey` if the model draws random numbers and there is no key.
    """

    def __call__(
        self, variables: Variables, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]: ...


@dataclasses.dataclass(frozen=True)
class Functions:
    """A model as two pure functions, and the object they came from."""

    init: Init
    apply: Apply
    model: Any


class NeedsKey(UserError):
    """The model draws random numbers in a pass that has no key; evaluation then gives one to each
    example."""


def split_sown(changed: Variables, variables: Variables) -> tuple[Variables, Variables]:
    """What a pass gave back beside its outputs, as collections of the state and what was sown: the
    collections that were none of the variables.

    >>> split_sown({"batch_stats": 1, "losses": 2}, {"params": 0, "batch_stats": 0})
    ({'batch_stats': 1}, {'losses': 2})
    """
    kept = {name: tree for name, tree in changed.items() if name in variables}
    return kept, {name: tree for name, tree in changed.items() if name not in variables}


def axes_named(names: Any) -> Axes | None:
    """The names that a model gave, also as a `PartitionSpec`; what is no name counts as none."""
    if names is None:
        return None
    return Axes(name if isinstance(name, str | tuple) and name else None for name in names)
