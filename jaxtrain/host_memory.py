"""Memory of programs on the CPU, kept from one step to the next.

A program on the CPU computes in scratch memory that it asks of malloc at each call. Of glibc a
large block comes from the kernel and goes back to it, and the kernel hands out zeros, page by page,
as they are touched: a step of the character model (46 MiB of scratch) met 11,900 page faults and
took 48 ms of one core; with the block kept it takes 30.
"""

import ctypes
import os
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = (2**30, 2**25)
"""Bytes of a block up to which it is kept; old versions of glibc take 32 MiB at most."""
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed(environ: Mapping[str, str] = os.environ) -> bool:
    """Has malloc keep what is freed, for the rest of this process; whether it does.

    >>> keep_freed({"MALLOC_TRIM_THRESHOLD_": "131072"})
    False

    For commands and scripts, whose process is theirs alone. It changes nothing where malloc is not
    glibc's, or the environment says how it should be.
    """
    if any(name in environ for name in _USERS) or "glibc.malloc" in environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return False
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _LARGEST[0]))
