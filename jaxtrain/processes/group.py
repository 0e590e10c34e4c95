"""The process group: how the processes of one run exchange values and agree on a stop. A process
alone is a group of one, and all of this costs it nothing."""

import functools
import json
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain import errors
from jaxtrain.processes.signals import EXIT_STATUS, StopSignals


def is_main() -> bool:
    """Whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """The JSON value of process 0, in every process. All processes must call this, and wait for one
    another here.

    >>> from_main({"step": 5})
    {'step': 5}
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def on_main(compute: Callable[[], Any]) -> Any:
    """What `compute` returns in process 0, where alone it is called, as JSON in every process. All
    processes must call this, and wait for process 0 here.

    >>> on_main(lambda: {"step": 5})
    {'step': 5}

    An error is raised in all, so that none waits for ever: one of ours with its exit status, any
    other as it is in process 0 and as `PeerLost` in the others.
    """
    if jax.process_count() == 1:
        return compute()
    try:
        answer = {"value": compute()} if is_main() else None
    except Exception as error:
        kind, text = type(error).__name__, str(error)
        from_main({"error": [kind if isinstance(error, errors.RunError) else "", kind, text]})
        raise
    answer = from_main(answer)
    if "value" in answer:
        return answer["value"]
    known, kind, text = answer["error"]
    if known:
        raise getattr(errors, known)(text)
    raise errors.PeerLost(f"process 0 failed ({kind}: {text})")


def place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on the devices of all processes, from a value that every process has. Each process
    copies only the part for its own devices; a CPU may read the value where it lies, so it is not
    to be written to afterwards."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding, may_alias=False)
    # jax counts this transfer as implicit, although the call asks for it.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: np.array(value[index])
        )


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array as NumPy, in every process. All processes must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class StopAgreement:
    """The stop signal that all processes of the group know of, so that they stop at the same step;
    and likewise whether somebody waits for an answer.

    >>> with StopSignals() as own:
    ...     stop = StopAgreement(own)
    ...     stop.exchange()
    ...     stop.status is None, stop.asked
    (True, False)

    In a group the signals are one dispatch late, like the metrics: `exchange` starts to gather the
    signals of all processes, and reads the result of the exchange before. `waits` says in process 0
    whether somebody waits; it is asked at every exchange.
    """

    def __init__(self, own: StopSignals, waits: Callable[[], bool] = lambda: False) -> None:
        self._own, self._alone = own, jax.process_count() == 1
        self._waits, self._asked = waits, False
        self._agreed: signal.Signals | None = None
        self._pending: jax.Array | None = None
        if not self._alone:
            devices = np.asarray([device for device in jax.devices()], dtype=object)
            mesh = Mesh(devices, ("processes",), axis_types=(AxisType.Auto,))
            self._sharding = NamedSharding(mesh, PartitionSpec("processes"))
            self._count = len(devices)
            self._max = jax.jit(
                functools.partial(jnp.max, axis=0),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )

    @property
    def _signal(self) -> signal.Signals | None:
        return self._own.first if self._alone else self._agreed

    @property
    def status(self) -> int | None:
        """The exit status that belongs to the signal, or None if none came."""
        return None if self._signal is None else EXIT_STATUS[self._signal]

    @property
    def name(self) -> str:
        """The name of the signal, such as SIGTERM, or the empty string."""
        return "" if self._signal is None else self._signal.name

    @property
    def asked(self) -> bool:
        """Whether somebody waited for an answer at the last exchange that all know of."""
        return self._asked

    def synchronize(self) -> None:
        """Waits until all processes know every signal that any of them has received so far."""
        self.exchange()
        self.exchange()

    def exchange(self) -> None:
        """Gathers the signals of all processes; each must call this once per dispatch."""
        waits = is_main() and self._waits()
        if self._alone:
            self._asked = waits
            return
        if self._pending is not None:
            number, asked = jax.device_get(self._pending).tolist()
            self._asked = bool(asked)
            if number > int(self._agreed or 0):
                self._agreed = signal.Signals(number)
        own = np.array([[int(self._own.first or 0), waits]], np.int32)
        with jax.transfer_guard("allow"):
            self._pending = self._max(
                jax.make_array_from_callback((self._count, 2), self._sharding, lambda index: own)
            )
