"""From the command line to the end of a run: parse, open, compile, train, finish."""

__all__ = [
    "build",
    "compile",
    "describe",
    "finish",
    "jax_settings",
    "main",
    "run",
    "workdir",
]
