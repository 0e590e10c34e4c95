"""The variables of a model as a stored state holds them: the parameters that are evaluated (or the
raw ones) and the model's other collections, flat by path, without optimizer and data.

Paths begin with the collection, as in Flax: `params/head/kernel`, `batch_stats/norm0/mean`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxtrain.checkpoints import committed, manifest
from jaxtrain.checkpoints.arrays import HostState, Specs
from jaxtrain.checkpoints.checkpoints import read_step
from jaxtrain.errors import CheckpointError, UserError

Choice = Literal["auto", "average", "raw"]
"""Which parameters: the average where there is one, the average or an error, the raw ones."""
AVERAGE, SCHEDULE_FREE = "its average (ema_decay)", "its schedule-free average"


@dataclasses.dataclass(frozen=True)
class Stored:
    """The variables of one stored model, not read yet."""

    specs: Specs
    """Dtype and shape by path."""
    read: Callable[[], dict[str, Any]]
    """Reads them all, or says where they are (`lazy.Lazy`); `CheckpointError` if that fails."""
    step: int | None
    averaged: str
    """Which average the parameters are, in words; empty for the raw ones."""
    image: tuple[int, int] | None = None
    """Height and width of the images that the model saw, where its run says so."""


def of_step(folder: Path, *, choice: Choice = "auto") -> Stored:
    """The variables in the folder of one committed step; `CheckpointError` if it is not whole,
    `UserError` if `choice` asks for an average that it does not hold."""
    if problems := committed.problems(folder):
        raise CheckpointError(f"step {folder.name}: {problems[0]}")
    record = manifest.read(folder)
    stored: Specs = record["tree"]
    averaged = _average_of(stored) if choice != "raw" else ""
    if choice == "average" and not averaged:
        raise UserError(
            f"step {folder.name} holds no average of the parameters (it was trained without"
            " --ema_decay); take the raw ones"
        )
    taken = _names(stored, averaged)
    specs = {name: stored[path] for name, path in taken.items()}

    def read() -> HostState:
        found = read_step(folder, stored)
        variables = {name: found[path] for name, path in taken.items()}
        return _schedule_free(variables, found) if averaged == SCHEDULE_FREE else variables

    return Stored(specs, read, record.get("step"), averaged, image_of(_run_of(folder)))


def image_of(record: Any) -> tuple[int, int] | None:
    """Height and width of the images that a run saw, by its run.json.

    >>> image_of({"inputs": {"fields": {"image": {"shape": [8, 8, 1], "dtype": "uint8"}}}})
    (8, 8)
    """
    try:
        for field in record["inputs"]["fields"].values():
            if len(field["shape"]) == 3:
                return int(field["shape"][0]), int(field["shape"][1])
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # a record of another version knows nothing of it
    return None


def _run_of(folder: Path) -> Any:
    """What the run.json beside the checkpoints says, if there is one."""
    try:
        return json.loads((folder.parent.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _average_of(stored: Specs) -> str:
    """Which average a stored state holds, in the order in which evaluation prefers them."""
    if any(path.startswith("ema/") for path in stored):
        return AVERAGE
    return SCHEDULE_FREE if _schedule_free_prefix(stored) is not None else ""


def _names(stored: Specs, averaged: str) -> dict[str, str]:
    """The name of each variable, and the path under which the state holds it; what an average
    leaves out is as it is."""
    places = {"params": "params/", "collections": ""}
    names = {
        f"{places[part]}{rest}": path
        for path in stored
        for part, _, rest in (path.partition("/"),)
        if part in places
    }
    if averaged == AVERAGE:
        names |= {
            f"params/{path.removeprefix('ema/')}": path for path in stored if path[:4] == "ema/"
        }
    return names


def _schedule_free_prefix(stored: Iterable[str]) -> str | None:
    """Where a state holds that of Optax's schedule-free wrapper; None if it holds none, or several,
    of which none is all parameters'."""
    ends = ("b1", "weight_sum", "max_lr", "step_count")
    there = set(stored)
    found = [
        prefix
        for path in there
        if path.startswith("opt_state/") and path.endswith(ends[1])
        for prefix in [path.removesuffix(ends[1])]
        if all(f"{prefix}{end}" in there for end in ends)
    ]
    return found[0] if len(found) == 1 else None


def _schedule_free(variables: HostState, found: HostState) -> HostState:
    """The parameters as schedule-free optimizers evaluate them; frozen ones are as they are."""
    prefix = _schedule_free_prefix(found)
    assert prefix is not None
    # Evaluation reads the number of the recipe, which a resume may have changed.
    b1 = found.get("hyper/optimizer.b1", found[f"{prefix}b1"])
    averages = {
        name: np.asarray(_compiled()(value, found[z], b1))
        for name, value in variables.items()
        if (z := f"{prefix}z/{name.removeprefix('params/')}") in found
        and name.startswith("params/")
    }
    return variables | averages


@functools.cache
def _compiled() -> Any:
    # Compiled, as evaluation is: the same operations in the same precision.
    return jax.jit(lambda param, z, b1: ((param - (1 - b1) * z) / b1).astype(param.dtype))
