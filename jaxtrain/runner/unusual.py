"""Notes at the start of a run on numbers that are allowed, but most likely not meant. A line each;
horizons and learning rates have theirs in `build.notes`."""

from collections.abc import Iterator

from jaxtrain import config
from jaxtrain.config import values

LARGEST_DECAY = 0.1
"""The largest share of a weight that decay takes in one step, before it gets a note."""
SMALLEST_NORM = 1e-3
"""Gradients are clipped to no less, before it gets a note."""
LARGEST_SHARES = {"dropout": 0.8, "label_smoothing": 0.5}
"""What is usual at most, of numbers that are shares of 1."""


def notes(run: config.Run, total_steps: int) -> list[str]:
    """A line for each number that is far from what people use.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> notes(run, 100)
    []
    """
    return [*_decay(run), *_shares(run), *_trace(run, total_steps)]


def _trace(run: config.Run, total_steps: int) -> Iterator[str]:
    first, last = run.profile_steps or (0, 0)
    if first < total_steps < last:
        yield (
            f"--profile_steps={values.text(run.profile_steps)}: the run has {total_steps} steps;"
            " the trace ends with it"
        )


def _decay(run: config.Run) -> Iterator[str]:
    rate = getattr(run.optimizer, "learning_rate", None)
    decay = getattr(run.optimizer, "weight_decay", None)
    if isinstance(rate, float) and isinstance(decay, float) and rate * decay > LARGEST_DECAY:
        yield (
            f"--optimizer.weight_decay={values.text(decay)}: times the learning rate"
            f" {values.text(rate)} it takes {rate * decay:.3g} of a weight in every step; usual is"
            " below 0.01"
        )


def _shares(run: config.Run) -> Iterator[str]:
    if run.clip_norm is not None and run.clip_norm < SMALLEST_NORM:
        yield (
            f"--clip_norm={values.text(run.clip_norm)}: nearly every gradient is scaled down to it;"
            " usual is 0.1 to 10"
        )
    for family in config.FAMILIES:
        for name, largest in LARGEST_SHARES.items():
            value = getattr(getattr(run, family), name, None)
            if isinstance(value, float) and value > largest:
                yield (
                    f"--{family}.{name}={values.text(value)}: is a share of 1; usual is at most"
                    f" {largest:g}"
                )
