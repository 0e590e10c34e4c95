"""The group: what the processes of one run tell each other. Alone, a process is a group of one, and
none of this costs anything."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.processes.signals import Stop


def is_main() -> bool:
    """Whether this process is the one that writes: process 0."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """The JSON value that process 0 gave, in every process; all wait for one another here.

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


def place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds alike, laid out on devices of all of them; each puts only
    its part there."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding, may_alias=False)
    # to jax this one is implicit, though it is asked for by name
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: np.array(value[index])
        )


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array as NumPy, in every process; all of them must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Agreement:
    """A signal that any process was sent, as all of them know it: they stop at the same step.

    >>> with Stop() as stop:
    ...     agreement = Agreement(stop)
    ...     agreement.tick()
    ...     agreement.status is None
    True

    In a group the signals travel like the metrics do, one dispatch behind: `tick` says what this
    process has heard, and reads what all had said at the tick before.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop, self._alone = stop, jax.process_count() == 1
        self._agreed = 0
        self._said: jax.Array | None = None
        if not self._alone:
            devices = np.asarray([device for device in jax.devices()], dtype=object)
            mesh = Mesh(devices, ("processes",), axis_types=(AxisType.Auto,))
            self._place = NamedSharding(mesh, PartitionSpec("processes"))
            self._count = len(devices)
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def status(self) -> int | None:
        """The exit status that a signal asks for, or None if none came."""
        return self._stop.status if self._alone else Stop.statuses.get(self._agreed)

    @property
    def name(self) -> str:
        """What the signal is called."""
        return self._stop.name if self._alone else Stop.names.get(self._agreed, "")

    def settle(self) -> None:
        """Waits until all know what any has heard so far."""
        self.tick()
        self.tick()

    def tick(self) -> None:
        """Called once a dispatch, by all processes."""
        if self._alone:
            return
        if self._said is not None:
            self._agreed = max(self._agreed, int(jax.device_get(self._said)))
        mine = np.full(1, self._stop.number, np.int32)
        with jax.transfer_guard("allow"):
            self._said = self._max(
                jax.make_array_from_callback((self._count,), self._place, lambda index: mine)
            )
