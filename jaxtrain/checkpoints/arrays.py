"""The arrays of a checkpoint: a state copied to the host, stored by Orbax as a flat dict by path,
read back, and laid out on a mesh again.

What is stored depends on the names of the state's parts but on no class of Optax or Flax. Random
keys are stored as their data. Orbax is imported where it is used: it takes a while, and only runs
that save need it.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import extras, tree
from jaxtrain.checkpoints import former_layouts, lazy
from jaxtrain.errors import UserError
from jaxtrain.processes import group
from jaxtrain.tree import PyTree

HostState = dict[str, np.ndarray]
Specs = dict[str, list[Any]]
"""By path: the dtype, and the shape as stored (a random key has the shape of its data)."""
NO_MORE_THAN = 3  # names a message lists


def to_host(state: PyTree) -> HostState:
    """A copy of the state as NumPy arrays by path, after which the state may be donated.

    >>> to_host({"params": {"bias": jnp.zeros(2)}, "ema": None})
    {'params/bias': array([0., 0.], dtype=float32)}

    `UserError` if two leaves have one path, or a path could not be stored.
    """
    leaves = check_paths(state)
    plain = {
        path: jax.random.key_data(leaf) if tree.is_key(leaf) else leaf
        for path, leaf in leaves.items()
    }
    # Here the host waits for the device. On CPU `device_get` gives views of device memory, which
    # the next step overwrites: hence the copy.
    arrays = (
        jax.device_get(plain)
        if jax.process_count() == 1
        else {path: group.fetch(array) for path, array in plain.items()}
    )
    return {path: np.array(array, copy=True, order="C") for path, array in arrays.items()}


def check_paths(state: PyTree) -> dict[str, Any]:
    """The leaves of a state, abstract or not, by path; `UserError` if one could not be stored.

    >>> check_paths({"params": {"bias": 1}})
    {'params/bias': 1}
    """
    leaves = tree.flatten(state)
    for path in leaves:
        if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
            raise UserError(
                f"state: path {path!r} cannot be stored; rename this part of the model's parameters"
            )
    return leaves


def specs(state: PyTree) -> Specs:
    """Dtype and stored shape of every leaf of a state, abstract or not.

    >>> specs({"key": jax.random.key(0), "w": jnp.zeros((2, 3))})
    {'key': ['key<fry>', [2]], 'w': ['float32', [2, 3]]}
    """
    leaves = tree.flatten(state)
    shapes = {
        path: jax.eval_shape(jax.random.key_data, leaf).shape if tree.is_key(leaf) else leaf.shape
        for path, leaf in leaves.items()
    }
    return {path: [str(leaf.dtype), list(shapes[path])] for path, leaf in leaves.items()}


def to_devices(arrays: Mapping[str, Any], like: PyTree) -> PyTree:
    """The tree of `like`, filled with the arrays, each laid out as its leaf in `like` says. Those
    that are still in a file (`lazy.Lazy`) are read one at a time, and only what devices hold."""

    def place(path: str, leaf: Any) -> jax.Array:
        value = arrays[path]
        if isinstance(value, lazy.Lazy):
            return lazy.placed(path, value, leaf)
        sharding = getattr(leaf, "sharding", None)
        # May not alias: the first step donates these buffers, and a `jax.Array` of the caller would
        # be deleted with them. NumPy's memory is taken as it is on a CPU all the same (jax 0.10
        # ignores the word there), which does no harm: a donation leaves it alone.
        array = (
            jax.device_put(value, may_alias=False)
            if sharding is None
            else group.place(value, sharding)
        )
        # `key_impl` wants an array, and `like` is abstract.
        return (
            jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty(0, leaf.dtype)))
            if tree.is_key(leaf)
            else array
        )

    return jax.tree.unflatten(
        jax.tree.structure(like), [place(path, leaf) for path, leaf in tree.flatten(like).items()]
    )


def misfit(stored: Specs, wanted: Specs) -> str:
    """How stored arrays do not fit the wanted ones, or nothing if they do.

    >>> misfit(
    ...     {"emb": ["float32", [5, 2]]},
    ...     {"emb": ["float32", [6, 2]], "l2/w": ["float32", [2]], "l2/b": ["float32", [2]]},
    ... )
    'missing l2 (2 arrays), extra: none, shape: emb (5,2) vs (6,2)'
    """
    missing, extra = (
        _groups(wanted.keys() - stored.keys(), stored),
        _groups(stored.keys() - wanted.keys(), wanted),
    )
    shared = [path for path in wanted if path in stored]
    shapes = [
        f"{path} {_shape(stored[path])} vs {_shape(wanted[path])}"
        for path in shared
        if stored[path][1] != wanted[path][1]
    ]
    if not (missing or extra or shapes):
        return ""
    return f"missing{_listed(missing, ':')}, extra:{_listed(extra)}, shape:{_listed(shapes)}"


def check_fit(step: int, stored: Specs, wanted: Specs) -> None:
    """`UserError` if the paths, shapes or dtypes of a checkpoint are not the wanted ones."""
    if said := former_layouts.fused_attention(stored, wanted):
        raise UserError(f"checkpoint step {step} {said}")
    if problem := misfit(stored, wanted):
        raise UserError(f"checkpoint step {step} does not fit the model: {problem}")
    for path, (dtype, _) in wanted.items():
        if stored[path][0] != dtype:
            # Orbax would cast without a word.
            raise UserError(
                f"checkpoint {path} is {stored[path][0]}, model wants {dtype}; use the model of"
                " that run, or a new workdir"
            )


def castable(one: str, other: str) -> bool:
    """Whether an array may be stored in the other dtype: the same, or both of real floats."""
    if one == other or (one == "uint32" and other.startswith("key<")):
        return True
    return not {one[:4], other[:4]} & {"key<"} and all(
        jnp.issubdtype(jnp.dtype(dtype), jnp.floating) for dtype in (one, other)
    )


def not_finite(arrays: HostState, parts: Iterable[str]) -> str | None:
    """The first path under one of these parts whose array holds NaN or infinity."""
    for path, array in arrays.items():
        # Kind V: NumPy's word for bfloat16 and its like.
        if (
            array.dtype.kind in "fcV"
            and path.split("/")[0] in parts
            and not np.isfinite(array).all()
        ):
            return path
    return None


def digest(arrays: HostState) -> str:
    """SHA-256 over the sorted (path, dtype, shape, bytes)."""
    state = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        # The head ends in a newline and says how many bytes follow, so no two states have one text.
        state.update(json.dumps([path, str(array.dtype), list(array.shape)]).encode() + b"\n")
        state.update(
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
        )
    return state.hexdigest()


def write(folder: Path, arrays: HostState) -> None:
    """Stores arrays by Orbax in a new folder."""
    folder.mkdir(parents=True)
    with _orbax() as (ocp, handler, path):
        # Orbax refuses arrays without elements; their shapes, in the manifest, say all.
        handler.save(
            path(folder),
            args=ocp.args.PyTreeSave({name: array for name, array in arrays.items() if array.size}),
        )
        handler.finalize(path(folder))


def read(folder: Path, stored: Specs) -> HostState:
    """The arrays of a folder, which must be as `stored` says; `UserError` if they are not, before
    anything large is read."""
    dtypes = {
        path: np.dtype(np.uint32) if dtype.startswith("key<") else jnp.dtype(dtype)
        for path, (dtype, _) in stored.items()
    }
    need = sum(dtype.itemsize * math.prod(stored[path][1]) for path, dtype in dtypes.items())
    if need > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise UserError(
            f"declares {need} bytes of arrays, this machine has {memory} bytes of memory; refused"
        )
    empty = {path for path, (_, shape) in stored.items() if 0 in shape}
    with _orbax() as (ocp, handler, path):
        # The arrays' own metadata can lie as well: compared before anything is allocated by them.
        found = {
            name: (tuple(array.shape), np.dtype(array.dtype))
            for name, array in handler.metadata(path(folder)).tree.items()
        }
        if found != {
            name: (tuple(stored[name][1]), dtype)
            for name, dtype in dtypes.items()
            if name not in empty
        }:
            raise UserError("its arrays are not those of its manifest; refused")
        options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found}
        arrays = dict(
            handler.restore(path(folder), args=ocp.args.PyTreeRestore(restore_args=options))
        )
    return arrays | {name: np.zeros(stored[name][1], dtypes[name]) for name in empty}


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any, Any]]:
    """Orbax, a handler of flat dicts, and what makes a path into one that it takes."""
    extras.require("a checkpoint", "orbax.checkpoint")
    import orbax.checkpoint as ocp
    from etils import epath

    def is_ours(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    # Orbax logs a traceback for every error that it also raises; the user gets the one line that we
    # make of it.
    logger = logging.getLogger("absl")
    logger.addFilter(is_ours)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        # Orbax refuses relative paths, and the default workdir is one.
        yield ocp, handler, lambda folder: epath.Path(folder.absolute())
    finally:
        handler.close()
        logger.removeFilter(is_ours)


def _groups(paths: Iterable[str], others: Mapping[str, Any]) -> list[str]:
    """Paths under the shortest folders that the others lack: `params/l12 (4 arrays)` instead of
    four names."""
    present = {
        "/".join(parts[:end])
        for parts in (other.split("/") for other in others)
        for end in range(len(parts) + 1)
    }
    counts: dict[str, int] = {}
    for path in sorted(paths):
        parts = path.split("/")
        heads = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        head = next((head for head in heads if head not in present), path)
        counts[head] = counts.get(head, 0) + 1
    return [f"{head} ({count} arrays)" if count > 1 else head for head, count in counts.items()]


def _listed(names: list[str], colon: str = "") -> str:
    if not names:
        return f"{colon} none"
    more = f" and {len(names) - NO_MORE_THAN} more" if len(names) > NO_MORE_THAN else ""
    return f" {', '.join(names[:NO_MORE_THAN])}{more}"


def _shape(spec: list[Any]) -> str:
    return f"({','.join(map(str, spec[1]))})"
