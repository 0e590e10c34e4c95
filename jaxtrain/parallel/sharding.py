"""Sharding: the mesh axes of each array, from rules by path and from the models' logical axes.

The first of these that applies decides a parameter's sharding: a rule of `--shard`, then its
logical axes (`LOGICAL_TO_MESH`), then, for the mesh axis `fsdp` alone, the automatic rule: the
largest remaining dim that is divisible by its size is split over it.
"""

import math
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import messages, tree
from jaxtrain.errors import UserError
from jaxtrain.parallel.mesh import BATCH_AXES, OFFERED

LOGICAL_TO_MESH = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "fsdp": "fsdp",
    "tensor": "tensor",
}
"""The mesh axis over which a logical axis is split; models may also name these mesh axes
themselves. The automatic rule decides dims with other names, or none."""
Entry = str | tuple[str, ...] | None
"""Over which mesh axes one dim is split."""
AUTO = "auto"
"""The rule that leaves a parameter to its logical axes and the automatic rule."""


class Row(NamedTuple):
    """The sharding of one parameter, and what decided it."""

    path: str
    shape: tuple[int, ...]
    spec: str
    """One entry a dim, as `--shard` writes it; `-` alone is a whole copy on each device."""
    bytes: int
    """On one device."""
    why: str


def batch(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dim is split over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter(
    path: str,
    shape: Sequence[int],
    axes: Sequence[tree.AxisName] | None,
    mesh: Mesh,
    rule: str | None = None,
) -> PartitionSpec:
    """The spec of one parameter.

    >>> from jaxtrain.parallel import mesh
    >>> len(parameter("params/head/kernel", (64, 10), None, mesh.make("data:1"), rule="-:tensor"))
    0

    `rule` has one entry a dim, with colons: the mesh axis that the dim is split over, or `-`; a
    single `-` is a whole copy for any number of dims, and `auto` is no rule. Axes of size 1 split
    nothing and are left out. Dims beyond the last of `axes` have no name. `UserError` if a rule
    does not fit, or if a dim is not divisible by the size of its axis.
    """
    return _spec_and_reason(path, shape, axes, mesh, rule)[0]


def parameters(
    shapes: tree.PyTree, axes: tree.PyTree, mesh: Mesh, *, rules: tree.Rules[str] = ()
) -> tree.PyTree:
    """A `NamedSharding` for each parameter; `axes` has the same structure, with a tuple of names or
    None for each.

    `rules` are (pattern, rule) pairs over the paths within `shapes`, first match wins (see
    `parameter`). `UserError` if a pattern matches nothing.
    """
    flat_axes = tree.axes_by_path(axes)

    def place(path: Sequence[Any], leaf: jax.ShapeDtypeStruct, rule: str) -> NamedSharding:
        text = tree.path_text(path)
        return NamedSharding(
            mesh, parameter(f"params/{text}", leaf.shape, flat_axes.get(text), mesh, rule)
        )

    return jax.tree_util.tree_map_with_path(
        place, shapes, tree.match(rules, shapes, name="--shard", default=AUTO)
    )


def rows(
    params: tree.PyTree,
    axes: tree.PyTree,
    placed: tree.PyTree,
    mesh: Mesh,
    rules: tree.Rules[str] = (),
) -> list[Row]:
    """A row for each parameter: its sharding in `placed`, how many bytes of it a device holds, and
    what decided that."""
    flat_axes = tree.axes_by_path(axes)
    rule_indices = tree.match(
        tuple((pattern, index) for index, (pattern, _) in enumerate(rules)),
        params,
        name="--shard",
        default=-1,
    )
    found = []
    for (path, leaf), place, index in zip(
        tree.flatten(params).items(),
        jax.tree.leaves(placed),
        jax.tree.leaves(rule_indices),
        strict=True,
    ):
        pattern, rule = rules[index] if index >= 0 else ("", AUTO)
        entries = [*place.spec, *(None,) * (len(leaf.shape) - len(place.spec))]
        spec = ":".join(_entry_text(entry) for entry in entries) if any(entries) else "-"
        why = (
            _spec_and_reason(f"params/{path}", leaf.shape, flat_axes.get(path), mesh, AUTO)[1]
            if rule == AUTO
            else f"rule {pattern}"
        )
        found.append(
            Row(
                path,
                tuple(leaf.shape),
                spec,
                math.prod(place.shard_shape(leaf.shape)) * tree.itemsize(leaf),
                why,
            )
        )
    return found


def like_parameters(
    shapes: tree.PyTree, params: tree.PyTree, placed: tree.PyTree, mesh: Mesh
) -> tree.PyTree:
    """Shardings for a tree that holds copies of parameters, or of some of them (optimizer state,
    EMA): those of the parameter at the same path within its copy, if it has the same shape.

    What belongs to no parameter (counts, scalars) is replicated.
    """
    known = {
        _texts(path): (leaf.shape, place)
        for (path, leaf), place in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(placed), strict=True
        )
    }
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [_texts(path) for path, _ in leaves]
    # A path's end alone may be that of another parameter: the average of `b` in a state called `mu`
    # ends as a parameter `mu/b` does. A copy of the parameters is a node below which nothing
    # but parameters lies; the outermost such node decides.
    copies = _copies(paths, known)

    def place(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path) + 1):
            if path[:start] in copies:
                shape, sharding = known[path[start:]]
                return sharding if shape == leaf.shape else replicated(mesh)
        return replicated(mesh)

    return structure.unflatten(
        [place(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    )


def _copies(paths: Sequence[tuple[str, ...]], known: Container[tuple[str, ...]]) -> set[Any]:
    """The beginnings of paths after which only what is `known` follows."""
    alike: dict[tuple[str, ...], bool] = {}
    for path in paths:
        for end in range(len(path) + 1):
            alike[path[:end]] = alike.get(path[:end], True) and path[end:] in known
    return {begin for begin, is_copy in alike.items() if is_copy}


def _texts(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(tree.path_text((key,)) for key in path)


def bytes_per_device(shapes: tree.PyTree, shardings: tree.PyTree) -> int:
    """How many bytes of a tree each device holds."""
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * tree.itemsize(leaf)
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )


def _entry_text(entry: Entry) -> str:
    return "+".join(_axes_of(entry)) or "-"


def _axes_of(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _spec_and_reason(
    path: str,
    shape: Sequence[int],
    axes: Sequence[tree.AxisName] | None,
    mesh: Mesh,
    rule: str | None,
) -> tuple[PartitionSpec, str]:
    """The spec of one parameter, and the reason in words."""
    if rule is not None and rule != AUTO:
        entries, reasons = _by_rule(path, shape, mesh, rule), [f"rule {rule}"]
    else:
        entries, reasons = _by_logical_axes(path, shape, axes, mesh)
        reasons += _automatic(shape, entries, mesh)
    while entries and entries[-1] is None:
        # jax drops them too, and a spec that differs in writing alone would compile a second
        # program
        entries.pop()
    return PartitionSpec(*entries), ", ".join(reasons)


def _by_rule(path: str, shape: Sequence[int], mesh: Mesh, rule: str) -> list[Entry]:
    prefix, entries = f"--shard: {path}: {rule!r}", [part.strip() for part in rule.split(":")]
    if entries == ["-"]:
        return [None] * len(shape)
    for entry in entries:
        if entry != "-" and entry not in OFFERED:
            near = messages.did_you_mean(entry, OFFERED)
            raise UserError(
                f"{prefix} has the unknown axis {entry!r}; give {', '.join(OFFERED)} or - for each"
                f" dim{near}"
            )
        if entry != "-" and entries.count(entry) > 1:
            raise UserError(
                f"{prefix} has axis {entry} twice; an axis splits one dim of an array, give - for"
                " the other"
            )
    if len(entries) != len(shape):
        unfit = (
            f"has {len(entries)} of {len(shape)} entries, one for each of its dims {list(shape)}"
        )
        raise UserError(f"{prefix} {unfit}; a single - is a whole copy")
    for dim, (length, axis) in enumerate(zip(shape, entries, strict=True)):
        if axis != "-" and length % mesh.shape[axis]:
            near = messages.nearest_multiples(mesh.shape[axis], length)
            unfit = f"dim {dim} (={length}) not divisible by axis {axis}={mesh.shape[axis]}"
            raise UserError(f"{prefix}: {unfit}; give - for it, or make it {near}")
    return [axis if axis != "-" and mesh.shape[axis] > 1 else None for axis in entries]


def _by_logical_axes(
    path: str, shape: Sequence[int], axes: Sequence[tree.AxisName] | None, mesh: Mesh
) -> tuple[list[Entry], list[str]]:
    if axes is not None and len(axes) > len(shape):
        raise UserError(
            f"{path}: has logical axes {tuple(axes)} for dims {list(shape)}; its model must name"
            " at most as many as there are"
        )
    entries: list[Entry] = [None] * len(shape)
    reasons = []
    used: list[str] = []
    # Of a shorter list the last dims have no name, as in Flax.
    for dim, (length, name) in enumerate(zip(shape, axes or (), strict=False)):
        names = name if isinstance(name, tuple) else (name,)
        wanted = (LOGICAL_TO_MESH.get(each) for each in names if each)
        found = [axis for axis in dict.fromkeys(wanted) if axis and axis not in used]
        found = [axis for axis in found if mesh.shape[axis] > 1]
        if not found:
            continue
        size = math.prod(mesh.shape[axis] for axis in found)
        said = "+".join(found)
        if length % size:
            near = messages.nearest_multiples(size, length)
            raise UserError(
                f"{path} dim {dim} (={length}, {name!r}) not divisible by axis {said}={size};"
                f" change --mesh or make it {near}"
            )
        entries[dim] = found[0] if len(found) == 1 else tuple(found)
        used += found
        reasons.append(f"{_entry_text(name)}->{said}")
    return entries, reasons


def _automatic(shape: Sequence[int], entries: list[Entry], mesh: Mesh) -> list[str]:
    """Splits the largest remaining dim that is divisible over `fsdp`, in `entries`, unless that
    axis is in use; returns the reason in words, or nothing."""
    size = mesh.shape["fsdp"]
    whole = not any(entries)
    if size == 1 or any("fsdp" in _axes_of(entry) for entry in entries):
        unused = [axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1]
        return (
            [
                (
                    f"whole: no dim of it goes to {' or '.join(unused)}"
                    if unused
                    else "whole: the mesh splits batches only"
                )
            ]
            if whole
            else []
        )
    free = [
        (length, -dim)
        for dim, length in enumerate(shape)
        if entries[dim] is None and length % size == 0 and length > 0
    ]
    if not free and None not in entries and not whole:
        return []
    if not free:
        rest = "no dim" if whole else "no other dim"
        return [f"{'whole: ' * whole}{rest} divides by fsdp={size}"]
    dim = -max(free)[1]
    entries[dim] = "fsdp"
    return [f"automatic: dim {dim}"]
