"""libp2p's swarm, put within bounds: how a peer is dialled, and when a connection is let go.

Belongs to `control_node.py` and to the trio thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IMuxedConn, INetConn, INetStream, IRawConnection
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.host.exceptions import StreamFailure
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from multiaddr.exceptions import Error as MultiaddrError

DIAL_DEADLINE_S = 5.0  # 0.8.1 goes on for more than 30 s with a wrong pre-shared key
COOL_OFF_S = 15.0  # after a dial in vain lookups pass a peer over: this long, then twice as long,
MAX_COOL_OFF_S = 600.0  # up to this, since a dead one stays in the tables of others for hours
STREAM_DEADLINE_S = 3.0  # for one round trip on an open connection
MAX_CONNECTIONS = 256
MAX_DIALS = 16  # addresses of one peer, tried at once
N_AT_ONCE = 8
# A connection that nobody uses costs a yamux ping each way every 30 s, and a node comes to know
# everybody. The dialler closes first, so that the two ends seldom close on each other's question.
IDLE_S = (20.0, 40.0)  # since its last stream, at the end that dialled and at the other
SWEEP_S = 5.0

# What a peer or the network can make libp2p raise. Anything else is a bug and is reported as one.
FAILURES = (
    BaseLibp2pError,
    MultiaddrError,
    OSError,
    DecodeError,  # protobuf
    KeyError,  # PeerStoreError derives from it
    ValueError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


class BoundedSwarm(Swarm):  # type: ignore[misc]  # libp2p is not followed by mypy
    """libp2p's swarm, with bounds on how long a dial and a finished connection stay around."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dialling: dict[Any, trio.Event] = {}
        self._in_vain: dict[Any, tuple[float, float]] = {}  # peer: (cool-off, until)
        self._used_at: dict[Any, float] = {}  # by peer with a connection

    def forget_failure(self, peer_id: Any) -> None:
        """Let the next `dial_peer` try at once."""
        self._in_vain.pop(peer_id, None)

    def used(self, peer_id: Any) -> None:
        """A question goes to or comes from a peer: keep its connection for a while."""
        self._used_at[peer_id] = trio.current_time()

    async def close_idle(self) -> None:
        """Close connections that nobody uses, until cancelled."""
        while True:
            await trio.sleep(SWEEP_S)
            now = trio.current_time()
            connections = self.get_connections_map()
            self._used_at = {peer: self._used_at.get(peer, now) for peer in connections}
            for peer, open_now in connections.items():
                idle_s = now - self._used_at[peer]
                for conn in open_now:
                    is_ours = bool(getattr(conn.muxed_conn, "is_initiator", False))
                    if idle_s > IDLE_S[0 if is_ours else 1]:
                        self.manager.run_task(self._close_quietly, conn)

    async def _close_quietly(self, conn: INetConn) -> None:
        with trio.move_on_after(DIAL_DEADLINE_S), suppress(*FAILURES):
            await conn.close()

    async def dial_peer(self, peer_id: Any) -> list[INetConn]:
        """A connection to a peer, the one there is or a new one within DIAL_DEADLINE_S.

        libp2p's own tries a single TCP address of a peer, for as long as it takes, and waits
        250 ms after it has succeeded. This one tries all addresses at once; the first one wins.

        Raises:
            SwarmException: no address is known or worked, or none did a moment ago.
        """
        while (event := self._dialling.get(peer_id)) is not None:  # a trio.Event has no truth
            await event.wait()
        if open_now := [conn for conn in self.get_connections(peer_id) if not conn.is_closed]:
            return open_now
        if peer_id in self._in_vain and trio.current_time() < self._in_vain[peer_id][1]:
            raise SwarmException(f"peer {peer_id} could not be reached a moment ago")
        try:
            addresses = _dial_order(self.peerstore.addrs(peer_id))
        except KeyError as error:
            raise SwarmException(f"no address of peer {peer_id} is known") from error
        event = self._dialling[peer_id] = trio.Event()
        try:
            connections = await self._race(peer_id, addresses)
        finally:
            del self._dialling[peer_id]
            event.set()
        if not connections:
            self._note_failure(peer_id)
            raise SwarmException(f"no address of peer {peer_id} worked")
        self._in_vain.pop(peer_id, None)
        return connections

    def give_up(self, peer_id: Any) -> None:
        """End the connections to a peer that does not answer, and let it be for a while."""
        self._note_failure(peer_id)
        self.manager.run_task(self.close_peer, peer_id)

    def _note_failure(self, peer_id: Any) -> None:
        now = trio.current_time()
        if peer_id in self._in_vain and now < self._in_vain[peer_id][1]:
            return  # several questions to one peer fail together: that counts once
        recent = {peer: e for peer, e in self._in_vain.items() if e[1] > now - MAX_COOL_OFF_S}
        last_s = recent[peer_id][0] if peer_id in recent else COOL_OFF_S / 2
        cool_off_s = min(2 * last_s, MAX_COOL_OFF_S)
        self._in_vain = recent | {peer_id: (cool_off_s, now + cool_off_s)}

    async def _race(self, peer_id: Any, addresses: list[Any]) -> list[INetConn]:
        connections: list[INetConn] = []
        with trio.move_on_after(DIAL_DEADLINE_S) as scope:

            async def attempt(address: Any) -> None:
                try:
                    connections.append(await self.dial_addr(address, peer_id))
                except FAILURES:
                    return
                scope.cancel()

            await each(addresses, attempt, at_once=MAX_DIALS)
        return connections

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Any) -> IMuxedConn:
        """Take a connection in, and return only when it has ended.

        The caller holds one of a fixed number of inbound slots until the whole swarm ends, so
        that a node would turn deaf after that many connections in its life; raising frees it.
        """
        muxed = await super().upgrade_inbound_raw_conn(raw_conn, maddr)
        self.forget_failure(muxed.peer_id)
        self.used(muxed.peer_id)
        await self._close_after(muxed, raw_conn)
        raise SwarmException("the connection has ended")

    async def upgrade_outbound_raw_conn(
        self, raw_conn: IRawConnection, peer_id: Any, pre_scope: Any = None
    ) -> INetConn:
        """Secure a dialled connection, and see to it that its socket is closed with it."""
        conn = await super().upgrade_outbound_raw_conn(raw_conn, peer_id, pre_scope)
        self.manager.run_task(self._close_after, conn.muxed_conn, raw_conn)
        return conn

    async def _close_after(self, muxed: Any, raw_conn: IRawConnection) -> None:
        """libp2p leaves the socket of a connection that the other side has ended to the GC."""
        try:
            await muxed.event_closed.wait()
        finally:
            with shielded(1.0):
                await raw_conn.close()


class BoundedHost(BasicHost):  # type: ignore[misc]  # libp2p is not followed by mypy
    """libp2p's host, which finds out about a peer that went to sleep with its connection open."""

    on_identified: Callable[[Any], Awaitable[bool]] | None = None
    """Awaited with the id of each peer that has told which protocols it speaks."""

    async def new_stream(self, peer_id: Any, protocol_ids: Any) -> INetStream:
        """A stream to a peer, which is dialled if need be.

        Raises:
            SwarmException: it cannot be reached, or did not answer within STREAM_DEADLINE_S; then
                its connections are ended, or each question would wait for it all over again.
        """
        swarm = self.get_network()
        was_open = any(not conn.is_closed for conn in swarm.get_connections(peer_id))
        await swarm.dial_peer(peer_id)
        swarm.used(peer_id)
        try:
            with trio.fail_after(STREAM_DEADLINE_S):
                return await super().new_stream(peer_id, protocol_ids)
        except (StreamFailure, SwarmException, trio.TooSlowError) as error:
            is_gone = all(conn.is_closed for conn in swarm.get_connections(peer_id))
            if was_open and is_gone:  # the other end closed it in that very moment
                return await self.new_stream(peer_id, protocol_ids)
            swarm.give_up(peer_id)
            # It may have changed: ask anew what it speaks when it comes by itself.
            with suppress(*FAILURES):
                self.get_peerstore().clear_protocol_data(peer_id)
            raise SwarmException(f"peer {peer_id} does not answer") from error

    async def _identify_peer(self, peer_id: Any, *, reason: str) -> None:
        await super()._identify_peer(peer_id, reason=reason)
        if self.on_identified is not None:
            await self.on_identified(peer_id)


async def each(
    items: Iterable[Any], function: Callable[[Any], Awaitable[None]], *, at_once: int = N_AT_ONCE
) -> None:
    """Await `function` of all items, some of them at a time."""
    limit = trio.CapacityLimiter(at_once)

    async def one(item: Any) -> None:
        async with limit:
            await function(item)

    async with trio.open_nursery() as nursery:
        for item in items:
            nursery.start_soon(one, item)


def shielded(seconds: float) -> trio.CancelScope:
    """A scope for cleaning up: not cancelled from outside, but by this deadline."""
    scope = trio.move_on_after(seconds)
    scope.shield = True
    return scope


def connection_config() -> Any:
    """Limits of one node; nothing is dialled or dropped to reach some number of connections."""
    return ConnectionConfig(
        max_connections=MAX_CONNECTIONS,
        min_connections=0,
        low_watermark=0,
        high_watermark=MAX_CONNECTIONS,
        dial_timeout=DIAL_DEADLINE_S,
        inbound_upgrade_timeout=DIAL_DEADLINE_S,
        outbound_upgrade_timeout=DIAL_DEADLINE_S,
        inbound_stream_protocol_negotiation_timeout=DIAL_DEADLINE_S,
        outbound_stream_protocol_negotiation_timeout=DIAL_DEADLINE_S,
    )


def _dial_order(addresses: Iterable[Any]) -> list[Any]:
    """Plain TCP addresses; loopback ones only if a peer has no others, for they may lead to us."""
    texts = {str(address): address for address in addresses}
    tcp = {  # no names: a member could make others ask a DNS server of its choice
        text: address
        for text, address in texts.items()
        if text.startswith(("/ip4/", "/ip6/")) and "/tcp/" in text
    }
    plain = {
        text: address
        for text, address in tcp.items()
        if not any(f"/{other}" in text for other in ("ws", "wss", "p2p-circuit", "quic"))
    }
    remote = [a for text, a in plain.items() if not text.startswith(("/ip4/127.", "/ip6/::1/"))]
    return (remote or list(plain.values()))[:MAX_DIALS]
