"""The devices of a run: those of --platform, or of JAX_PLATFORMS, or one line on why there are
none."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator, Sequence

import jax

from jaxtrain import messages
from jaxtrain.errors import UserError
from jaxtrain.parallel.mesh import Device

_LOGGER = "jax._src.xla_bridge"
"""Where jax says what went wrong with a plugin, in a traceback, before it goes on without."""


def find(platform: str) -> Sequence[Device]:
    """All devices of a platform, `auto` being the best there is; `UserError` if there is none. What
    jax says of a plugin that failed is a warning of one line."""
    with _said() as problems:
        try:
            # By name too: in a process that has used jax, setting jax_platforms comes late.
            found = jax.devices() if platform == "auto" else jax.devices(platform)
        except (RuntimeError, AssertionError) as error:  # jax asserts that there is some backend
            raise UserError(_why_none(platform, error, problems)) from error
    for problem in problems:
        messages.warn(f"{problem}; training on {found[0].platform}")
    return found


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    """Collects what jax would log while it looks for devices, a line each."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[1] if record.exc_info else None
        said = "".join(traceback.format_exception_only(error)) if error else record.getMessage()
        lines.append(
            f"jax cannot use a plugin ({messages.one_line(said)})"
            if error
            else messages.one_line(said).rstrip(".")
        )
        return False

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(keep)
    try:
        yield lines
    finally:
        logger.removeFilter(keep)


def _why_none(platform: str, error: BaseException, problems: Sequence[str]) -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if platform == "gpu":
        if hidden is not None and (hidden == "" or hidden.startswith("-")):
            return (
                f"--platform=gpu: no GPU found (CUDA_VISIBLE_DEVICES={hidden} hides them); unset"
                " it, or use --platform=cpu"
            )
        if problems:
            return f"--platform=gpu: no GPU found ({problems[0]}); mend it, or use --platform=cpu"
        return (
            "--platform=gpu: no GPU found (jax sees: cpu); install jax[cuda12] or use"
            " --platform=cpu"
        )
    # The last sentence is jax's own advice, which names a variable that may not be the cause.
    reason = messages.one_line(str(error).partition(" (set JAX_PLATFORMS")[0])
    reason = (
        reason.partition(" (you may need")[0].rstrip(". ")
        or "; ".join(problems)
        or "no plugin for it"
    )
    wanted = os.environ.get("JAX_PLATFORMS")
    if platform == "auto" and wanted:
        return (
            f"JAX_PLATFORMS={messages.printable(wanted)}: no such device here ({reason}); unset it,"
            " or use JAX_PLATFORMS=cpu"
        )
    return f"--platform={platform}: no device found ({reason})"
