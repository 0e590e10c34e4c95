"""The roll call: all processes of a run meet at the coordinator's address before jax does, so that
whoever is missing can be named.

Process 0 listens, the others knock until somebody opens, and each says who it is and how many it
expects. When all have come they are let go, and jax takes over the port. Nothing but two short
lines of text passes, and a stranger who knocks is sent away.
"""

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Callable

from jaxtrain.errors import PeerLost, UserError

_LONGEST = 256
"""Bytes of the longest line that passes."""
_TURN_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""After five silent seconds the system asks whether the other side is still there, thrice: a host
without power is known as gone after 20 s. Without, its place stays taken for hours, and its
successor is refused. Where a system has not all of these, its own times hold."""


def split(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    >>> split("node1:7000"), split("[::1]:7000")
    (('node1', 7000), ('::1', 7000))
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", coordinator)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UserError("must be HOST:PORT, e.g. node1:61500")
    return match[1] or match[2], int(match[3])


def roll_call(
    count: int,
    index: int,
    coordinator: str,
    *,
    timeout: float,
    arrived: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
) -> None:
    """Returns when all `count` processes have come to `coordinator`.

    `arrived` is called as they come, `waiting` about twice a second; either may raise to give up.
    `PeerLost` if some have not come after `timeout` seconds, and `ValueError` if two are the same
    one or do not agree how many they are; all say so alike.
    """
    until = time.monotonic() + timeout
    if index == 0:
        _Host(count, coordinator, arrived).wait(until, timeout, waiting)
    else:
        _knock(count, index, coordinator, until, timeout, waiting)
    arrived()


class _Host:
    """Process 0: opens to those who knock."""

    def __init__(self, count: int, coordinator: str, arrived: Callable[[], None]) -> None:
        self._count, self._coordinator, self._arrived = count, coordinator, arrived
        self._guests: dict[int, socket.socket] = {}
        self._unnamed: dict[socket.socket, bytes] = {}

    def wait(self, until: float, timeout: float, waiting: Callable[[], None]) -> None:
        """Returns when all guests are there, and sends them on; or tells them why not, and
        raises."""
        selector = selectors.DefaultSelector()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            listener = stack.enter_context(_listen(self._coordinator))
            stack.enter_context(selector)
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)
            while len(self._guests) < self._count - 1:
                if time.monotonic() > until:
                    self._give_up(timeout)
                waiting()
                for key, _ in selector.select(
                    min(_TURN_SECONDS, max(0.0, until - time.monotonic()))
                ):
                    if key.fileobj is listener:
                        with contextlib.suppress(OSError):
                            guest, _ = listener.accept()
                            guest.setblocking(False)
                            _keep_alive(guest)
                            self._unnamed[guest] = b""
                            selector.register(guest, selectors.EVENT_READ)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hear(key.fileobj, selector)
            listener.close()  # before they go: who comes now must wait for jax
            self._tell_all("go")

    def _hear(self, guest: socket.socket, selector: selectors.BaseSelector) -> None:
        """Reads on from one connection, until it has said its line, is closed, or turns out to be a
        stranger."""
        try:
            more = guest.recv(_LONGEST)
        except OSError:
            more = b""
        if guest not in self._unnamed:  # one that had come: it says no more, so it has gone
            selector.unregister(guest)
            self._guests = {
                index: each for index, each in self._guests.items() if each is not guest
            }
            guest.close()
            return
        self._unnamed[guest] += more
        words = self._unnamed[guest]
        if more and b"\n" not in words and len(words) < _LONGEST:
            return
        del self._unnamed[guest]
        match = re.fullmatch(rb"jaxtrain (\d{1,7}) of (\d{1,7})\n", words)
        if match is None:
            selector.unregister(guest)
            guest.close()
            return
        self._admit(guest, int(match[1]), int(match[2]))

    def _admit(self, guest: socket.socket, index: int, count: int) -> None:
        if count != self._count:
            problem = (
                f"--processes={count}: said process {index}, and process 0 said {self._count};"
                " start all with the same"
            )
        elif not 0 < index < count or (index in self._guests and _is_open(self._guests[index])):
            problem = (
                f"--process={index}: two processes say they are this one; give each its own, from 0"
                f" to {count - 1}"
            )
        else:
            self._guests[index] = guest
            self._arrived()
            return
        self._tell_all(f"no {problem}", guest)
        guest.close()
        raise UserError(problem)

    def _give_up(self, timeout: float) -> None:
        missing = [str(index) for index in range(1, self._count) if index not in self._guests]
        shown = ", ".join(missing[:8]) + (
            f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        )
        come = self._count - len(missing)
        problem = (
            f"{come} of {self._count} processes came to {self._coordinator} within {timeout:.0f} s;"
            f" missing: {shown}"
        )
        self._tell_all(f"late {problem}")
        raise PeerLost(problem)

    def _tell_all(self, words: str, *more: socket.socket) -> None:
        for guest in (*self._guests.values(), *more):
            with contextlib.suppress(OSError):
                guest.setblocking(True)
                guest.settimeout(_ANSWER_SECONDS)
                guest.sendall(words.encode()[: _LONGEST - 1] + b"\n")

    def _close(self) -> None:
        for guest in (*self._guests.values(), *self._unnamed):
            guest.close()


def _knock(
    count: int,
    index: int,
    coordinator: str,
    until: float,
    timeout: float,
    waiting: Callable[[], None],
) -> None:
    """Any other process: tries until process 0 opens, and waits to be sent on."""
    problem: OSError | None = None
    while time.monotonic() < until:
        waiting()
        try:
            answer = _ask(f"jaxtrain {index} of {count}\n", coordinator, until, waiting)
        except OSError as error:
            problem, answer = error, ""
        verb, _, words = answer.partition(" ")
        if verb == "go":
            return
        if verb == "no":
            raise UserError(words)
        if verb == "late":
            raise PeerLost(words)
        # not there yet, or gone again
        time.sleep(min(_TURN_SECONDS, max(0.0, until - time.monotonic())))
    reason = f" ({problem.strerror or problem})" if problem is not None else ""
    raise PeerLost(
        f"process {index} of {count} did not find process 0 at {coordinator} within {timeout:.0f}"
        f" s{reason}; is it running there, and does the network let it through?"
    )


def _ask(words: str, coordinator: str, until: float, waiting: Callable[[], None]) -> str:
    """The answer of process 0; empty if it went away without one. `OSError` if nobody opens."""
    with socket.create_connection(
        split(coordinator), timeout=max(0.1, min(5.0, until - time.monotonic()))
    ) as door:
        _keep_alive(door)
        door.sendall(words.encode())
        door.settimeout(_TURN_SECONDS)
        answer = b""
        # Process 0 keeps the time, and may have begun later than this one.
        while time.monotonic() < until + _ANSWER_SECONDS and b"\n" not in answer:
            waiting()
            try:
                more = door.recv(_LONGEST)
            except TimeoutError:
                continue
            if not more or len(answer) > _LONGEST:
                return ""
            answer += more
        if b"\n" not in answer:
            raise PeerLost(
                f"process 0 answers at {coordinator}, but not all processes came in time; their"
                " logs say why"
            )
        return answer.decode("utf-8", "replace").strip()


def _listen(coordinator: str) -> socket.socket:
    """A listening socket: on every address, except that one for this host alone stays on it."""
    host, port = split(coordinator)
    alone = host in ("localhost", "::1") or host.startswith("127.")
    try:
        if alone:
            return socket.create_server(
                (host, port),
                family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                backlog=1024,
            )
        if socket.has_dualstack_ipv6():
            # compiled in, but perhaps switched off; or taken, as the next line finds too
            with contextlib.suppress(OSError):
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        # its own text names the address again
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PeerLost(
            f"--coordinator={coordinator}: process 0 cannot listen there ({reason}); name a free"
            " port"
        ) from None


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_open(guest: socket.socket) -> bool:
    try:
        return guest.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
