"""Notes at the start of a run on numbers that are allowed, but most likely not meant."""

from collections.abc import Iterator

from jaxtrain import config, schedules
from jaxtrain.config import values
from jaxtrain.runner.build import Lengths

USUAL_RATES = (1e-3, 1e2)
"""From which to which multiple of its default the learning rate of an optimizer is usual."""
LARGEST_DECAY = 0.1
"""The largest share of a weight that decay takes in one step, before it gets a note."""
SMALLEST_NORM = 1e-3
"""Gradients are clipped to no less, before it gets a note."""
LARGEST_SHARES = {"dropout": 0.8, "label_smoothing": 0.5}
"""What is usual at most, of numbers that are shares of 1."""


def notes(run: config.Run, length: Lengths) -> list[str]:
    """A line for each number that is far from what people use, or that lies beyond the run's end.

    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> length = Lengths(100, per_epoch=10.0, evaluate=50, save=50, keep_every=None, log=2)
    >>> notes(run, length)
    []
    """
    return [*_horizons(run, length), *_rate(run), *_decay(run), *_shares(run)]


def _horizons(run: config.Run, length: Lengths) -> Iterator[str]:
    ends = f"the run has {length.total} steps"
    for name, often in (("eval_every", "evaluated"), ("checkpoint_every", "committed")):
        horizon = getattr(run, name)
        if horizon.unit == "steps" and horizon.value > length.total:
            yield f"--{name}={horizon}: {ends}; {often} at its end only"
    if run.sample_every.unit == "steps" and run.sample_every.value > length.total:
        yield f"--sample_every={run.sample_every}: {ends}; sampled at its start and end only"
    for name, default in (("sample_prompt", ""), ("sample_tokens", 200)):
        if not length.sample and (value := getattr(run, name)) != default:
            text = values.text(value)
            yield f"--{name}={text}: nothing is sampled; set --sample_every, e.g. 10%"
    if length.keep_every is not None and length.keep_every > length.total:
        yield f"--keep_every={run.keep_every}: {ends}; no checkpoint is kept for ever"
    first, last = run.profile_steps or (0, 0)
    if first < length.total < last:
        yield f"--profile_steps={values.text(run.profile_steps)}: {ends}; the trace ends with it"


def _rate(run: config.Run) -> Iterator[str]:
    rate, kind = getattr(run.optimizer, "learning_rate", None), type(run.optimizer)
    # A function may give rates, with a peak of 1 to multiply.
    if not isinstance(rate, int | float) or isinstance(run.schedule, schedules.FromFunction):
        return
    low, high = USUAL_RATES
    times = rate / kind.learning_rate
    if not low <= times <= high:
        what = "mostly diverges" if times > 1 else "hardly trains"
        yield (
            f"--optimizer.learning_rate={rate:g}: {times:g} times the usual"
            f" {kind.learning_rate:g} of {kind.__name__}, which {what}"
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
