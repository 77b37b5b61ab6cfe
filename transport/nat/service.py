"""What one node knows of its NAT, kept up to date; and the node's share in telling others.

Thin: it opens the sockets, runs the `Classifier` and the `PortMapper` when something changed, and
holds what they found. `facts` may be read at any time and says `unknown` until it is known.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Self

from covey.transport.addresses import format_address, reachable_hosts
from covey.transport.errors import TransportError
from covey.transport.listener import Listener
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer
from covey.transport.preamble import PreambleGate
from covey.transport.tasks import Tasks

from .address_watch import AddressWatch
from .answering import Answering, Ports
from .classifier import Classifier, Observer, Step
from .explain import Finding, explain
from .facts import MAX_HOSTS, MAX_LAN_HOSTS, NatFacts, is_near, is_public
from .mapping import Mapped, PortMapper
from .observation import OTHER_PORT, ObservationDoor, ObserveKeys, observe, reusable_socket
from .responder import Responder, UdpPort, open_responder

logger = logging.getLogger(__name__)

REFRESH_S = 600.0
LOOK_S = 5.0  # between looks for observers while there are too few
LOOK_AT_MOST_S = 60.0
# Where members come and go, none of whom can judge: between the first two rounds, and at most.
BETWEEN_ROUNDS_S, BETWEEN_ROUNDS_AT_MOST_S = 1.0, 30.0
ENOUGH_OBSERVERS = 2
REFRESH_DEADLINE_S = 60.0
ANY_HOST = "0.0.0.0"  # noqa: S104 - all routes out are meant

OnChange = Callable[[NatFacts], None]


def _ignore(facts: NatFacts) -> None:
    """Nobody wants to know."""


def _ignore_address() -> None:
    """Nobody wants to know."""


class NatService:
    """Composes everything in this package for one mesh that listens; `async with` runs it."""

    def __init__(
        self,
        mesh: Mesh,
        swarm: Swarm,
        *,
        on_change: OnChange = _ignore,
        on_address_change: Callable[[], None] = _ignore_address,
        maps_ports: bool = True,
        is_outside: Callable[[str], bool] = is_public,
    ) -> None:
        """The callbacks must not block; `is_outside` says which members can judge our NAT.

        `on_address_change` is called when this machine has come to another network.
        """
        self._on_address_change = on_address_change
        self._mesh = mesh
        self._keys = ObserveKeys.of(swarm)
        self._responder = Responder(swarm.stun_key, self._is_peer)
        self._door = ObservationDoor(self._keys)
        self._on_change = on_change
        self._is_outside = is_outside
        self._answering: Answering | None = None
        self._udp: list[UdpPort] = []
        self._other_listeners: list[Listener] = []
        self._mapper = PortMapper() if maps_ports else None
        self._mapping: asyncio.Task[Mapped | None] | None = None
        self._watch = AddressWatch(self._address_changed)
        self._observers: list[Observer] = []
        self._asked: frozenset[Peer] = frozenset()  # candidates at the last refresh
        self._tasks = Tasks()
        self._refreshing: asyncio.Task[NatFacts] | None = None
        self._woken = asyncio.Event()
        self._is_stale = True
        self._between_s = BETWEEN_ROUNDS_S
        self.steps: tuple[Step, ...] = ()  # of the last refresh, for `covey doctor`
        self.facts = NatFacts(port=mesh.bound[0][1] if mesh.bound else 1, measured_at=0.0)

    async def __aenter__(self) -> Self:
        """As `start`."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """As `aclose`."""
        await self.aclose()

    async def start(self) -> None:
        """Open the sockets that others probe, and begin to find out; the mesh listens already."""
        self._answering = Answering(
            self._mesh.serve, lambda: self._keys, lambda: self._responder.key, self._own_hosts
        )
        self._mesh.add_door(self._door)
        await self._open_sockets(self._answering)
        self._watch.start()
        self._tasks.spawn(self._keep(), "NAT facts")

    async def aclose(self) -> None:
        """Stop; give a mapped port back."""
        await self._watch.aclose()
        await self._tasks.aclose()
        if self._answering is not None:
            await self._answering.aclose()
        await self._door.aclose()
        for listener in self._other_listeners:
            await listener.aclose()
        for port in self._udp:
            await port.aclose()
        if self._mapper is not None:
            await self._mapper.remove()

    def use_swarm(self, swarm: Swarm) -> None:
        """From now on ask and answer with another epoch's keys."""
        self._keys = self._door.keys = ObserveKeys.of(swarm)
        self._responder.key = swarm.stun_key

    def poke(self) -> None:
        """There are new links: look whether they tell more."""
        self._woken.set()

    @property
    def stun_servers(self) -> tuple[tuple[str, int], ...]:
        """Host and port of members that answer STUN, plain requests too."""
        found = [observer.stun for observer in self._live_observers()]
        return tuple(stun for stun in found if stun is not None)

    @property
    def mapping_reason(self) -> str:
        """Why the router gave no port; empty if it did, or was not to be asked."""
        mapper = self._mapper
        return "" if mapper is None or mapper.mapped is not None else mapper.reason

    def explain(self) -> tuple[Finding, ...]:
        """All of it in words, with what the user could change."""
        return explain(
            self.facts, claimed_address=self.claimed_address, mapping_reason=self.mapping_reason
        )

    @property
    def claimed_address(self) -> str | None:
        """The "host:port" that the router says leads here; nobody may have tried it yet."""
        mapped = None if self._mapper is None else self._mapper.mapped
        return None if mapped is None else mapped.address

    async def observe_from(self, local_port: int = 0) -> tuple[socket.socket, str]:
        """A connection from a port here to a member outside, and the "host:port" it is seen at.

        The port (0: any) may be shared by others of this process, bound as `reusable_socket` does.
        The caller closes the connection; the router's mapping lives while it does.

        Raises:
            TransportError: the port is taken, or no member could be asked.
        """
        reason = "no member outside can be asked"
        for observer in self._live_observers():
            if not observer.port or ":" in observer.host:
                continue
            connection = reusable_socket(ANY_HOST, local_port)
            try:
                seen = await observe(
                    connection, observer.address, peer_id=observer.peer.peer_id, keys=self._keys
                )
            except TransportError as error:
                reason = str(error)
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection, seen
        raise TransportError(reason)

    async def refresh(self) -> NatFacts:
        """Find everything out anew, some three seconds; callers at once share one round.

        It begins after the call: a round under way may have missed what the caller knows.
        """
        if self._refreshing is not None:
            await asyncio.wait({self._refreshing})
        if self._refreshing is None:
            self._refreshing = self._tasks.spawn(self._find_out(), "refresh of NAT facts")
        return await asyncio.shield(self._refreshing)

    # --- finding out ---------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Refresh when something changed, when there are more to ask, and now and then."""
        pause_s = LOOK_S
        while True:
            self._woken.clear()  # before the round: what comes during it may be too late for it
            if self._is_stale or self._is_due() or self._could_know_more():
                await self.refresh()
                # If nobody could answer the round was for nothing: the next one is less urgent.
                pause_s = LOOK_S if self._observers else min(2 * pause_s, LOOK_AT_MOST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()

    def _is_due(self) -> bool:
        mapped = None if self._mapper is None else self._mapper.mapped
        lease_s = mapped.lease_s if mapped is not None and mapped.lease_s else REFRESH_S
        return time.monotonic() - self.facts.measured_at > min(REFRESH_S, lease_s / 2)

    def _could_know_more(self) -> bool:
        """Whether too few could judge, and there are others now, or nobody answered at all."""
        observers, candidates = self._live_observers(), self._candidates()
        if len([observer for observer in observers if observer.port]) >= ENOUGH_OBSERVERS:
            return False
        if not observers:
            return bool(candidates)
        is_recent = time.monotonic() - self.facts.measured_at < self._between_s
        return not is_recent and bool(candidates - self._asked)

    def _candidates(self) -> frozenset[Peer]:
        own_hosts = self._own_hosts()
        return frozenset(
            peer
            for peer in self._mesh.peers.values()
            if self._is_outside(peer.remote_host or "")
            and not is_near(peer.remote_host or "", own_hosts)
        )

    def _live_observers(self) -> list[Observer]:
        return [observer for observer in self._observers if observer.peer.error is None]

    async def _find_out(self) -> NatFacts:
        try:
            async with asyncio.timeout(REFRESH_DEADLINE_S):
                facts = await self._measure()
        except TimeoutError:
            logger.warning("the NAT facts could not be refreshed in time")
            return self.facts
        finally:
            self._refreshing = None
        self._set(facts)
        return facts

    async def _measure(self) -> NatFacts:
        self._is_stale = False
        self._asked = self._candidates()
        port = self.facts.port
        if self._mapping is None or self._mapping.done():  # UPnP alone takes seconds
            self._mapping = self._tasks.spawn(self._map(port), "port mapping")
        mapping = self._mapping
        classifier = Classifier(self._keys, self._responder.key, self._own_hosts())
        observers = await classifier.find_observers(self._asked, self._is_outside)
        udp, tcp, reached = await asyncio.gather(
            classifier.udp(observers),
            classifier.tcp(observers),
            classifier.reachable(observers, port),
        )
        self._observers = observers
        self._between_s = min(2 * self._between_s, BETWEEN_ROUNDS_AT_MOST_S)
        # Most of them agree on one host of ours, whatever a single one may say.
        seen = Counter(filter(self._is_outside, (observer.view.host for observer in observers)))
        facts = NatFacts(
            udp=udp,
            tcp=tcp,
            port=port,
            is_reachable=bool(reached),
            reachable_hosts=reached[:MAX_HOSTS],
            public_hosts=tuple(host for host, _ in seen.most_common(MAX_HOSTS)),
            mapped_addresses=self.facts.mapped_addresses,
            lan_hosts=self._lan_hosts(),
            n_observers=len([observer for observer in observers if observer.port]),
            measured_at=time.monotonic(),
        )
        verified = await self._verified(mapping, classifier, observers, facts)
        self.steps = tuple(classifier.steps)
        return replace(facts, mapped_addresses=verified)

    async def _verified(
        self,
        mapping: asyncio.Task[Mapped | None],
        classifier: Classifier,
        observers: list[Observer],
        facts: NatFacts,
    ) -> tuple[str, ...]:
        """Where the router forwards to us, as observers tried it; `facts` are told meanwhile."""
        if not mapping.done():
            self._set(facts)  # whoever needs a relay is not to wait for its router
            woken = self._tasks.spawn(_wait(self._woken), "wait for observers")
            others = {woken} if not observers else set()  # the next round goes on with the mapping
            await asyncio.wait({mapping, *others}, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
        mapped = mapping.result() if mapping.done() and not mapping.cancelled() else None
        if mapped is None:
            return ()
        four = [observer for observer in observers if ":" not in observer.host]
        verified = await classifier.reachable(four, mapped.outer_port)
        return tuple(format_address(host, mapped.outer_port) for host in verified)

    async def _map(self, port: int) -> Mapped | None:
        hosts = [ip for ip in map(ipaddress.ip_address, self._lan_hosts()) if ip.version == 4]
        is_inside = any(not ip.is_loopback for ip in hosts)
        if self._mapper is None or not is_inside or any(self._is_outside(str(ip)) for ip in hosts):
            return None  # an address of our own needs none
        return await self._mapper.map(port)

    def _set(self, facts: NatFacts) -> None:
        changed, self.facts = facts != self.facts, facts
        if changed:
            logger.info("NAT facts", extra={"udp": facts.udp.value, "tcp": facts.tcp.value})
            self._on_change(facts)

    def _address_changed(self) -> None:
        """What was known is of another network."""
        self._on_address_change()
        self._is_stale = True
        self._between_s = BETWEEN_ROUNDS_S
        if self._mapping is not None:
            self._mapping.cancel()
            self._mapping = None  # another router is to be asked
        self._observers = []
        self._set(
            NatFacts(
                port=self.facts.port, lan_hosts=self._lan_hosts(), measured_at=time.monotonic()
            )
        )
        self._woken.set()

    # --- answering -----------------------------------------------------------------------------

    async def _open_sockets(self, answering: Answering) -> None:
        """For each IP version the responder, its second socket and a second listening socket.

        Both versions use the same port numbers, where these are free.
        """
        listening = udp = other_udp = other_tcp = 0
        for version, (host, port) in _by_version(self._mesh.bound).items():
            listening = listening or port
            answerer = await _bind_udp(host, udp or port, self._responder)
            prober = await _bind_udp(host, other_udp, self._responder)
            self._udp += [answerer, prober]
            answering.probe_ports[version] = prober
            udp, other_udp = udp or answerer.local[1], other_udp or prober.local[1]
            gate = PreambleGate(
                self._mesh.peer_id + OTHER_PORT, self._door.key_of, opened_at=time.time()
            )
            listener = Listener(((host, other_tcp),), gate, self._door.enter)
            try:
                listener.start()
            except TransportError as error:
                logger.warning("no second listening port", extra={"reason": str(error)})
                continue
            self._other_listeners.append(listener)
            other_tcp = other_tcp or listener.bound[0][1]
        answering.ports = Ports(
            listening=listening, other_tcp=other_tcp, udp=udp, other_udp=other_udp
        )

    def _own_hosts(self) -> frozenset[str]:
        return frozenset(host for bound, _ in self._mesh.bound for host in reachable_hosts(bound))

    def _lan_hosts(self) -> tuple[str, ...]:
        return tuple(sorted(self._own_hosts()))[:MAX_LAN_HOSTS]

    def _is_peer(self, host: str) -> bool:
        return any(peer.remote_host == host for peer in self._mesh.peers.values())


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _by_version(bound: tuple[tuple[str, int], ...]) -> dict[int, tuple[str, int]]:
    """The first listening socket of each IP version."""
    found: dict[int, tuple[str, int]] = {}
    for host, port in bound:
        found.setdefault(6 if ":" in host else 4, (host, port))
    return found


async def _bind_udp(host: str, port: int, responder: Responder) -> UdpPort:
    """That port, or any if another program has it. Raises TransportError: there is none."""
    try:
        try:
            return await open_responder(host, port, responder)
        except OSError:
            return await open_responder(host, 0, responder)
    except OSError as error:
        raise TransportError(f"cannot open a UDP port on {host}: {error}") from error
