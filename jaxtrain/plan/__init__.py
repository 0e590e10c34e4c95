"""Programs for GPUs that are not here: compiled, and read."""

__all__ = [
    "collectives",
    "gpu_target",
]
