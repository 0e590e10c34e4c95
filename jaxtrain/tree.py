"""Paths of a pytree, and the one rule language over them: ordered (pattern, value) pairs, first
match wins."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from jaxtrain.errors import UserError

PyTree = Any
Batch = Mapping[str, jax.Array]
"""Examples by field, each array with a leading batch dim."""
Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""The shapes and dtypes of a batch that need not exist."""
Value = TypeVar("Value")
Rules = tuple[tuple[str, Value], ...]
AxisName = str | tuple[str, ...] | None
"""What a model says of one dim: a name, several, or nothing."""


class Axes(tuple[AxisName, ...]):
    """The logical axes of one array: a leaf in a tree of axes, where JAX takes a plain tuple for a
    part of the tree.

    >>> jax.tree.leaves([Axes(("embed", None)), ("embed", None)])
    [('embed', None), 'embed']
    """

    __slots__ = ()


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their slash paths, in the tree's own order.

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})
    {'dense/bias': 2, 'dense/kernel': 1}

    `UserError` if two leaves have the same path.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        text = path_text(path)
        if text in flat:
            raise UserError(
                f"{text}: two arrays have this path; rename a key, so that rules and checkpoints"
                " can tell them apart"
            )
        flat[text] = leaf
    return flat


def axes_by_path(axes: PyTree) -> dict[str, Axes]:
    """The logical axes of the arrays that have any, by path.

    >>> axes_by_path({"dense": {"kernel": ("embed", None), "bias": None}, "pairs": [(None, None)]})
    {'dense/kernel': ('embed', None), 'pairs/0': (None, None)}

    A plain tuple of names counts as axes too; in a tree that holds tuples itself only `Axes` are
    beyond doubt.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=_are_axes)
    return {path_text(path): Axes(names) for path, names in leaves if _are_axes(names)}


def path_text(path: Sequence[Any]) -> str:
    """One key path as text: `params/dense_0/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def match(
    rules: Rules[Value],
    tree: PyTree,
    *,
    name: str,
    default: Value | None = None,
    must_decide: bool = True,
) -> PyTree:
    """A tree of values: for each leaf that of the first rule whose pattern is found in its path
    (`re.search`).

    >>> match((("bias", 0.0), (".*", 1.0)), {"kernel": 3, "bias": 4}, name="decay")
    {'bias': 0.0, 'kernel': 1.0}

    `name` is how messages call the rules. `UserError` if a pattern is not a regular expression,
    matches no leaf, or if no pattern matches a leaf and there is no `default`. Of rules that are
    made for any tree, such as the optimizers' own names, some match no leaf: `must_decide=False`.
    """
    compiled = [(compile_pattern(pattern, name), value) for pattern, value in rules]
    idle = set(range(len(compiled)))

    def value_at(path: Sequence[Any], _: Any) -> Value:
        text = path_text(path)
        for index, (pattern, value) in enumerate(compiled):
            if pattern.search(text):
                idle.discard(index)
                return value
        if default is None:
            raise UserError(f"{name}: no pattern matches {text}; add a last rule '.*=...'")
        return default

    values = jax.tree_util.tree_map_with_path(value_at, tree)
    if idle and must_decide:
        first = rules[min(idle)][0]
        known = ", ".join(list(flatten(tree))[:6])
        raise UserError(
            f"{name}: pattern {first!r} decides no parameter (paths: {known}, ...); remove it or"
            " mend it"
        )
    return values


def rows_by_path(columns: Mapping[str, PyTree], tree: PyTree) -> list[tuple[str, ...]]:
    """Rows (path, shape, value of each column) that show which rule each leaf follows."""
    flat = {name: flatten(column) for name, column in columns.items()}
    return [
        (path, str(tuple(leaf.shape)), *(str(flat[name][path]) for name in columns))
        for path, leaf in flatten(tree).items()
    ]


def size(tree: PyTree) -> int:
    """The number of array elements in a tree.

    >>> import numpy as np
    >>> size({"a": np.zeros((2, 3)), "b": np.zeros(4)})
    10
    """
    return sum(leaf.size for leaf in jax.tree_util.tree_leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """How many bytes the arrays of a tree take, without copies on other devices."""
    return sum(leaf.size * itemsize(leaf) for leaf in jax.tree_util.tree_leaves(tree))


def itemsize(leaf: Any) -> int:
    """How many bytes an element of an array takes."""
    # A typed key has no itemsize of its own: threefry's is two 32-bit words.
    return 8 if is_key(leaf) else leaf.dtype.itemsize


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed random keys."""
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A Python number among a model's parameters: part of the tree's structure, so that no program
    makes an array of it and nothing trains it.

    >>> Constant(1) == Constant(1), Constant(1) == Constant(1.0), Constant(1) == Constant(True)
    (True, False, False)
    """

    value: complex

    def _text(self) -> str:
        return f"{type(self.value).__name__}({self.value!r})"  # nan is as nan is

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())


def with_constants(tree: PyTree) -> PyTree:
    """The tree with each Python number as a `Constant`.

    >>> with_constants({"width": 3, "name": None})
    {'name': None, 'width': Constant(value=3)}
    """

    def wrap(leaf: Any) -> Any:
        # NumPy's numbers, of which some are Python's too, are arrays.
        is_number = isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype")
        return Constant(leaf) if is_number else leaf

    return jax.tree.map(wrap, tree)


def without_constants(tree: PyTree) -> PyTree:
    """The tree with its Python numbers as the model made them."""
    return jax.tree.map(
        lambda leaf: leaf.value if _is_constant(leaf) else leaf, tree, is_leaf=_is_constant
    )


def constants(tree: PyTree) -> dict[str, complex]:
    """The Python numbers of a tree by their slash paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_constant)
    return {path_text(path): leaf.value for path, leaf in leaves if _is_constant(leaf)}


def _is_constant(leaf: Any) -> bool:
    return isinstance(leaf, Constant)


def _are_axes(node: Any) -> bool:
    return isinstance(node, Axes) or (
        type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
    )


def compile_pattern(pattern: str, name: str) -> re.Pattern[str]:
    """The pattern of a rule; `UserError`, naming the rules, if it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name}: {pattern!r} is not a regular expression ({error})") from error
