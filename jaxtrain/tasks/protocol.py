"""What the step, the runner and the report ask of a task, and what they do where it says nothing.

Only `inputs` and `loss` are needed. The other names are optional, one by one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.metrics import Sums
from jaxtrain.tasks.labels import Rows, Wrong
from jaxtrain.tree import Batch, Shapes


class Task(Protocol):
    """What the step asks of a task."""

    def inputs(self, batch: Batch) -> Any:
        """What the model is called with: a tuple by position, a dict by name, else one argument."""
        ...

    def loss(self, outputs: Any, batch: Batch, *, train: bool = True) -> Sums:
        """The loss, under "loss", and other metrics; `train` is False in evaluation."""
        ...


class Hooks(Protocol):
    """What a task may have besides; whoever asks looks first whether it is there."""

    unit: str
    """What speed is counted in, beside examples."""

    def units(self, batch: Batch | Shapes) -> int:
        """How many of those a batch holds."""
        ...

    def with_data(self, table: Any) -> "Task":
        """The task with what it did not know before it saw the table that is trained on."""
        ...

    def draw(self, batch: Batch, keys_B: jax.Array) -> Batch:
        """A prepared and augmented batch with what the task draws of each example by its key; in
        evaluation that key is the same at every step."""
        ...

    def check(self, outputs: Any, num_classes: int | None) -> None:
        """Before anything is compiled: `UserError` if the abstract outputs do not fit the data."""
        ...

    def wrong_labels(self, rows: Rows, outputs: Any, *, whole: bool = False) -> Wrong | None:
        """On the host, of a whole set or of a batch as it is read: the rows that cannot be used."""
        ...

    def examine(self, outputs: Any, batch: Batch) -> Mapping[str, jax.Array]:
        """What is to be known of each example, every array with a row an example. The report draws
        confusions and mistakes from `label` and `prediction`, and `probability` and `loss`, all
        (B,), if there are; a scatter from `target` and `prediction`. A `weight` of 0 leaves an
        example out."""
        ...

    def evaluate(self, examined: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Further metrics of a whole set, by what `examine` gave of every example of it, each once
        and in the order of the set, with `id` and `weight`."""
        ...

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Further metrics of a whole set, by the means of its sums; such as a perplexity, which is
        no mean of those of batches."""
        ...

    def score(self, values: Mapping[str, float]) -> float:
        """What the best checkpoint is chosen by, greater is better."""
        ...


def units_of(task: Any, batch: Batch | Shapes) -> tuple[str, int]:
    """What a task counts speed in, and how many of them a batch holds: its own `unit` and `units`,
    or examples.

    >>> import jax.numpy as jnp
    >>> units_of(None, {"tokens": jnp.zeros((2, 9), jnp.int32)})
    ('examples', 2)
    """
    if hasattr(task, "units"):
        return task.unit, task.units(batch)
    return "examples", next(iter(batch.values())).shape[0]


def score_of(task: Any) -> Callable[[Mapping[str, float]], float]:
    """What the best checkpoint of a task is chosen by, greater is better: the task's own `score`,
    or the accuracy, or the loss where there is none.

    >>> score_of(None)({"loss": 0.25}), score_of(None)({"loss": 0.25, "accuracy": 0.9})
    (-0.25, 0.9)
    """

    def score(values: Mapping[str, float]) -> float:
        return values["accuracy"] if "accuracy" in values else -values["loss"]

    return getattr(task, "score", score)


def with_derived(task: Any, means: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a whole set, with those that the task derives from them; `UserError` if one of
    these is there already.

    >>> with_derived(None, {"loss": 0.5})
    {'loss': 0.5}
    """
    more = dict(task.derived(means)) if hasattr(task, "derived") else {}
    if both := sorted(means.keys() & more.keys()):
        raise UserError(
            f"task {type(task).__name__}: derived gives {', '.join(both)}, which is there already;"
            " rename it"
        )
    return {**means, **more}


def has_hook(task: Any, name: str, outputs: Any) -> bool:
    """Whether a task says something by this hook of (abstract) outputs like these.

    >>> has_hook(None, "check", None)
    False

    A task that inherits the hook, but has a loss of its own for several outputs, says nothing by
    it: what it inherits would ask for one array.
    """
    if not hasattr(task, name):
        return False
    kinds = type(task).__mro__
    depth = {
        each: next(i for i, k in enumerate(kinds) if each in vars(k)) for each in ("loss", name)
    }
    one_array = hasattr(outputs, "shape") or bool(getattr(task, "output", ""))
    return one_array or depth["loss"] >= depth[name]


def measures_whole_sets(task: Any) -> bool:
    """Whether a task has metrics that are no sums: an `evaluate`, and, if it has a field `metrics`,
    some in there. `UserError` if it has no `examine`, by which `evaluate` sees the examples."""
    if not (hasattr(task, "evaluate") and getattr(task, "metrics", True)):
        return False
    if not callable(getattr(task, "examine", None)):
        raise UserError(
            f"task {type(task).__name__}: has evaluate, but no examine(outputs, batch) that says"
            " what evaluate is to know of each example; add it"
        )
    return True
