"""The metrics log: turns the sums of each dispatch into lines of metrics, and notices a loss that
is no number any more."""

import math
import time
from collections.abc import Mapping
from typing import Any

from jaxtrain import metrics
from jaxtrain.errors import Diverged, UserError
from jaxtrain.report.metrics_file import Writers
from jaxtrain.report.terminal.progress import Progress

LIVE_SECONDS = 0.1


class MetricsLog:
    """Writes a train line every `every` steps, the mean since the last one; called with every
    dispatch, in order.

    What an interval has summed so far is part of each checkpoint (`record`), so that a resumed run
    writes the same lines. `lower_rate` is how the rate is lowered, as the line of a divergence has
    it.
    """

    def __init__(
        self,
        writers: Writers,
        progress: Progress,
        *,
        every: int,
        step: int,
        total_steps: int,
        batch_size: int,
        unit: str = "examples",
        units: int | None = None,
        interval: Mapping[str, Any] | None = None,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        memory_bytes: Any = None,
        lower_rate: str = "lower --optimizer.learning_rate",
    ) -> None:
        self._writers, self._progress = writers, progress
        self._every, self._total_steps, self._batch_size = every, total_steps, batch_size
        self._unit, self._units = unit, batch_size if units is None else units
        self._flops, self._peak, self._memory = flops_per_step, peak_flops, memory_bytes
        self._lower_rate = lower_rate
        self._totals = metrics.Totals(interval)
        self._step = self._timed_step = step
        self._clock = time.monotonic()
        self._shown, self._late = 0.0, False
        self.means: Mapping[str, float] = {}
        """What the last line said of training."""
        self._seconds, self._steps = 0.0, 0
        """Spent on, and number of, the steps since the last line; pauses left out."""

    def take(self, step: int, sums: Mapping[str, tuple[float, float]]) -> None:
        """The sums, read from the device, of the dispatch that ended at `step`. Raises `Diverged`
        at once if they are not finite."""
        if step <= self._step:
            raise UserError(
                f"the metrics log is at step {self._step} and was given step {step}; steps must"
                " ascend"
            )
        bad = [
            name
            for name in ("loss", "grad_norm")
            if name in sums and not math.isfinite(float(sums[name][0]))
        ]
        if bad:
            between = (
                f"step {step}"
                if step == self._step + 1
                else f"one of steps {self._step + 1} to {step}"
            )
            raise Diverged(
                f"{between}: {' and '.join(bad)} not finite; {self._lower_rate}, set"
                " --clip_norm=1 or look with --debug_nans"
            )
        if (
            "skipped" in sums
            and float(sums["skipped"][0])
            and float(sums["loss_scale"][0]) <= float(sums["loss_scale"][1])
        ):
            raise Diverged(
                f"step {step}: gradients overflow float16 even at loss scale 1;"
                f" {self._lower_rate}, or use bf16 or fp32"
            )
        self._step = step
        self._totals.add(sums)
        if self._late:
            self.resume()
        if step % self._every == 0 or step == self._total_steps:
            self._measure(step)
            means = self._totals.means()
            seconds = self._step_seconds()
            speed = (
                {}
                if seconds is None
                else {
                    "step_seconds": seconds,
                    "examples_per_second": self._batch_size / seconds,
                    f"{self._unit}_per_second": self._units / seconds,
                }
            )
            self._writers.write(step, "train", means | self._seen(step) | speed)
            self.means = means
            self._show(step, means)
            self._totals, self._seconds, self._steps = metrics.Totals(), 0.0, 0
        elif time.monotonic() - self._shown > LIVE_SECONDS:
            self._measure(step)
            self._show(step, self._totals.means())

    def pause(self) -> None:
        """Stops the clock: what follows (an evaluation, a save) is not the speed of training."""
        self._measure(self._step)

    def resume(self, *, late: bool = False) -> None:
        """Starts it again; `late` where the next dispatch is over, for that one compiles."""
        self._clock, self._timed_step, self._late = time.monotonic(), self._step, late

    def record(self) -> dict[str, list[float | str]]:
        """The unfinished interval, for the checkpoint."""
        return self._totals.record()

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        self._seconds += now - self._clock
        self._steps += step - self._timed_step
        self._clock, self._timed_step = now, step

    def _step_seconds(self) -> float | None:
        return self._seconds / self._steps if self._steps and self._seconds else None

    def _seen(self, step: int) -> dict[str, int]:
        """How many tokens the run has been trained on, where it counts tokens."""
        return {} if self._unit == "examples" else {self._unit: step * self._units}

    def _show(self, step: int, means: Mapping[str, float]) -> None:
        self._shown = time.monotonic()
        seconds = self._step_seconds()
        self._progress.update(
            step,
            means,
            per_second=None if not seconds else self._units / seconds,
            eta_seconds=None if not seconds else seconds * (self._total_steps - step),
            memory_bytes=self._memory() if self._memory else None,
            seen=self._seen(step).get(self._unit),
            mfu=(
                self._flops / seconds / self._peak
                if seconds and self._peak and self._flops
                else None
            ),
        )
