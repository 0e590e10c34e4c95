"""Errors that end a run with one line, and the exit statuses that they carry to the shell, the
supervisor and the scheduler."""

BAD_INPUT = 2
"""A flag, a file or the data is not what it must be; one line says which."""
DIFFERENT = 3
"""--compare_meshes found a mesh that differs beyond rounding."""
DIVERGED = 70
OUT_OF_MEMORY = 71
IO_ERROR = 74
"""A disk or file fails, or a checkpoint is damaged."""
TRY_AGAIN = 75
"""Nothing is wrong with the run: it lost another process, or was asked to end by SIGTERM or SIGHUP,
and may be started again."""
INTERRUPTED = 130
"""By Ctrl-C."""

FINAL = {
    BAD_INPUT: "bad input",
    DIFFERENT: "meshes differ",
    DIVERGED: "diverged",
    OUT_OF_MEMORY: "out of memory",
    IO_ERROR: "a disk or file fails",
    INTERRUPTED: "interrupted",
}
"""Those that a restart would only bring again, in words; scripts/slurm/train.sbatch and
scripts/kubernetes/job.yaml list them too."""


class RunError(Exception):
    """What ends a run with one line on stderr and an exit status of its own, without a traceback.

    >>> UserError("--steps=-1: needs a whole number >= 0").status
    2
    """

    status: int


class UserError(RunError, ValueError):
    """Something that a user can mend: the message names the thing, its value, the rule and the
    remedy. Any other `ValueError` is a fault in code, and keeps its traceback."""

    status = BAD_INPUT


class Diverged(RunError):
    """The loss or the gradient is not finite any more."""

    status = DIVERGED


class CheckpointError(RunError):
    """The disk or a checkpoint on it fails."""

    status = IO_ERROR


class NonFinite(CheckpointError):
    """A state that holds NaN or infinity and was therefore not committed."""

    status = DIVERGED


class PeerLost(RunError):
    """Another process of the run did not come, or is gone; the run may be started again."""

    status = TRY_AGAIN


class RowsTooLong(UserError):
    """Rows are longer than the text that they are cut from. Who knows how many a batch needs, and
    how many tokens the model sees, says the greatest length that fits both."""

    def __init__(self, text: str, targets: int = 0, stride: int | None = None) -> None:
        super().__init__(text)
        self.what = text.rpartition("; use <= ")[0]
        self.targets, self.stride = targets, stride

    def greatest(self, rows: int) -> int:
        """The greatest length that gives so many rows; 0 if none does.

        >>> RowsTooLong("", targets=630).greatest(12), RowsTooLong("", 630, 10).greatest(12)
        (57, 529)
        """
        return greatest_length(self.targets, rows, self.stride)


def greatest_length(targets: int, rows: int, stride: int | None) -> int:
    """The greatest length of rows of which a text with so many tokens to predict has `rows`; they
    begin `stride` tokens apart (None: their length), and the last one may be padded."""
    if rows == 1:
        return targets
    if stride is None:
        return -(-targets // (rows - 1)) - 1
    return max(0, targets - stride * (rows - 2) - 1)
