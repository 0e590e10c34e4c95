"""From a table to the devices: whole where it fits, otherwise in batches read and sharded ahead of
the step.

A batch is a dict of arrays with a leading batch dim: the table's fields and `id`, the row in its
table; for evaluation also `weight`.

B: examples of a batch, N: of the table
"""

import collections
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Self, TypeVar

import jax
import numpy as np

from jaxtrain import messages
from jaxtrain.data import checks
from jaxtrain.data.order import Order
from jaxtrain.data.table import Table, num_bytes
from jaxtrain.tree import Batch

Item = TypeVar("Item")
_Task = tuple[Callable[[], Any], "concurrent.futures.Future[Any]"]

CLOSE_SECONDS = 10.0
"""How long `close` waits for readers; what they read is no longer wanted."""

# where the device does not say how much it has (CPU), a table of up to this half is put there whole
_UNKNOWN_MEMORY = 2**30


def fits_on_device(table: Table, free_bytes: int | None) -> bool:
    """Whether a table should be put on each device whole: it is in host memory and takes at most
    half of what is free there.

    >>> from jaxtrain.data.table import ArrayTable
    >>> fits_on_device(ArrayTable({"image": np.zeros((1000, 100), np.uint8)}), free_bytes=150_000)
    False
    """
    return (
        table.arrays is not None
        and num_bytes(table) <= (_UNKNOWN_MEMORY if free_bytes is None else free_bytes) // 2
    )


def resident_arrays(table: Table, sharding: jax.sharding.Sharding) -> Batch:
    """The whole table on the devices (normally replicated), for `gather`."""
    assert table.arrays is not None, "only tables in host memory can be made resident"
    fields = table.fields
    arrays = {
        name: np.ascontiguousarray(array, fields[name].dtype)
        for name, array in table.arrays.items()
    }
    return _put(arrays, sharding, len(table), first_row=0)


def gather(arrays: Mapping[str, jax.Array], ids_B: jax.Array) -> Batch:
    """The batch of rows `ids_B` of a resident table; pure, for use inside the compiled step. Ids
    must be in range."""
    rows = {name: array.at[ids_B].get(mode="promise_in_bounds") for name, array in arrays.items()}
    return rows | {"id": ids_B}


def _work(tasks: "queue.SimpleQueue[_Task | None]") -> None:
    """A reading thread: does jobs until it is told to end."""
    while (task := tasks.get()) is not None:
        job, future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(job())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)


class Prefetch(Iterator[Item], Generic[Item]):
    """Runs jobs in background threads, at most `depth` ahead, and hands out their results in order.

    >>> with Prefetch(iter([lambda: 1, lambda: 2]), depth=2) as results:
    ...     list(results)
    [1, 2]

    What a job raises is raised by `next`, at the place of its result, and ends the iteration.
    """

    def __init__(
        self, jobs: Iterator[Callable[[], Item]], *, depth: int = 2, threads: int = 1
    ) -> None:
        self._jobs = jobs
        self._depth = depth
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # Not an executor: Python waits at its exit for an executor's threads, for ever if one is
        # stuck. They begin with the first job, so that what is never read leaves none behind.
        self._threads = [
            threading.Thread(
                target=_work, args=(self._tasks,), name=f"jaxtrain-data-{number}", daemon=True
            )
            for number in range(threads)
        ]
        self._waiting: collections.deque[concurrent.futures.Future[Item]] = collections.deque()
        self._closed = False

    def __next__(self) -> Item:
        self._submit()
        if not self._waiting:
            self.close()
            raise StopIteration
        try:
            # The host waits here if, and only if, reading is slower than the step.
            result = self._waiting.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return result

    def _submit(self) -> None:
        while (
            not self._closed
            and len(self._waiting) < self._depth
            and (job := next(self._jobs, None)) is not None
        ):
            future: concurrent.futures.Future[Item] = concurrent.futures.Future()
            self._tasks.put((job, future))
            self._waiting.append(future)
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()

    def close(self) -> None:
        """Drops what was read ahead and ends the threads; may be called twice.

        Waits for the jobs that are being done, but for no more than `CLOSE_SECONDS`: a thread that
        is stuck in a dead disk or server is left behind, with a line that says so.
        """
        if self._closed:
            return
        self._closed = True
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        started = [thread for thread in self._threads if thread.ident is not None]
        for _ in started:
            self._tasks.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in started:
            thread.join(max(0.0, until - time.monotonic()))
        if stuck := sum(thread.is_alive() for thread in started):
            what = "1 reading thread does" if stuck == 1 else f"{stuck} reading threads do"
            left = "it is" if stuck == 1 else "they are"
            messages.warn(
                f"{what} not end: no answer from the data for {CLOSE_SECONDS:g} s; {left} left"
                " behind"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BatchLoader(Iterator[Batch]):
    """The endless shuffled batches of a table from a position on, read and put on the devices ahead
    of the step.

    `position` is that of the next batch in the order: a stream opened there goes on as if never
    interrupted. In a run of several processes each reads only the rows that its own devices hold.
    Close it, or use it as a context.
    """

    def __init__(
        self,
        table: Table,
        *,
        order: Order,
        position: Any,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        prefetch: int = 2,
    ) -> None:
        self.position = position
        self._order, self._batch_size = order, batch_size
        self._batches = Prefetch(
            self._jobs(table, position, sharding),
            depth=max(1, prefetch),
            threads=min(2, max(1, prefetch)),
        )

    def _jobs(
        self, table: Table, position: Any, sharding: jax.sharding.Sharding
    ) -> Iterator[Callable[[], Batch]]:
        while True:
            ids_B = self._order.ids(position, self._batch_size)
            yield lambda ids_B=ids_B: read_batch(table, {"id": ids_B}, sharding)
            position = self._order.advance(position, self._batch_size)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position = self._order.advance(self.position, self._batch_size)
        return batch

    def close(self) -> None:
        """Ends the reading threads; may be called twice."""
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_ids(length: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """`id` and `weight` of each batch of one ordered pass; the last is padded with its last row at
    weight 0.

    >>> [(ids["id"].tolist(), ids["weight"].tolist()) for ids in evaluation_ids(3, 2)]
    [([0, 1], [1.0, 1.0]), ([2, 2], [1.0, 0.0])]

    int32 (B,) and float32 (B,).
    """
    for start in range(0, length, batch_size):
        ids_B = np.arange(start, start + batch_size, dtype=np.int32)
        yield {"id": np.minimum(ids_B, length - 1), "weight": (ids_B < length).astype(np.float32)}


def evaluation_batches(
    table: Table, batch_size: int, sharding: jax.sharding.Sharding, prefetch: int = 2
) -> Iterator[Batch]:
    """One ordered pass over a table in batches of one size, with `weight` 0 where the last one is
    padded.

    The reading threads end with the pass, or when the generator is closed.
    """
    jobs = (
        (lambda ids=ids: read_batch(table, ids, sharding))
        for ids in evaluation_ids(len(table), batch_size)
    )
    with Prefetch(jobs, depth=max(1, prefetch), threads=min(2, max(1, prefetch))) as batches:
        yield from batches


def read_batch(
    table: Table, columns: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding
) -> Batch:
    """The rows `columns["id"]` of a table on the devices, together with `columns` themselves; reads
    only this process's rows. `UserError` if one holds a value that is not finite."""
    ids_B = columns["id"]
    first, last = _local_rows(sharding, len(ids_B))
    local = {name: values[first:last] for name, values in columns.items()}
    rows = table.read(local["id"])
    checks.check_rows(table, rows, local["id"])
    if "weight" in rows and "weight" in local:  # the table's own, and 0 for padding
        each = rows["weight"]  # of an example, or of all that is in it
        local["weight"] = local["weight"].reshape(-1, *(1,) * (each.ndim - 1)) * each
    return _put(rows | local, sharding, len(ids_B), first)


def _local_rows(sharding: jax.sharding.Sharding, count: int) -> tuple[int, int]:
    """First row and the row past the last of a batch that this process's devices hold."""
    if sharding.is_fully_addressable:
        return 0, count
    rows = [
        index[0].indices(count)
        for index in sharding.addressable_devices_indices_map((count,)).values()
        if index is not None
    ]
    return min(start for start, _, _ in rows), max(stop for _, stop, _ in rows)


def _put(
    arrays: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, count: int, first_row: int
) -> Batch:
    """Device arrays of `count` rows from this process's rows, which begin at `first_row`."""
    if sharding.is_fully_addressable:
        return jax.device_put(dict(arrays), sharding)

    def piece(array: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # jax asks for the parts of this process's devices only
        start, stop, _ = index[0].indices(count)
        return array[(slice(start - first_row, stop - first_row), *index[1:])]

    return {
        name: jax.make_array_from_callback(
            (count, *array.shape[1:]), sharding, lambda index, array=array: piece(array, index)
        )
        for name, array in arrays.items()
    }
