"""Notes at the start of a run on what is allowed, but most likely not meant: horizons that lie
beyond its end, and numbers far outside the usual range. A line each."""

from collections.abc import Iterator
from typing import Any

from jaxtrain import config
from jaxtrain.config import values
from jaxtrain.fields import fields_of
from jaxtrain.runner.build import Lengths

FAR_ABOVE, FAR_BELOW = 100.0, 1000.0
"""A rate so many times above, or below, the default of its optimizer gets a note: what people tune
lies within."""
LARGEST_DECAY = 0.1
"""The largest share of a weight that decay takes in one step, before it gets a note."""


def notes(run: config.Run, length: Lengths, *, validation: bool) -> list[str]:
    """A line for each thing; `validation` says whether there is such a split.

    >>> import dataclasses
    >>> from jaxtrain.horizon import Horizon
    >>> run = config.Run(name="toy", steps=100, **dict.fromkeys(config.FAMILIES))
    >>> run = dataclasses.replace(run, checkpoint_every=Horizon(5000))
    >>> for line in notes(run, Lengths(100, 12.5, 12, 5000, None), validation=False):
    ...     print(line)
    note: --checkpoint_every=5000steps: the run ends at step 100; its end alone is committed
    """
    return [*_horizons(run, length, validation), *_optimizer(run), *_shares(run)]


def _horizons(run: config.Run, length: Lengths, validation: bool) -> Iterator[str]:
    total, defaults = length.total, {field.name: field.default for field in fields_of(run)}
    beyond = {
        "checkpoint_every": (length.save, "its end alone is committed"),
        "eval_every": (
            length.evaluate if validation else 0,
            "the validation split is evaluated at its end alone",
        ),
        "keep_every": (length.keep_every or 0, "no checkpoint is kept for ever"),
    }
    for name, (steps, what) in beyond.items():
        # What the run's class says by itself is nobody's mistake.
        if steps > total and getattr(run, name) != defaults[name]:
            yield f"note: --{name}={_text(run, name)}: the run ends at step {total}; {what}"
    if run.profile_steps is not None and run.profile_steps[1] > total:
        yield (
            f"note: --profile_steps={values.text(run.profile_steps)}: the run ends at step {total},"
            " and the trace with it"
        )


def _optimizer(run: config.Run) -> Iterator[str]:
    optimizer = run.optimizer
    rate = getattr(optimizer, "learning_rate", None)
    if not isinstance(rate, float | int) or isinstance(rate, bool):
        return
    default = next(
        (field.default for field in fields_of(optimizer) if field.name == "learning_rate"), None
    )
    if isinstance(default, float | int) and default > 0:
        far = rate > FAR_ABOVE * default or rate < default / FAR_BELOW
        if far:
            times = rate / default if rate > default else default / rate
            yield (
                f"note: --optimizer.learning_rate={values.text(float(rate))}: is {times:.3g} times"
                f" {'above' if rate > default else 'below'} {values.text(float(default))}, the"
                f" default of {type(optimizer).__name__}"
            )
    decay = getattr(optimizer, "weight_decay", 0.0)
    if isinstance(decay, float | int) and rate * decay > LARGEST_DECAY:
        yield (
            f"note: --optimizer.weight_decay={values.text(float(decay))}: times the learning rate"
            f" {values.text(float(rate))} takes {rate * decay:.3g} of a weight in every step; usual"
            " is below 0.01"
        )


def _shares(run: config.Run) -> Iterator[str]:
    if run.clip_norm is not None and run.clip_norm < 1e-3:
        yield (
            f"note: --clip_norm={values.text(run.clip_norm)}: nearly every gradient is scaled down"
            " to it; usual is 0.1 to 10"
        )
    for family in config.FAMILIES:
        for name, largest in (("dropout", 0.8), ("label_smoothing", 0.5)):
            value = getattr(getattr(run, family), name, None)
            if isinstance(value, float) and value > largest:
                yield (
                    f"note: --{family}.{name}={values.text(value)}: is a share of 1; usual is at"
                    f" most {largest:g}"
                )


def _text(run: Any, name: str) -> str:
    return values.text(getattr(run, name))
