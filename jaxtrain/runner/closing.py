"""Closing: whatever a run has opened is closed when it ends, and of several errors the first one
counts."""

import contextlib
from collections.abc import Callable, Iterator

from jaxtrain.config import flags


@contextlib.contextmanager
def closed_in_order(*closers: Callable[[], object]) -> Iterator[None]:
    """Calls every closer, in order, when the context ends or raises.

    >>> with closed_in_order(lambda: print("feed"), lambda: print("writers")):
    ...     print("training")
    training
    feed
    writers

    The exit status belongs to the first error: a run that diverged (70) has not failed to write
    (74) because a disk is full too. An error of a closer is raised if it is the first, and is a
    warning otherwise; the closers after it are called all the same.
    """
    first: BaseException | None = None
    try:
        yield
    except BaseException as error:
        first = error
        raise
    finally:
        later = _call(closers, known=first is not None)
        if later is not None:
            raise later


def _call(closers: tuple[Callable[[], object], ...], *, known: bool) -> Exception | None:
    """The error to be raised, if none is `known` yet."""
    first: Exception | None = None
    for close in closers:
        try:
            close()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are closed first
            if known or first is not None:
                flags.warn(" ".join((str(error) or type(error).__name__).split())[:300])
            else:
                first = error
    return first
