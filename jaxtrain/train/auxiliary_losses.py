"""Auxiliary losses: what a model has sown in a training pass, added by weight to the loss of the
task.

What is sown into a collection named for losses (`losses`, `aux_loss`, `moe_losses`) is added with
weight 1, unless a rule of `--aux_losses` gives another; what is sown elsewhere (`intermediates`)
only by such a rule. A task whose `loss` has an argument `sown` gets all of it instead, and nothing
is added.
"""

import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import messages, metrics, tree
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch


def task_sums(
    task: Any, outputs: Any, batch: Batch, sown: tree.PyTree, rules: tree.Rules[float] = ()
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The sums of a task for a training batch, with the auxiliary losses in "loss", and each beside
    it as `aux_NAME`.

    >>> class Task:
    ...     def loss(self, outputs, batch, *, train=True):
    ...         return {"loss": (outputs.sum(), jnp.float32(4))}
    >>> sown = {"losses": {"router": {"balance": (jnp.float32(0.5),)}}}
    >>> sums = task_sums(Task(), jnp.ones(4), {}, sown)
    >>> float(sums["loss"][0]), float(sums["aux_balance"][0])
    (6.0, 2.0)

    A number is one for the whole batch, and counts as often as its examples; an array (B,) is one
    an example, and counts by its weight. `UserError` for other shapes.
    """
    if sown and takes_sown(task):
        return dict(task.loss(outputs, batch, train=True, sown=sown))
    # a task of one's own may ask for it without a default
    train = {"train": True} if "train" in inspect.signature(task.loss).parameters else {}
    sums = dict(task.loss(outputs, batch, **train))
    weights = _weights(sown, rules)
    if not weights:
        return sums
    total, count = sums["loss"]
    for path, leaf in tree.flatten(sown).items():
        if (weight := weights.get(path)) is None:
            continue
        value = _sum(path, leaf, batch, count)
        total = total + weight * value
        key = f"aux_{name_of(path).removeprefix('aux_')}"
        before = sums.get(key, (jnp.float32(0), count))[0]
        sums[key] = (before + value, count)
    return sums | {"loss": (total, count)}


def takes_sown(task: Any) -> bool:
    """Whether a task adds what was sown itself."""
    return "sown" in inspect.signature(task.loss).parameters


def ignored(sown: tree.PyTree, rules: tree.Rules[float]) -> list[str]:
    """The names of what was sown, is called a loss, and is not added."""
    weights = _weights(sown, rules)
    return sorted(
        {name_of(path) for path in tree.flatten(sown) if path not in weights and "loss" in path}
    )


def name_of(path: str) -> str:
    """The name that a value was sown under: the last part of its path that is no number."""
    return next(part for part in reversed(path.split("/")) if not part.isdigit())


def _weights(sown: tree.PyTree, rules: tree.Rules[float]) -> dict[str, float]:
    """The weight of each sown value that is added, by path."""
    if not rules and not any(_is_for_losses(name) for name in sown):
        return {}
    names = sorted({name_of(path) for path in tree.flatten(sown)})
    for pattern, weight in rules:
        if not names:
            raise UserError(
                f"--aux_losses={pattern}={weight:g}: the model sows nothing in training; let it"
                " sow a loss (self.sow('losses', 'NAME', value)), or drop the flag"
            )
        if not any(re.search(pattern, path) for path in tree.flatten(sown)):
            raise UserError(
                f"--aux_losses={pattern}={weight:g}: the model sows no such value; it sows"
                f" {', '.join(names)}{messages.did_you_mean(pattern, names)}"
            )
    found = tree.flatten(tree.match(rules, sown, name="--aux_losses", default=float("nan")))
    return {
        path: 1.0 if math.isnan(weight) else weight
        for path, weight in found.items()
        if not math.isnan(weight) or _is_for_losses(path.split("/")[0])
    }


def _is_for_losses(collection: str) -> bool:
    return bool({"loss", "losses"} & set(re.findall(r"[a-z]+", collection.lower())))


def _sum(path: str, leaf: jax.Array, batch: Batch, count: jax.Array) -> jax.Array:
    value = jnp.asarray(leaf, jnp.float32)
    rows = jax.tree.leaves(dict(batch))[0].shape[0] if batch else 0
    if value.shape == ():
        # Where nothing counts, nothing is added, whatever it is.
        return jnp.where(count > 0, value * count, 0.0)
    if value.shape == (rows,):
        return metrics.weighted(value, batch.get("weight"))[0]
    raise UserError(
        f"{path}: an auxiliary loss of shape {value.shape}; sow one number (jnp.mean) or one an"
        f" example, ({rows},)"
    )
