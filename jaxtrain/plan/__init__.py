"""Programs for GPUs that are not here: compiled, and read."""

__all__ = [
    "buffers",
    "collectives",
    "gpu_target",
]
