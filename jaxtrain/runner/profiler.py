"""The profiler: a trace of some steps, for TensorBoard or Perfetto."""

from pathlib import Path

import jax

from jaxtrain.tree import PyTree


class Profiler:
    """Called with every step at which a dispatch ends; traces from `first` to `last` into `folder`.

    >>> Profiler(None, Path("unused"))(0, None)
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._running = False

    def __call__(self, step: int, state: PyTree) -> None:
        """Starts or stops the trace if this is the step for it; there the host waits for the
        device, so that the trace holds these steps whole."""
        if self._steps is None:
            return
        first, last = self._steps
        if not self._running and first <= step < last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step >= last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
