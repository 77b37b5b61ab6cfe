"""What kind of NAT a host is behind, found out by asking (RFC 5780, sections 4.3 and 4.4).

Filtering is asked first: asking for the mapping opens the filter towards all who are asked.
Answers that must not come are waited for in vain, so a probe of a strict NAT takes a second.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from aioice import stun

from .namespaces import Namespace
from .nat import NatKind, Scope, kind_of
from .observer import CHANGE_BOTH, CHANGE_PORT

ANSWER_S = 0.25  # how long to wait for an answer, beyond the round trip of the path
_TRIES = 2  # a first packet may be lost while the neighbours look for each other
_CONNECT_S = 4.0  # a lost first packet is sent again after one second

Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What was found; `mapped` is the address seen from outside, once for each place asked."""

    mapping: Scope
    filtering: Scope
    local: Place
    mapped: tuple[Place, ...]

    @property
    def kind(self) -> NatKind | None:
        """The kind that behaves so; None if none has that name."""
        return kind_of(
            self.mapping, self.filtering, is_translated=any(it != self.local for it in self.mapped)
        )


def probe_udp(
    host: Namespace, places: Sequence[Place], *, answer_s: float = ANSWER_S
) -> Behaviour | None:
    """How the NAT treats UDP; None if no answer comes at all.

    Args:
        host: where to ask from.
        places: of an `Observer`.
        answer_s: how long to wait for one that may not come.
    """
    with closing(_bound(host, places[0], kind=socket.SOCK_DGRAM)) as asking:
        filtering = Scope.ADDRESS_AND_PORT
        if _ask(asking, places[0], answer_s) is None:
            return None
        if _ask(asking, places[0], answer_s, change=CHANGE_BOTH) is not None:
            filtering = Scope.INDEPENDENT
        elif _ask(asking, places[0], answer_s, change=CHANGE_PORT) is not None:
            filtering = Scope.ADDRESS
        mapped = [_ask(asking, places[idx], answer_s) for idx in (0, 2, 3)]
        return _behaviour(filtering, asking.getsockname(), [it for it in mapped if it])


def probe_tcp(
    host: Namespace, places: Sequence[Place], *, answer_s: float = ANSWER_S
) -> Behaviour | None:
    """How the NAT treats TCP; None if a place does not answer. Another port for each question."""
    try:
        filtering = _tcp_filtering(host, places, answer_s)
        with ExitStack() as stack:
            local: Place | None = None
            mapped = []
            for idx in (0, 2, 3):
                connection = stack.enter_context(closing(_bound(host, places[0], local)))
                local = connection.getsockname()
                mapped.append(_connect(connection, places[idx]))
    except OSError:
        return None
    return None if local is None else _behaviour(filtering, local, mapped)


def _tcp_filtering(host: Namespace, places: Sequence[Place], answer_s: float) -> Scope:
    """Who may connect to a port after it was used towards place 0."""
    with closing(_bound(host, places[0])) as listener:
        listener.listen()
        with closing(_bound(host, places[0], listener.getsockname())) as connection:
            _connect(connection, places[0])
            # Place 3 shares nothing with place 0, place 1 its address.
            for idx, scope in ((3, Scope.INDEPENDENT), (1, Scope.ADDRESS)):
                connection.sendall(f"dial {idx} {answer_s}\n".encode())
                if _line(connection) == "yes":
                    return scope
    return Scope.ADDRESS_AND_PORT


def _behaviour(filtering: Scope, local: Place, mapped: Sequence[Place]) -> Behaviour | None:
    """From what was seen of one local port at place 0, another address, and its other port."""
    if len(mapped) != 3:
        return None
    first, other_address, other_port = mapped
    if first == other_address == other_port:
        mapping = Scope.INDEPENDENT
    else:
        mapping = Scope.ADDRESS if other_address == other_port else Scope.ADDRESS_AND_PORT
    return Behaviour(mapping, filtering, local, tuple(mapped))


def _ask(asking: socket.socket, place: Place, answer_s: float, *, change: int = 0) -> Place | None:
    """Our address as `place` sees it; None if no answer comes from where it was asked for."""
    request = stun.Message(stun.Method.BINDING, stun.Class.REQUEST)
    if change:
        request.attributes["CHANGE-REQUEST"] = change
    asking.settimeout(answer_s)
    for _ in range(_TRIES):
        asking.sendto(bytes(request), place)
        with suppress(TimeoutError, ConnectionRefusedError):
            while True:
                answer = stun.parse_message(asking.recv(2048))
                if answer.transaction_id == request.transaction_id:
                    mapped: Place = answer.attributes["XOR-MAPPED-ADDRESS"]
                    return mapped
    return None


def _bound(
    host: Namespace,
    towards: Place,
    local: Place | None = None,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> socket.socket:
    """A socket at `local`, or at a port of its own on the address that leads to `towards`."""
    if local is None:
        with closing(host.socket(socket.SOCK_DGRAM)) as asking:
            asking.connect(towards)
            local = (asking.getsockname()[0], 0)
    made = host.socket(kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(local)
    return made


def _connect(connection: socket.socket, place: Place) -> Place:
    connection.settimeout(_CONNECT_S)
    connection.connect(place)
    host, port = _line(connection).split()
    return host, int(port)


def _line(connection: socket.socket) -> str:
    """A short answer; it comes in one piece."""
    return connection.recv(64).decode().strip()
