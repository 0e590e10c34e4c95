"""Metrics that are no sums over examples, computed on the host in float64 from all examples of a
set: areas under curves, F scores, explained variance.

Each takes `weights_N`, as the sums do. The definitions are scikit-learn's.
N: examples, C: classes or labels, D: features
"""

from collections.abc import Iterable, Mapping

import numpy as np


def auc(scores_N: np.ndarray, positive_N: np.ndarray, weights_N: np.ndarray) -> float:
    """The area under the ROC curve: how likely a positive example has a higher score than a
    negative one, ties counted half; nan without examples of both.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 1, 0, 1]), np.ones(4))
    0.875
    """
    positive_N = positive_N.astype(bool)
    _, place_N = np.unique(scores_N.astype(np.float64), return_inverse=True)
    higher = np.bincount(place_N, weights_N * positive_N)
    lower = np.bincount(place_N, weights_N * ~positive_N)
    pairs = higher.sum() * lower.sum()
    below = np.cumsum(lower) - 0.5 * lower
    return float((higher * below).sum() / pairs) if pairs else float("nan")


def macro_auc(scores_NC: np.ndarray, positive_NC: np.ndarray, weights_NC: np.ndarray) -> float:
    """The mean over classes of the area under the curve of each against the rest; classes without
    examples of both sides are left out."""
    every = [
        auc(scores_NC[:, place], positive_NC[:, place], weights_NC[:, place])
        for place in range(scores_NC.shape[1])
    ]
    found = [value for value in every if not np.isnan(value)]
    return float(np.mean(found)) if found else float("nan")


def counts(
    label_NC: np.ndarray, prediction_NC: np.ndarray, weights_NC: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each class, or label of several: how many are rightly found, found, and there, as (C,)
    each."""
    label_NC, prediction_NC = label_NC.astype(bool), prediction_NC.astype(bool)
    return (
        (weights_NC * (label_NC & prediction_NC)).sum(0, dtype=np.float64),
        (weights_NC * prediction_NC).sum(0, dtype=np.float64),
        (weights_NC * label_NC).sum(0, dtype=np.float64),
    )


def f1(right_C: np.ndarray, found_C: np.ndarray, there_C: np.ndarray) -> np.ndarray:
    """The F1 of each class by its counts; 0 for one that is neither found nor there.

    >>> f1(np.array([1.0]), np.array([2.0]), np.array([1.0]))
    array([0.66666667])
    """
    return share(2 * right_C, found_C + there_C)


def share(part_C: np.ndarray, whole_C: np.ndarray) -> np.ndarray:
    """Part by whole, and 0 where the whole is 0."""
    part_C, whole_C = np.asarray(part_C, np.float64), np.asarray(whole_C, np.float64)
    return np.divide(part_C, whole_C, out=np.zeros_like(whole_C), where=whole_C != 0)


def r2(target_ND: np.ndarray, prediction_ND: np.ndarray, weights_N: np.ndarray) -> float:
    """The share of the targets' variance that is explained, the mean over features; of a feature
    that does not vary 1 if all is right, and 0 otherwise; nan of a single example.

    >>> r2(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]), np.ones(2))
    0.5
    """
    if np.count_nonzero(weights_N) < 2:
        return float("nan")
    weights_N1 = weights_N.astype(np.float64)[:, None]
    mean_D = (weights_N1 * target_ND).sum(0) / weights_N1.sum()
    missed_D = (weights_N1 * (target_ND - prediction_ND) ** 2).sum(0)
    varied_D = (weights_N1 * (target_ND - mean_D) ** 2).sum(0)
    explained_D = np.where(varied_D > 0, 1 - share(missed_D, varied_D), missed_D == 0)
    return float(explained_D.mean())


def of_classes(
    names: Iterable[str], label_N: np.ndarray, prediction_N: np.ndarray, weights_N: np.ndarray
) -> dict[str, float]:
    """The metrics of these names by counts of classes: `f1_macro`, `f1_micro`,
    `balanced_accuracy`, and `per_class`, which is `accuracy_class_0`, ...

    >>> of_classes(["per_class"], np.array([0, 0, 2]), np.array([0, 1, 2]), np.ones(3))
    {'accuracy_class_0': 0.5, 'accuracy_class_2': 1.0}

    Classes that are neither labels nor predictions are in no mean.
    """
    size = 1 + int(max(label_N.max(initial=0), prediction_N.max(initial=0)))
    matrix_CC = np.zeros((size, size))
    np.add.at(matrix_CC, (label_N.astype(np.int64), prediction_N.astype(np.int64)), weights_N)
    right_C, found_C, there_C = matrix_CC.diagonal(), matrix_CC.sum(0), matrix_CC.sum(1)
    recall_C = share(right_C, there_C)
    values: dict[str, float] = {}
    for name in names:
        if name == "f1_macro":
            values[name] = float(f1(right_C, found_C, there_C)[(found_C + there_C) > 0].mean())
        elif name == "f1_micro":
            whole = share(right_C.sum(keepdims=True), there_C.sum(keepdims=True))
            values[name] = float(whole[0])
        elif name == "balanced_accuracy":
            values[name] = float(recall_C[there_C > 0].mean())
        elif name == "per_class":
            values |= {
                f"accuracy_class_{place}": float(recall_C[place])
                for place in np.flatnonzero(there_C)
            }
    return values


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, which have no ties where probabilities round to 1."""
    wide_NC = logits_NC.astype(np.float64)
    wide_NC = wide_NC - wide_NC.max(1, keepdims=True)
    return wide_NC - np.log(np.exp(wide_NC).sum(1, keepdims=True))


def weights_of(examined: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The weights of examined examples, as those of all that is in them; 1 where there are none."""
    weights = np.asarray(examined.get("weight", np.ones(shape[:1])), np.float64)
    return np.broadcast_to(
        weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)), shape
    )
