"""What a run sets in its process: jax's settings and one environment variable, put back at its end,
for a notebook that launches a run goes on after it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain import messages
from jaxtrain.errors import UserError
from jaxtrain.plan import gpu_target

MATMUL_PRECISION = {"default": None, "tf32": "tensorfloat32", "fp32": "highest"}
"""jax's word for each value of --matmul_precision."""
_COUNT = "--xla_force_host_platform_device_count"


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
    """Keeps compiled programs between runs, where the user has not said otherwise. A folder that
    cannot be written is told in a line, and nothing is kept: jax would warn at every program."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    try:
        if folder is None:
            folder = str(Path.home() / ".cache" / "jaxtrain" / "xla")
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        if "://" in folder:
            return  # a bucket, which jax knows and we do not
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = error.strerror if isinstance(error, OSError) else error
        messages.warn(
            f"compiled programs are not kept: {folder or 'the home folder'}: {reason}; set"
            " JAX_COMPILATION_CACHE_DIR to a folder that can be written"
        )
        jax.config.update("jax_compilation_cache_dir", None)


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Refuses, with a line, what would end the process inside XLA, or in a traceback.

    >>> check_environment({"XLA_FLAGS": "xla_dump_to=/tmp/x"})
    Traceback (most recent call last):
    jaxtrain.errors.UserError: XLA_FLAGS: 'xla_dump_to=/tmp/x' is no flag; write
    --xla_dump_to=/tmp/x
    """
    words = environ.get("XLA_FLAGS", "").split()
    for word in words:
        if not word.startswith("--") and not (len(words) == 1 and os.path.isfile(word)):
            named = word.startswith(("xla_", "-"))
            remedy = f"write --{word.lstrip('-')}" if named else "unset it"
            raise UserError(f"XLA_FLAGS: {messages.shown(word)} is no flag; {remedy}")
        name, _, value = word.partition("=")
        if name == _COUNT and not (value.isascii() and value.isdigit() and 0 < int(value) <= 4096):
            raise UserError(f"XLA_FLAGS: {word}: must be an integer in 1..4096; write {name}=8")
    share = environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    if share and not (messages.is_number(share) and 0 < float(share) <= _most(environ)):
        raise UserError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={messages.printable(share)}: must be above 0 and at"
            " most 1, a share of the memory of the GPU; unset it for 0.75"
        )
    if jax.config.values["jax_disable_jit"]:
        raise UserError(
            "JAX_DISABLE_JIT: a run is one compiled program, which needs jit; unset it, or look"
            " into a step as in docs/step.md"
        )


def _most(environ: Mapping[str, str]) -> float:
    """The largest share of the GPU's memory; unified memory may be more than there is."""
    return float("inf") if environ.get("TF_FORCE_UNIFIED_MEMORY") == "1" else 1.0
