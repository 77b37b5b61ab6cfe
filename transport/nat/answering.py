"""What a member does for others that want to know how they look from outside.

It sends nothing to an address that a peer names: only to the one that the peer's own link has,
one connection or one small packet for each request, at a bounded rate for each peer and for all.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from covey.transport.addresses import format_address
from covey.transport.errors import ErrorCode, LinkTimeout, TransportError
from covey.transport.frame import Frame
from covey.transport.messages import (
    DialBack,
    DialBackOutcome,
    DialledBack,
    Failure,
    Message,
    ProbeSent,
    SendProbe,
    View,
    ViewRequest,
)
from covey.transport.peer import Handler, Peer
from covey.transport.tasks import Tasks

from .budget import Budget, Rate
from .observation import ObserveKeys, observe
from .responder import UdpPort
from .stun import build_probe

DIAL_BACK_S = 2.0
MAX_DIALS = 8  # at a time
# One classification asks for three dials and two probes of each member.
EACH_DIAL, ALL_DIALS = Rate(burst=12, per_s=0.1), Rate(burst=64, per_s=2)
EACH_PROBE, ALL_PROBES = Rate(burst=12, per_s=0.2), Rate(burst=128, per_s=8)
EACH_VIEW, ALL_VIEWS = Rate(burst=32, per_s=1), Rate(burst=1024, per_s=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where this node answers probes; 0 is none."""

    listening: int = 0
    udp: int = 0
    other_udp: int = 0
    other_tcp: int = 0


class Answering:
    """The handlers of one mesh, registered by its `serve`."""

    def __init__(
        self,
        serve: Callable[[type[Message], Handler], None],
        keys: Callable[[], ObserveKeys],
        stun_key: Callable[[], bytes],
        own_hosts: Callable[[], frozenset[str]],
    ) -> None:
        self.ports = Ports()
        self.probe_ports: dict[int, UdpPort] = {}  # IP version -> the other UDP socket
        self._keys = keys
        self._stun_key = stun_key
        self._own_hosts = own_hosts
        self._loop = asyncio.get_running_loop()
        self._dials = Budget(EACH_DIAL, ALL_DIALS)
        self._probes = Budget(EACH_PROBE, ALL_PROBES)
        self._views = Budget(EACH_VIEW, ALL_VIEWS)
        self._n_dialling = 0
        self._tasks = Tasks()
        serve(ViewRequest, self._on_view_request)
        serve(DialBack, self._on_dial_back)
        serve(SendProbe, self._on_send_probe)

    async def aclose(self) -> None:
        """Give up what is under way."""
        await self._tasks.aclose()

    def _on_view_request(self, peer: Peer, frame: Frame) -> None:
        message, host = frame.message, peer.remote_host
        if not isinstance(message, ViewRequest) or frame.request is None:
            return
        if host is None or not self._views.take(peer.peer_id, now=self._loop.time()):
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
            return
        view = View(
            host=_without_zone(host),
            port=self.ports.listening,
            udp_port=self.ports.udp,
            other_udp_port=self.ports.other_udp,
            other_tcp_port=self.ports.other_tcp,
            is_own_host=message.host in self._own_hosts(),
        )
        peer.reply(frame, view)

    def _on_send_probe(self, peer: Peer, frame: Frame) -> None:
        message, host = frame.message, peer.remote_host
        if not isinstance(message, SendProbe) or frame.request is None:
            return
        port = None if host is None else self.probe_ports.get(6 if ":" in host else 4)
        if (
            host is None
            or port is None
            or not self._probes.take(peer.peer_id, now=self._loop.time())
        ):
            peer.reply(frame, ProbeSent(is_sent=False))
            return
        port.send(build_probe(self._stun_key(), message.nonce), (host, message.port))
        peer.reply(frame, ProbeSent(is_sent=True))

    def _on_dial_back(self, peer: Peer, frame: Frame) -> None:
        message, host = frame.message, peer.remote_host
        if not isinstance(message, DialBack) or frame.request is None:
            return
        if host is None:
            peer.reply(frame, Failure(code=ErrorCode.NOT_READY))
        elif self._n_dialling >= MAX_DIALS or not self._dials.take(
            peer.peer_id, now=self._loop.time()
        ):
            peer.reply(frame, DialledBack(outcome="declined", host=_without_zone(host)))
        else:
            self._n_dialling += 1
            self._tasks.spawn(self._dial_back(peer, frame, message, host), "dial back")

    async def _dial_back(self, peer: Peer, frame: Frame, message: DialBack, host: str) -> None:
        try:
            outcome = await self._try((host, message.port), peer.peer_id, message.nonce)
        finally:
            self._n_dialling -= 1
        peer.reply(frame, DialledBack(outcome=outcome, host=_without_zone(host)))

    async def _try(
        self, target: tuple[str, int], peer_id: str, nonce: bytes | None
    ) -> DialBackOutcome:
        """One connection from a fresh socket; what came of it."""
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                if nonce is None:
                    await observe(
                        connection,
                        format_address(*target),
                        peer_id=peer_id,
                        keys=self._keys(),
                        timeout_s=DIAL_BACK_S,
                    )
                else:
                    async with asyncio.timeout(DIAL_BACK_S):
                        await self._loop.sock_connect(connection, target)
                        probe = build_probe(self._stun_key(), nonce)
                        await self._loop.sock_sendall(connection, probe)
            except (TimeoutError, LinkTimeout):
                return "silent"
            except ConnectionRefusedError:
                return "refused"
            except OSError:
                return "silent"
            except TransportError as error:
                return "refused" if isinstance(error.__cause__, ConnectionRefusedError) else "wrong"
        return "answered"


def _without_zone(host: str) -> str:
    """An IPv6 link-local address less the name of our interface, which means nothing elsewhere."""
    return host.partition("%")[0]
