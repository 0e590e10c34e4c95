"""Closing: whatever a run has opened is closed when it ends, and of several errors the first one
counts."""

import contextlib
from collections.abc import Callable, Iterator

from jaxtrain import messages


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
        later = _call(closers, first)
        if first is None and later is not None:
            raise later


def _call(
    closers: tuple[Callable[[], object], ...], first: BaseException | None
) -> BaseException | None:
    """Calls every closer; the first error, which may be theirs. Those after it become warnings, but
    for one that only says the same again, such as a disk that is still full."""
    for close in closers:
        try:
            close()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are closed first
            if first is None:
                first = error
            elif str(error) != str(first):
                messages.warn(" ".join((str(error) or type(error).__name__).split())[:300])
    return first
