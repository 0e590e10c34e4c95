"""What a run sets in its process: jax's settings and one environment variable, put back at its end,
for a notebook that launches a run goes on after it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain.plan import gpu_target

MATMUL_PRECISION = {"default": None, "tf32": "tensorfloat32", "fp32": "highest"}
"""jax's word for each value of --matmul_precision."""


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Puts back, when the context ends or raises, what a run changes in jax.config and in the
    environment.

    >>> with restored():
    ...     jax.config.update("jax_debug_nans", True)
    >>> jax.config.jax_debug_nans
    False

    Only jax's choice of platforms cannot be taken back once it has been used: a process in which
    the first run is one of `--platform=cpu` has no other devices.
    """
    before, skip_check = dict(jax.config.values), os.environ.get(gpu_target.SKIP_CHECK)
    gpu_target.prepare()  # before jax looks for its plugins, which it does once
    try:
        yield
    finally:
        if skip_check is None:
            os.environ.pop(gpu_target.SKIP_CHECK, None)
        changed = {
            name: value for name, value in before.items() if jax.config.values[name] != value
        }
        for name, value in changed.items():
            jax.config.update(name, value)
        if "jax_compilation_cache_dir" in changed:
            compilation_cache.reset_cache()  # jax holds on to the folder that it used first


def apply(*, debug_nans: bool, matmul_precision: str) -> None:
    """What a run asks of jax: its compilation cache, and what two of its flags say."""
    use_compilation_cache()
    jax.config.update("jax_debug_nans", debug_nans)
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[matmul_precision])


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, where the user has not said otherwise."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update(
            "jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxtrain" / "xla")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
