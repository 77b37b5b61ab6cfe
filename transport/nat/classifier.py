"""Finds out what NAT is in the way, with the help of two or three members outside it.

One observer is enough to tell a symmetric NAT from others, and tells the strictest kind that fits;
with a second one all kinds are told apart. With none, everything is unknown. Takes about three
seconds where packets are filtered, since silence has to be waited for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from covey.transport.addresses import format_address, parse_address
from covey.transport.errors import TransportError
from covey.transport.listener import accept_one, receive_exactly
from covey.transport.messages import (
    DialBack,
    DialledBack,
    ProbeSent,
    SendProbe,
    View,
    ViewRequest,
)
from covey.transport.peer import Peer
from covey.transport.tasks import Tasks

from .facts import MAX_OBSERVERS, Endpoint, Evidence, NatKind, Sighting, classify, is_near
from .observation import OTHER_PORT, ObserveKeys, observe, reusable_socket
from .prober import UdpProber
from .stun import PROBE_BYTES, TRANSACTION_BYTES, read_probe

ASK_S = 5.0  # for an answer over a link; a member may spend two of them dialling back
GRACE_S = 0.4  # for a packet that was sent before the answer that says so, over another path
N_PROBES = 2  # a lost one must not look like a filter


@dataclass(frozen=True, slots=True)
class Observer:
    """A member outside, with a live link to us."""

    peer: Peer
    host: str
    port: int  # where it listens; 0 if it cannot be dialled, as behind a router of its own
    view: View

    @property
    def address(self) -> str:
        """Its listening port, as `observe` wants it."""
        return format_address(self.host, self.port)

    @property
    def stun(self) -> Endpoint | None:
        """Where it answers STUN; None if it does not, or a router may be in front of it."""
        return (self.host, self.view.udp_port) if self.port and self.view.udp_port else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One test and what came of it, for `covey doctor`."""

    test: str
    observer: str  # end of its peer id; empty where there was none
    outcome: str


@dataclass(slots=True)
class Classifier:
    """One round of tests. Keeps every step on record."""

    keys: ObserveKeys
    stun_key: bytes = field(repr=False)
    own_hosts: frozenset[str]
    steps: list[Step] = field(default_factory=list)

    async def find_observers(
        self, peers: Iterable[Peer], is_outside: Callable[[str], bool]
    ) -> list[Observer]:
        """At most three members outside; first those that can be dialled, and by IPv4."""
        outside = [
            peer
            for peer in peers
            if is_outside(peer.remote_host or "")
            and not is_near(peer.remote_host or "", self.own_hosts)
        ]
        outside.sort(key=lambda peer: (peer.dialled_address is None, ":" in str(peer.remote_host)))
        views = await asyncio.gather(*(self._view(peer) for peer in outside[: 2 * MAX_OBSERVERS]))
        found = [observer for observer in views if observer is not None]
        return sorted(found, key=lambda observer: not observer.port)[:MAX_OBSERVERS]

    async def udp(self, observers: Sequence[Observer]) -> NatKind:
        """The kind of NAT for UDP."""
        family = _one_family([observer for observer in observers if observer.stun])
        if not family:
            return NatKind.UNKNOWN
        try:
            prober = await UdpProber.open(_any_host(family[0].host), self.stun_key)
        except OSError as error:
            self._note("UDP socket", None, str(error))
            return NatKind.UNKNOWN
        try:
            evidence = await self._udp_evidence(prober, family)
        finally:
            await prober.aclose()
        kind = classify(evidence)
        self._note("UDP kind", None, kind.value)
        return kind

    async def tcp(self, observers: Sequence[Observer]) -> NatKind:
        """The kind of NAT for TCP."""
        family = _one_family([observer for observer in observers if observer.port])
        if not family:
            return NatKind.UNKNOWN
        try:
            with ExitStack() as sockets:
                evidence = await self._tcp_evidence(family, sockets)
        except (OSError, TransportError) as error:  # no more sockets, or our port was taken
            self._note("TCP socket", None, str(error))
            return NatKind.UNKNOWN
        kind = classify(evidence)
        self._note("TCP kind", None, kind.value)
        return kind

    async def reachable(self, observers: Sequence[Observer], port: int) -> tuple[str, ...]:
        """The hosts at which `port` led a member to our listener."""
        outcomes = await asyncio.gather(
            *(self._dial_back(observer, port) for observer in observers)
        )
        found = {
            outcome.host: None
            for outcome in outcomes
            if outcome is not None and outcome.outcome == "answered"
        }
        return tuple(found)

    # --- UDP -----------------------------------------------------------------------------------

    async def _udp_evidence(self, prober: UdpProber, observers: Sequence[Observer]) -> Evidence:
        evidence = Evidence(local_port=prober.local_port, own_hosts=self.own_hosts)
        for first, second in _turns(observers):
            seen = await self._sight(prober, first, first.view.udp_port)
            if seen is None:
                continue
            # Who gets in is tested before anything else is sent: sending would let them in.
            heard_port, heard_host = await asyncio.gather(
                self._hears(prober, first, seen.mapped), self._hears(prober, second, seen.mapped)
            )
            more = await asyncio.gather(
                self._sight(prober, first, first.view.other_udp_port),
                self._sight(prober, second, second.view.udp_port if second else 0),
            )
            return replace(
                evidence,
                sightings=(seen, *(sighting for sighting in more if sighting is not None)),
                heard_other_port=heard_port,
                heard_other_host=heard_host,
            )
        # An observer behind a router of its own may have its UDP port closed there.
        return replace(
            evidence, is_blocked=any(observer.view.is_own_host for observer in observers)
        )

    async def _sight(
        self, prober: UdpProber, observer: Observer | None, port: int
    ) -> Sighting | None:
        if observer is None or not port:
            return None
        mapped = await prober.ask((observer.host, port))
        self._note(
            f"UDP from port {prober.local_port} to {format_address(observer.host, port)}",
            observer,
            f"seen as {format_address(*mapped)}" if mapped else "no answer",
        )
        return Sighting((observer.host, port), mapped) if mapped else None

    async def _hears(
        self, prober: UdpProber, observer: Observer | None, mapped: Endpoint
    ) -> bool | None:
        """Whether a packet from the observer's other port comes in; None if it sent none."""
        if observer is None or observer.view.host != mapped[0] or not observer.view.other_udp_port:
            return None
        nonce, heard = prober.expect()
        was_sent = False
        for _ in range(N_PROBES):
            try:
                reply = await observer.peer.request(
                    SendProbe(port=mapped[1], nonce=nonce), timeout_s=ASK_S
                )
            except TransportError:
                break
            if not (isinstance(reply.message, ProbeSent) and reply.message.is_sent):
                break
            was_sent = True
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await heard.wait()
                break
        outcome = "came in" if heard.is_set() else "was kept out" if was_sent else "was not sent"
        self._note("UDP packet from its other port", observer, outcome)
        return heard.is_set() if was_sent else None

    # --- TCP -----------------------------------------------------------------------------------

    async def _tcp_evidence(self, observers: Sequence[Observer], sockets: ExitStack) -> Evidence:
        host = _any_host(observers[0].host)
        connection = sockets.enter_context(reusable_socket(host))
        local_port = connection.getsockname()[1]
        evidence = Evidence(local_port=local_port, own_hosts=self.own_hosts)
        for first, second in _turns(observers):
            seen = await self._observe(connection, first, first.port)
            if seen is None:
                connection = sockets.enter_context(reusable_socket(host, local_port))
                continue
            with reusable_socket(host, local_port) as listening:
                listening.listen(8)
                heard_port, heard_host = await self._who_gets_in(
                    listening, first, second, seen.mapped
                )
            again = [sockets.enter_context(reusable_socket(host, local_port)) for _ in range(2)]
            more = await asyncio.gather(
                self._observe(again[0], first, first.view.other_tcp_port),
                self._observe(again[1], second, second.port if second else 0),
            )
            return replace(
                evidence,
                sightings=(seen, *(sighting for sighting in more if sighting is not None)),
                heard_other_port=heard_port,
                heard_other_host=heard_host,
            )
        return evidence

    async def _observe(
        self, connection: socket.socket, observer: Observer | None, port: int
    ) -> Sighting | None:
        if observer is None or not port:
            return None
        server = format_address(observer.host, port)
        suffix = OTHER_PORT if port == observer.view.other_tcp_port else ""
        try:
            text = await observe(
                connection, server, peer_id=observer.peer.peer_id + suffix, keys=self.keys
            )
        except TransportError as error:
            self._note(f"TCP to {server}", observer, str(error))
            return None
        self._note(f"TCP to {server}", observer, f"seen as {text}")
        return Sighting((observer.host, port), parse_address(text))

    async def _who_gets_in(
        self,
        listening: socket.socket,
        first: Observer,
        second: Observer | None,
        mapped: Endpoint,
    ) -> tuple[bool | None, bool | None]:
        """Whether connections from fresh sockets of the two come in to our mapped port."""
        came = _Arrivals(listening, self.stun_key)
        asked = [
            (observer, os.urandom(TRANSACTION_BYTES))
            for observer in (first, second)
            if observer is not None and observer.view.host == mapped[0]
        ]
        try:
            outcomes = await asyncio.gather(
                *(self._dial_back(observer, mapped[1], nonce) for observer, nonce in asked)
            )
            if any(outcome is not None and outcome.outcome == "answered" for outcome in outcomes):
                await asyncio.sleep(GRACE_S)
        finally:
            await came.aclose()
        heard = {
            id(observer): nonce in came.nonces
            for (observer, nonce), outcome in zip(asked, outcomes, strict=True)
            if outcome is not None and outcome.outcome != "declined"
        }
        return heard.get(id(first)), heard.get(id(second))

    # --- over links ------------------------------------------------------------------------------

    async def _view(self, peer: Peer) -> Observer | None:
        host, dialled = peer.remote_host, peer.dialled_address
        if host is None:
            return None
        try:
            reply = await peer.request(ViewRequest(host=host), timeout_s=ASK_S)
        except TransportError as error:
            self._note("question how it sees us", peer, str(error))
            return None
        view = reply.message
        if not isinstance(view, View):
            return None
        if view.host == host and host not in self.own_hosts:
            self._note("question how it sees us", peer, "it is behind the same router")
            return None
        self._note("question how it sees us", peer, f"as {view.host}")
        port = view.port if view.is_own_host else 0
        return Observer(peer, host, dialled[1] if dialled is not None else port, view)

    async def _dial_back(
        self, observer: Observer, port: int, nonce: bytes | None = None
    ) -> DialledBack | None:
        try:
            reply = await observer.peer.request(DialBack(port=port, nonce=nonce), timeout_s=ASK_S)
        except TransportError:
            return None
        if not isinstance(reply.message, DialledBack):
            return None
        what = "listening port" if nonce is None else "mapped port"
        self._note(
            f"TCP from it to our {what} {format_address(reply.message.host, port)}",
            observer,
            reply.message.outcome,
        )
        return reply.message

    def _note(self, test: str, observer: Observer | Peer | None, outcome: str) -> None:
        peer = observer.peer if isinstance(observer, Observer) else observer
        name = "" if peer is None else peer.peer_id[-8:]
        self.steps.append(Step(test=test, observer=name, outcome=outcome))


class _Arrivals:
    """Who connects to a listening socket, told by the probes they send."""

    def __init__(self, listening: socket.socket, key: bytes) -> None:
        self.nonces: set[bytes] = set()
        self._listening = listening
        self._key = key
        self._tasks = Tasks()
        self._tasks.spawn(self._accept(), "arrivals")

    async def aclose(self) -> None:
        """Stop; the socket stays its owner's."""
        await self._tasks.aclose()

    async def _accept(self) -> None:
        while True:
            with suppress(ConnectionError):  # gone before we took it
                connection, _ = await accept_one(self._listening)
                reading = self._tasks.spawn(self._read(connection), "arrival")
                reading.add_done_callback(lambda _, c=connection: c.close())  # type: ignore[misc]

    async def _read(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError, TimeoutError):
            connection.setblocking(False)
            async with asyncio.timeout(ASK_S):
                nonce = read_probe(await receive_exactly(connection, PROBE_BYTES), self._key)
            if nonce is not None:
                self.nonces.add(nonce)


def _turns(observers: Sequence[Observer]) -> Iterable[tuple[Observer, Observer | None]]:
    """Each observer with the one after it, to which nothing was sent yet."""
    return zip(observers, (*observers[1:], None), strict=True)


def _one_family(observers: Sequence[Observer]) -> list[Observer]:
    """The observers of IPv4, where NAT is at home; those of IPv6 if there are none."""
    four = [observer for observer in observers if ":" not in observer.host]
    return four or list(observers)


def _any_host(like: str) -> str:
    return "::" if ":" in like else "0.0.0.0"  # noqa: S104 - all routes out are meant
