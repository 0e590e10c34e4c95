"""Labels checked on the host, by whole sets or by the batch, and those that are to be ignored.

In compiled code a label that is no class makes the loss nan (`losses.py`); here it is found out
before that, and named. N: rows
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import losses
from jaxtrain.errors import UserError
from jaxtrain.tree import Batch

Rows = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Rows whose labels a task cannot use."""

    rows_N: np.ndarray
    """Which rows, ascending."""
    problem: str
    """What is wrong with the first of them, such as "label is -1"."""
    rule: str
    """What would be right, such as "there are 10 classes, 0..9"."""
    remedy: str = ""
    """What to do about it, if the data itself is not to be mended."""


def wrong_classes(
    rows: Rows,
    field: str,
    logits: tuple[int, ...],
    ignore: int | None,
    *,
    whole: bool = False,
    what: str = "classes",
) -> Wrong | None:
    """The rows of which a label (N, ...) is no class, or whose probabilities (N, ..., C) are none,
    for logits of the shape (any, ..., C).

    >>> wrong_classes({"label": np.array([0, 3, 1, -1])}, "label", (4, 3), ignore=-1)
    Wrong(rows_N=array([1]), problem='label is 3', rule='there are 3 classes, 0..2', remedy='')

    `whole` says that these are all rows of a set, of which some must not be ignored.
    """
    if field not in rows:
        return None  # said where the model runs on shapes
    labels, num_classes = np.asarray(rows[field]), logits[-1]
    if _within(labels, num_classes, ignore) and labels.ndim != len(logits):
        return None
    ignored = np.zeros(labels.shape, bool) if ignore is None else labels == ignore
    if whole and ignored.size and ignored.all():
        return _all_ignored(rows, field, ignore)
    if labels.ndim == len(logits):
        if labels.shape[-1] != num_classes:
            return None  # said where the model runs on shapes
        labels = labels.reshape(len(labels), -1, num_classes)
        ignored = ignored.reshape(labels.shape)
        return _wrong_shares(labels, field, ignored)
    bad = ~((labels >= 0) & (labels < num_classes) | ignored)
    if labels.dtype.kind == "f":
        bad |= ~((labels == np.floor(labels)) | ignored)
    rule = f"there are {num_classes} {what}, 0..{num_classes - 1}"
    return _first(labels, bad, field, rule, ignore)


def _within(labels: np.ndarray, num_classes: int, ignore: int | None) -> bool:
    """Whether whole numbers are classes beyond doubt, found without a copy: a file of tokens may
    be larger than the memory."""
    if labels.dtype.kind not in "iub" or not labels.size:
        return False
    low, high = int(labels.min()), int(labels.max())
    return 0 <= low and high < num_classes and not low == high == ignore


def wrong_bits(rows: Rows, field: str, ignore: int | None, *, whole: bool = False) -> Wrong | None:
    """The rows of which a label is neither 0 nor 1."""
    if field not in rows:
        return None
    labels = np.asarray(rows[field])
    ignored = np.zeros(labels.shape, bool) if ignore is None else labels == ignore
    if whole and ignored.size and ignored.all():
        return _all_ignored(rows, field, ignore)
    bad = ~((labels == 0) | (labels == 1) | ignored)
    return _first(labels, bad, field, "it must be 0 or 1", ignore)


def wrong_numbers(rows: Rows, field: str) -> Wrong | None:
    """The rows of which a number is not finite."""
    if field not in rows:
        return None
    numbers = np.asarray(rows[field])
    if numbers.dtype.kind in "biu":
        return None
    return _first(numbers, ~np.isfinite(numbers), field, "it must be finite", ignore=0)


def wrong_weights(rows: Rows) -> Wrong | None:
    """The rows whose weight is negative or not finite."""
    if "weight" not in rows:
        return None
    weights = np.asarray(rows["weight"])
    bad = ~(np.isfinite(weights) & (weights >= 0))
    return _first(weights, bad, "weight", "it must be finite and >= 0", ignore=0)


def _all_ignored(rows: Rows, field: str, ignore: int | None) -> Wrong:
    every = np.arange(len(rows[field]))
    return Wrong(every, f"{field} is {ignore}", f"--task.ignore={ignore} leaves all of them out")


def _wrong_shares(labels_NPC: np.ndarray, field: str, ignored_NPC: np.ndarray) -> Wrong | None:
    """Of the distributions at P places of each row, those that are none."""
    sums_NP = labels_NPC.sum(-1, dtype=np.float64)
    right_NP = (labels_NPC >= 0).all(-1) & (np.abs(sums_NP - 1) <= losses.SUM_TOLERANCE)
    bad_NP = ~(right_NP | ignored_NPC.all(-1))
    if not bad_NP.any():
        return None
    rows_N = np.flatnonzero(bad_NP.any(1))
    place = (rows_N[0], bad_NP[rows_N[0]].argmax())
    low, total = labels_NPC[place].min(), sums_NP[place]
    problem = f"{field} sums to {total:g}" if low >= 0 else f"{field} holds {low:g}"
    rule = "the probabilities of an example must be >= 0 and sum to 1"
    return Wrong(
        rows_N,
        problem,
        rule,
        "take the task MultiLabel (--task=multi_label) for several labels an example",
    )


def _first(
    labels: np.ndarray, bad: np.ndarray, field: str, rule: str, ignore: int | None
) -> Wrong | None:
    if not bad.any():
        return None
    rows_N = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
    value = labels[rows_N[0]][bad[rows_N[0]]].flat[0] if labels.ndim > 1 else labels[rows_N[0]]
    text = f"{value:g}" if labels.dtype.kind == "f" else str(value)
    whole = labels.dtype.kind != "f" or float(value).is_integer()
    remedy = (
        f"set --task.ignore={text} to leave such labels out" if ignore is None and whole else ""
    )
    return Wrong(rows_N, f"{field} is {text}", rule, remedy)


def left_out(
    labels_B: jax.Array, weights_B: jax.Array | None, ignore: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """Labels and weights with the labels that are to be ignored at weight 0, and as class 0.

    >>> import jax.numpy as jnp
    >>> [part.tolist() for part in left_out(jnp.array([2, -1]), None, -1)]
    [[2, 0], [1.0, 0.0]]

    Of distributions (B, C) those that hold nothing else.
    """
    labels_B = losses.whole_numbers(labels_B)
    if ignore is None:
        return labels_B, weights_B
    out_B = labels_B == ignore
    return (
        jnp.where(out_B, jnp.zeros_like(labels_B), labels_B),
        jnp.where(out_B, 0.0, 1.0 if weights_B is None else weights_B),
    )


def refuse_mixed(
    batch: Batch, why: str = "mix class labels, which this task does not have"
) -> None:
    """`UserError` if mixup or cutmix made the examples of a batch of two: then one label is not
    the truth."""
    if "label_other" in batch:
        raise UserError(f"--augment.mixup, --augment.cutmix: {why}; set both to 0")


def spread(weights: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Weights of examples (B,), or of all that is in them, as those of all that is in them."""
    if weights is None or weights.shape == shape or weights.shape != shape[:1]:
        return weights
    return jnp.broadcast_to(weights.reshape(-1, *(1,) * (len(shape) - 1)), shape)
