"""The server that a probe asks: two addresses, two ports on each, for UDP and for TCP.

UDP is STUN with CHANGE-REQUEST (RFC 5780, section 6.1). TCP has no such standard, so ours is a line
each way: on connecting one is told "HOST PORT", the address one came from; the line
"dial IDX SECONDS" makes the server dial that address from its place number IDX, for that long, and
answer "yes" or "no".
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from aioice import stun

from .namespaces import Namespace

PORTS = (3478, 3479)
CHANGE_PORT, CHANGE_BOTH = 2, 6  # RFC 5780, section 7.2
_LINE_BYTES = 64
_POLL_S = 0.05


class Observer:
    """Answers until its block ends. Places are (address, port): 0 and 1 on the first address."""

    def __init__(self, namespace: Namespace, addresses: Sequence[str]) -> None:
        self.places = [(address, port) for address in addresses for port in PORTS]
        self._namespace = namespace
        self._stack = ExitStack()
        self._is_closing = threading.Event()
        self._datagrams: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Listen at every place."""
        selector = self._stack.enter_context(selectors.DefaultSelector())
        for place in self.places:
            datagrams = self._stack.enter_context(self._namespace.socket(socket.SOCK_DGRAM))
            datagrams.bind(place)
            self._datagrams.append(datagrams)
            listener = self._stack.enter_context(self._reusable())
            listener.bind(place)
            listener.listen()
            selector.register(datagrams, selectors.EVENT_READ, self._answer)
            selector.register(listener, selectors.EVENT_READ, self._accept)
        self._start(self._serve, selector)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop answering."""
        self._is_closing.set()
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _serve(self, selector: selectors.BaseSelector) -> None:
        while not self._is_closing.is_set():
            for key, _ in selector.select(_POLL_S):
                key.data(key.fileobj)

    def _answer(self, arrived_at: socket.socket) -> None:
        data, source = arrived_at.recvfrom(2048)
        with suppress(ValueError, OSError):  # not STUN, or from an address that nobody has
            request = stun.parse_message(data)
            answer = stun.Message(
                request.message_method, stun.Class.RESPONSE, request.transaction_id
            )
            answer.attributes["XOR-MAPPED-ADDRESS"] = source
            place = self._datagrams.index(arrived_at)
            change = request.attributes.get("CHANGE-REQUEST", 0)
            # Places 0 and 1 are two ports of one address, 2 and 3 of the other.
            place ^= {CHANGE_PORT: 1, CHANGE_BOTH: 3}.get(change, 0)
            self._datagrams[place].sendto(bytes(answer), source)

    def _accept(self, listener: socket.socket) -> None:
        connection, source = listener.accept()
        self._start(self._converse, connection, source)

    def _converse(self, connection: socket.socket, source: tuple[str, int]) -> None:
        with connection, suppress(OSError, ValueError, IndexError):
            connection.settimeout(10.0)
            connection.sendall(f"{source[0]} {source[1]}\n".encode())
            while line := connection.recv(_LINE_BYTES):
                word, idx, seconds = line.decode().split()
                if word == "dial":
                    is_let_in = self._dial(self.places[int(idx)], source, float(seconds))
                    connection.sendall(b"yes\n" if is_let_in else b"no\n")

    def _dial(self, place: tuple[str, int], target: tuple[str, int], seconds: float) -> bool:
        with self._reusable() as dialler:
            dialler.bind(place)
            dialler.settimeout(seconds)
            try:
                dialler.connect(target)
            except OSError:
                return False
        return True

    def _reusable(self) -> socket.socket:
        """A TCP socket that may have the port of others of ours."""
        made = self._namespace.socket(socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return made
