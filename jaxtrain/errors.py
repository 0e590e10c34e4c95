"""Exit statuses: what a run says by its last word, to the shell, the supervisor and the
scheduler."""

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
