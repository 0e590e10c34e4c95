"""The rendezvous barrier: all processes of a run meet at the coordinator's address before jax
starts, so that the missing ones can be named.

Process 0 listens. The others connect, try again until it answers, and send their index and the
number of processes that they expect. When all have come, process 0 tells them to go on, and jax
takes over the port. Each side sends one short line of text; a connection that sends anything else
is closed.
"""

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Callable

from jaxtrain.errors import PeerLost, UserError

_MAX_LINE_BYTES = 256
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""After five silent seconds the system sends a probe, and up to three: so a host that lost its
power is known as gone after 20 s. Without this the connection would stay open for hours, and the
process that replaces the lost one would be refused. Where a system lacks one of these options, its
own times hold."""


def split_address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    >>> split_address("node1:7000"), split_address("[::1]:7000")
    (('node1', 7000), ('::1', 7000))
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", coordinator)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UserError("must be HOST:PORT, e.g. node1:61500")
    return match[1] or match[2], int(match[3])


def barrier(
    count: int,
    index: int,
    coordinator: str,
    *,
    timeout: float,
    on_arrival: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Returns when all `count` processes have come to `coordinator`.

    `on_arrival` is called when a process comes, `on_wait` about twice a second; either may raise to
    give up. `PeerLost` if some have not come after `timeout` seconds, and `UserError` if two have
    the same index or they do not agree on `count`; all processes raise the same.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        _Coordinator(count, coordinator, on_arrival).wait(deadline, timeout, on_wait)
    else:
        _connect_until_released(count, index, coordinator, deadline, timeout, on_wait)
    on_arrival()


class _Coordinator:
    """Process 0: accepts the connections of the others."""

    def __init__(self, count: int, coordinator: str, on_arrival: Callable[[], None]) -> None:
        self._count, self._coordinator, self._on_arrival = count, coordinator, on_arrival
        self._registered: dict[int, socket.socket] = {}
        self._unidentified: dict[socket.socket, bytes] = {}

    def wait(self, deadline: float, timeout: float, on_wait: Callable[[], None]) -> None:
        """Returns when all are registered and released; otherwise tells them the reason and
        raises."""
        selector = selectors.DefaultSelector()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_connections)
            listener = stack.enter_context(_listen(self._coordinator))
            stack.enter_context(selector)
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ)
            while len(self._registered) < self._count - 1:
                if time.monotonic() > deadline:
                    self._raise_timeout(timeout)
                on_wait()
                for key, _ in selector.select(
                    min(_POLL_SECONDS, max(0.0, deadline - time.monotonic()))
                ):
                    if key.fileobj is listener:
                        with contextlib.suppress(OSError):
                            connection, _ = listener.accept()
                            connection.setblocking(False)
                            _keep_alive(connection)
                            self._unidentified[connection] = b""
                            selector.register(connection, selectors.EVENT_READ)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._receive(key.fileobj, selector)
            # Before the others go on: whoever connects from now on must wait for jax.
            listener.close()
            self._send_to_all("go")

    def _receive(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        """Reads from one connection, until its line is complete, it is closed, or it turns out not
        to be a process of ours."""
        try:
            received = connection.recv(_MAX_LINE_BYTES)
        except OSError:
            received = b""
        if connection not in self._unidentified:
            # A registered process sends nothing more, so its connection was closed.
            selector.unregister(connection)
            self._registered = {
                index: each for index, each in self._registered.items() if each is not connection
            }
            connection.close()
            return
        self._unidentified[connection] += received
        line = self._unidentified[connection]
        if received and b"\n" not in line and len(line) < _MAX_LINE_BYTES:
            return
        del self._unidentified[connection]
        match = re.fullmatch(rb"jaxtrain (\d{1,7}) of (\d{1,7})\n", line)
        if match is None:
            selector.unregister(connection)
            connection.close()
            return
        self._register(connection, int(match[1]), int(match[2]))

    def _register(self, connection: socket.socket, index: int, count: int) -> None:
        if count != self._count:
            problem = (
                f"--processes={count}: said process {index}, and process 0 said {self._count};"
                " start all with the same"
            )
        elif not 0 < index < count or (
            index in self._registered and _is_open(self._registered[index])
        ):
            problem = (
                f"--process={index}: two processes say they are this one; give each its own, from 0"
                f" to {count - 1}"
            )
        else:
            self._registered[index] = connection
            self._on_arrival()
            return
        self._send_to_all(f"refused {problem}", connection)
        connection.close()
        raise UserError(problem)

    def _raise_timeout(self, timeout: float) -> None:
        missing = [str(index) for index in range(1, self._count) if index not in self._registered]
        shown = ", ".join(missing[:8]) + (
            f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        )
        problem = (
            f"{self._count - len(missing)} of {self._count} processes came to {self._coordinator}"
            f" within {timeout:.0f} s; missing: {shown}"
        )
        self._send_to_all(f"timeout {problem}")
        raise PeerLost(problem)

    def _send_to_all(self, line: str, *unregistered: socket.socket) -> None:
        for connection in (*self._registered.values(), *unregistered):
            with contextlib.suppress(OSError):
                connection.setblocking(True)
                connection.settimeout(_ANSWER_SECONDS)
                connection.sendall(line.encode()[: _MAX_LINE_BYTES - 1] + b"\n")

    def _close_connections(self) -> None:
        for connection in (*self._registered.values(), *self._unidentified):
            connection.close()


def _connect_until_released(
    count: int,
    index: int,
    coordinator: str,
    deadline: float,
    timeout: float,
    on_wait: Callable[[], None],
) -> None:
    """Any other process: connects until process 0 accepts, and waits until that releases it."""
    problem: OSError | None = None
    while time.monotonic() < deadline:
        on_wait()
        try:
            answer = _request(f"jaxtrain {index} of {count}\n", coordinator, deadline, on_wait)
        except OSError as error:
            problem, answer = error, ""
        verb, _, text = answer.partition(" ")
        if verb == "go":
            return
        if verb == "refused":
            raise UserError(text)
        if verb == "timeout":
            raise PeerLost(text)
        # Process 0 has not started yet, or is gone again.
        time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    reason = f" ({problem.strerror or problem})" if problem is not None else ""
    raise PeerLost(
        f"process {index} of {count} did not find process 0 at {coordinator} within {timeout:.0f}"
        f" s{reason}; is it running there, and does the network let it through?"
    )


def _request(line: str, coordinator: str, deadline: float, on_wait: Callable[[], None]) -> str:
    """The answer of process 0 to `line`; empty if that closed the connection without one. `OSError`
    if nobody listens."""
    with socket.create_connection(
        split_address(coordinator), timeout=max(0.1, min(5.0, deadline - time.monotonic()))
    ) as connection:
        _keep_alive(connection)
        connection.sendall(line.encode())
        connection.settimeout(_POLL_SECONDS)
        answer = b""
        # Process 0 decides when the time is up, and may have started later than this process.
        while time.monotonic() < deadline + _ANSWER_SECONDS and b"\n" not in answer:
            on_wait()
            try:
                received = connection.recv(_MAX_LINE_BYTES)
            except TimeoutError:
                continue
            if not received or len(answer) > _MAX_LINE_BYTES:
                return ""
            answer += received
        if b"\n" not in answer:
            raise PeerLost(
                f"process 0 answers at {coordinator}, but not all processes came in time; their"
                " logs say why"
            )
        return answer.decode("utf-8", "replace").strip()


def _listen(coordinator: str) -> socket.socket:
    """A listening socket: on this host's loopback if the address is one, else on all addresses."""
    host, port = split_address(coordinator)
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    try:
        if loopback:
            return socket.create_server(
                (host, port),
                family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                backlog=1024,
            )
        if socket.has_dualstack_ipv6():
            # It fails where IPv6 is compiled in but switched off, or where the port is taken; the
            # last line finds the latter too.
            with contextlib.suppress(OSError):
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        # The error's own text would name the address a second time.
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


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
