"""What training leaves as it is: the statistics of frozen modules, and the lines that say what is
not trained."""

from collections.abc import Sequence

import jax

from jaxtrain import tree
from jaxtrain.optimizers import Optimizer
from jaxtrain.optimizers.trained import has_gradient

NO_MORE_THAN = 4
"""So many names a note lists."""


def kept(
    trains: tree.PyTree,
    old: dict[str, tree.PyTree],
    new: dict[str, tree.PyTree],
) -> dict[str, tree.PyTree]:
    """The new collections, but the old numbers of each module all of whose own parameters are
    frozen, such as the running averages of a frozen batch norm.

    >>> trains = {"norm": {"scale": False}, "head": {"kernel": True}}
    >>> kept(trains, {"stats": {"norm": {"mean": 1}}}, {"stats": {"norm": {"mean": 2}}})
    {'stats': {'norm': {'mean': 1}}}

    `trains` is the mask of trained parameters.
    """
    fixed = _fixed_paths(trains, new)
    if not fixed:
        return new
    before = tree.flatten(old)

    def choose(path: Sequence[object], leaf: jax.Array) -> jax.Array:
        text = tree.path_text(path)
        return before.get(text, leaf) if text in fixed else leaf

    return jax.tree_util.tree_map_with_path(choose, new)


def frozen_notes(
    optimizer: Optimizer, params: tree.PyTree, collections: dict[str, tree.PyTree]
) -> list[str]:
    """A line for each kind of thing that is not trained though no rule says so, and one for the
    statistics that frozen modules keep; parameters and collections may be abstract.

    >>> import jax.numpy as jnp
    >>> from jaxtrain.optimizers import SGD
    >>> frozen_notes(SGD(), {"w": jnp.ones(2), "ids": jnp.arange(3)}, {})
    ['note: not trained, since they hold no floats: ids (int32)']
    """
    notes = []
    others = {path: leaf for path, leaf in tree.flatten(params).items() if not has_gradient(leaf)}
    if others:
        names = [f"{path} ({leaf.dtype})" for path, leaf in others.items()]
        notes.append(f"note: not trained, since they hold no floats: {_listed(names)}")
    if numbers := tree.constants(params):
        names = [f"{path}={number!r}" for path, number in numbers.items()]
        notes.append(
            f"note: not trained, since they are Python numbers: {_listed(names)}; make them arrays,"
            " such as jnp.float32(0.5), to train them"
        )
    modules = dict.fromkeys(_fixed_paths(optimizer.trained(params), collections).values())
    if modules:
        notes.append(
            "note: frozen modules keep their running statistics:"
            f" {_listed(list(modules))}; in training they normalise as the model says (by the"
            " batch, if it is not told otherwise), in evaluation by these statistics"
        )
    return notes


def _fixed_paths(trains: tree.PyTree, collections: dict[str, tree.PyTree]) -> dict[str, str]:
    """The paths in the collections whose module is frozen, and that module: the innermost one about
    them that holds parameters has no trained one (of its own, if it has any)."""
    flat = tree.flatten(trains)
    if all(flat.values()):
        return {}
    own: dict[str, bool] = {}
    under: dict[str, bool] = {}
    for path, keep in flat.items():
        parts = path.split("/")[:-1]
        own["/".join(parts)] = own.get("/".join(parts), False) or keep
        for end in range(len(parts) + 1):
            module = "/".join(parts[:end])
            under[module] = under.get(module, False) or keep
    found = {}
    for path in tree.flatten(collections):
        parts = path.split("/")[1:-1]
        about = ("/".join(parts[:end]) for end in range(len(parts), -1, -1))
        module = next((module for module in about if module in under), "")
        if not own.get(module, under.get(module, True)):
            found[path] = module
    return found


def _listed(names: list[str]) -> str:
    more = len(names) - NO_MORE_THAN
    return ", ".join(names[:NO_MORE_THAN]) + (f" and {more} more" if more > 0 else "")
