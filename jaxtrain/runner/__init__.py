"""From the command line to the end of a run: parse, open, compile, train, finish."""

__all__ = [
    "build",
    "closing",
    "compile",
    "describe",
    "finish",
    "jax_settings",
    "main",
    "profiler",
    "restore",
    "run",
    "workdir",
]
