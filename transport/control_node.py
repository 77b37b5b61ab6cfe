"""The trio side of the control plane: a libp2p host and its Kademlia DHT.

With `control_swarm.py` the only file that imports libp2p, which takes a second; `control.py` does
it in the trio thread. Security is Noise over TCP inside a pre-shared key, and nothing else. What
py-libp2p 0.8.1 does that Covey does not want is put right here, each at the place that says why.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import varint  # type: ignore[import-untyped]
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.network.config import RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.records.validator import NamespacedValidator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from .control_dht import DhtValidator, QuietDht
from .control_listen import check_free, dialable, listen_address
from .control_lookup import Search
from .control_records import (
    ControlError,
    PeerRecord,
    RecordOutdated,
    RecordRule,
    record_key,
)
from .control_swarm import (
    DIAL_DEADLINE_S,
    FAILURES,
    MAX_DIALS,
    BoundedHost,
    BoundedSwarm,
    connection_config,
    each,
    shielded,
)
from .identity import public_key_of

ASK_DEADLINE_S = 3.0  # one question to one peer, a dial not included
PHASE_DEADLINE_S = 6.0  # one step of a lookup; then it goes on with what it has
FETCH_DEADLINE_S = 15.0  # all records of a discovery; then those that were found are returned
PART_DEADLINE_S = 3.0  # saying goodbye; 0.8.1 sleeps 0.2 s for each connection, one by one
ADDRESS_TTL_S = 24 * 3600  # libp2p's own 120 s forgets how to dial a peer that was quiet
MAX_ANSWER_BYTES = 256 * 1024
MAX_CANDIDATES = 256
N_NEAR = 3  # peers asked for a record before a full lookup
ENOUGH_S = 0.3  # after the first good answer, for better ones
N_HOLDERS = 6  # peers that hold a record; libp2p's 20 cost more than they are worth in our sizes
N_ASKED_AT_ONCE = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What one node of the control plane needs to start."""

    private_key: bytes  # raw Ed25519 seed, 32 bytes
    psk: bytes  # 32 bytes, the same for all members
    swarm: str
    listen: tuple[str, ...]  # literal IP addresses
    port: int  # 0: any free one, another for each address


@asynccontextmanager
async def open_node(settings: NodeSettings) -> AsyncIterator[ControlNode]:
    """Listen, and take part in the DHT, until the context ends.

    Raises:
        ControlError: an address cannot be listened on.
    """
    _quieten()
    for host in settings.listen:
        check_free(host, settings.port)
    node = ControlNode(settings)
    listen = [listen_address(host, settings.port) for host in settings.listen]
    async with node.host.run(listen_addrs=listen):
        if len(node.swarm.listeners) != len(listen):  # libp2p is content with one of them
            raise ControlError(f"cannot listen on all of {', '.join(settings.listen)}")
        node.host.get_addrs()  # fills `node.addresses`, now that the ports are known
        # It dials known peers at random, up to a hundred of them, every 30 s. Covey decides that.
        await node.swarm.auto_connector.stop()
        node.swarm.manager.run_daemon_task(node.swarm.close_idle)
        async with background_trio_service(node.dht):
            try:
                yield node
            finally:
                with shielded(PART_DEADLINE_S):
                    await node.host.close()


class ControlNode:
    """One member's place in the control plane; every coroutine belongs to the trio thread."""

    def __init__(self, settings: NodeSettings) -> None:
        self.addresses: tuple[str, ...] = ()
        """Multiaddrs that other members may dial; replaced, never changed, so any thread reads."""
        self._rule = RecordRule(swarm=settings.swarm, now=time.time)
        self._rendezvous = hashlib.sha256(b"covey rendezvous " + settings.swarm.encode()).digest()
        self._advertised: tuple[float, tuple[str, ...], list[Any]] = (0.0, (), [])
        keys = create_new_key_pair(settings.private_key)
        self.own_id = ID.from_pubkey(keys.public_key)
        peers = PeerStore()
        peers.add_key_pair(self.own_id, keys)
        self.swarm = BoundedSwarm(
            self.own_id,
            peers,
            TransportUpgrader(
                # Left to itself libp2p offers secio and plaintext as well.
                {NOISE: NoiseTransport(keys, create_noise_key_pair().private_key)},
                {YAMUX: Yamux},
                negotiate_timeout=int(DIAL_DEADLINE_S),
            ),
            transports=[TCP()],
            retry_config=RetryConfig(max_retries=0),
            connection_config=connection_config(),
            psk=settings.psk.hex(),
        )
        self.host = BoundedHost(
            self.swarm,
            negotiate_timeout=int(DIAL_DEADLINE_S),
            addrs_factory=self._advertise,
            disable_identify_address_discovery=True,  # a member could plant false ones
        )
        self.dht = QuietDht(
            self.host,
            DHTMode.SERVER,
            validator=NamespacedValidator(
                {"covey": DhtValidator(self._rule)}, strict_validation=True
            ),
            validator_changed=True,  # no "pk" and "ipns", which anybody may write
            strict_validation=True,  # else keys of other namespaces are stored unchecked
            max_peers_per_subnet=0,  # several members behind one router are the rule here
        )

        self.dht.rule = self._rule
        self.host.on_identified = self.dht.add_peer

    async def set_serving(self, *, is_serving: bool) -> None:
        """Answer questions of the DHT from now on, or not; `KadDHT.switch_mode` forgets all."""
        await trio.lowlevel.checkpoint()
        if is_serving == (self.dht.mode is DHTMode.SERVER):
            return
        if is_serving:
            self.dht.mode = DHTMode.SERVER
            self.host.set_stream_handler(PROTOCOL_ID, self.dht.handle_stream)
        else:
            self.dht.mode = DHTMode.CLIENT
            self.host.remove_stream_handler(PROTOCOL_ID)

    async def bootstrap(self, addresses: Sequence[str]) -> int:
        """Dial the peers behind `addresses` at once; the number of them that are connected now.

        Each dial has DIAL_DEADLINE_S, and so has the lookup that makes us known to their peers.
        """
        known: dict[Any, list[Any]] = {}
        for text in addresses:
            try:
                address = Multiaddr(text)
                peer = ID.from_base58(address.value_for_protocol("p2p"))
                public_key_of(peer.to_base58())
            except FAILURES:
                logger.info("ignoring an address to bootstrap from", extra={"address": text[:128]})
                continue
            if peer != self.own_id:
                known.setdefault(peer, []).append(address)
        joined: list[Any] = []

        async def join(peer: Any, peer_addresses: list[Any]) -> None:
            self.host.get_peerstore().add_addrs(peer, peer_addresses, ADDRESS_TTL_S)
            self.swarm.forget_failure(peer)
            try:
                await self.swarm.dial_peer(peer)
                await self.dht.routing_table.add_peer(peer, skip_server_mode_check=True)
                joined.append(peer)
            except FAILURES as error:
                logger.debug("bootstrap in vain", extra={"peer": str(peer)[-8:], "error": error})
            finally:
                if peer not in joined:  # or every lookup would try these addresses again
                    self.host.get_peerstore().clear_addrs(peer)

        await each(known.items(), lambda item: join(*item), at_once=max(1, len(known)))
        if joined:
            with trio.move_on_after(DIAL_DEADLINE_S):
                await self._closest(self.own_id.to_bytes(), N_HOLDERS)
        return len(joined)

    async def announce(self, record: PeerRecord, value: bytes) -> None:
        """Store our record at the peers closest to its key, and provide the rendezvous key.

        Raises:
            RecordOutdated: a record of ours with a higher sequence stands there.
        """
        key = record_key(record.swarm, record.peer_id)
        held = self._held(key)
        best = self._rule.best(key, [*held, value])
        if best is None or best[0] != len(held):
            raise RecordOutdated(best[1].sequence if best else 0)
        self.dht.value_store.put(key.encode(), value)
        put = Message(type=Message.MessageType.PUT_VALUE, key=key.encode())
        put.record.key, put.record.value = key.encode(), value
        holders, n_taken = await self._tell_closest(key.encode(), put)
        if holders and not n_taken:  # they refuse what is older than what they hold
            newest = await self._fetch(key, holders)
            if newest is not None and newest.sequence > record.sequence:
                raise RecordOutdated(newest.sequence)
        provide = Message(type=Message.MessageType.ADD_PROVIDER, key=self._rendezvous)
        own = [address.to_bytes() for address in self.host.get_addrs()[:MAX_DIALS]]
        provide.providerPeers.add(id=self.own_id.to_bytes(), addrs=own)
        await self._tell_closest(self._rendezvous, provide)

    async def lookup(self, peer_id: str) -> PeerRecord | None:
        """The newest record of a peer that the members closest to its key know.

        Those that we know to be near are asked first: when they are not the closest of all, one
        of them is among the holders all the same. Last the peer itself, should it be reachable:
        it may have published when there were too few to hold it for others.
        """
        key = record_key(self._rule.swarm, peer_id)
        near = self.dht.routing_table.find_local_closest_peers(key.encode(), N_NEAR)
        return (
            await self._fetch(key, near)
            or await self._fetch(key, await self._closest(key.encode()))
            or await self._fetch(key, [ID.from_base58(peer_id)])
        )

    async def discover(self, known: frozenset[str]) -> list[PeerRecord]:
        """The records of all members that can be found, without our own and those of `known`.

        Candidates are the providers of the rendezvous key, of which a peer remembers 20, and
        everyone in the routing table: the pre-shared key lets nobody else into that.
        """
        closest = await self._closest(self._rendezvous, N_HOLDERS)
        found = {info.peer_id for info in self.dht.provider_store.get_providers(self._rendezvous)}
        request = Message(type=Message.MessageType.GET_PROVIDERS, key=self._rendezvous)

        async def collect(peer: Any) -> None:
            answer = await self._ask(peer, request)
            if answer is not None:
                found.update(ID(entry.id) for entry in answer.providerPeers[: 2 * BUCKET_SIZE])

        with trio.move_on_after(PHASE_DEADLINE_S):
            await each(closest, collect)
        found.update(self.dht.routing_table.get_peer_ids(), self.host.get_connected_peers())
        found = {peer for peer in found if str(peer) not in known and peer != self.own_id}
        records: dict[str, PeerRecord] = {}

        async def fetch(peer: Any) -> None:
            try:
                peer_id = peer.to_base58()
                public_key_of(peer_id)
            except ValueError:
                return
            key = record_key(self._rule.swarm, peer_id)
            record = await self._fetch(key, self._near(key, peer)) or await self.lookup(peer_id)
            if record is not None:
                records[peer_id] = record

        with trio.move_on_after(FETCH_DEADLINE_S):
            await each(sorted(found, key=ID.to_bytes)[:MAX_CANDIDATES], fetch)
        return [records[peer_id] for peer_id in sorted(records)]

    async def _closest(self, key: bytes, n_wanted: int = BUCKET_SIZE) -> list[Any]:
        """The peers closest to `key` that can be found, closest first."""
        start = self.dht.routing_table.find_local_closest_peers(key, BUCKET_SIZE)
        if len(start) < N_ASKED_AT_ONCE:
            start = [*start, *self.host.get_connected_peers()]
        search = Search(key, map(ID.to_bytes, start), n_wanted=n_wanted)
        request = Message(type=Message.MessageType.FIND_NODE, key=key)

        async def ask_on() -> None:
            while (peer := search.take()) is not None:
                answer = await self._ask(ID(peer), request)
                if answer is None:
                    search.failed(peer)
                else:
                    search.answered(peer, await self.dht.take_in(answer))
                if search.is_done:  # whoever has not answered yet is not waited for
                    scope.cancel()

        with trio.move_on_after(PHASE_DEADLINE_S) as scope:
            await each(range(N_ASKED_AT_ONCE), lambda _: ask_on())
        return [ID(peer) for peer in search.closest()]

    def _near(self, key: str, owner: Any) -> list[Any]:
        """Whom to ask first for a record: connected peers close to the key, and its owner."""
        connected = set(self.host.get_connected_peers())
        closest = self.dht.routing_table.find_local_closest_peers(key.encode(), BUCKET_SIZE)
        near = [peer for peer in closest if peer in connected and peer != owner][:N_NEAR]
        return [*near, owner] if owner in connected else near

    async def _fetch(self, key: str, peers: Iterable[Any]) -> PeerRecord | None:
        """The best record under `key` among what we hold and what `peers` answer.

        `KadDHT.get_value` would answer from our own store for a day, without another look.
        """
        values = self._held(key)
        request = Message(type=Message.MessageType.GET_VALUE, key=key.encode())

        async def collect(peer: Any) -> None:
            answer = await self._ask(peer, request)
            if answer is not None and answer.HasField("record"):
                values.append(answer.record.value)
                if self._rule.best(key, values[-1:]):
                    scope.deadline = min(scope.deadline, trio.current_time() + ENOUGH_S)

        with trio.move_on_after(PHASE_DEADLINE_S) as scope:
            await each(peers, collect)
        best = self._rule.best(key, values)
        return best[1] if best else None

    async def _tell_closest(self, key: bytes, message: Any) -> tuple[list[Any], int]:
        """Have the members closest to a key take something in; who they are, how many took it."""
        holders = (await self._closest(key, N_HOLDERS))[:N_HOLDERS]
        took: list[Any] = []

        async def tell(peer: Any) -> None:
            if await self._ask(peer, message) is not None:
                took.append(peer)

        with trio.move_on_after(PHASE_DEADLINE_S):
            await each(holders, tell)
        return holders, len(took)

    def _held(self, key: str) -> list[bytes]:
        held = self.dht.value_store.get(key.encode())
        return [held.value] if held is not None else []

    async def _ask(self, peer: Any, request: Any) -> Any | None:
        """One question of the Kademlia protocol; None if there is no good answer in time.

        Who asks may be cancelled, the question is not: half a Noise frame on the wire would make
        its connection useless to everybody, and silently so.
        """
        done = trio.Event()
        answers: list[Any | None] = []

        async def ask() -> None:
            try:
                answers.append(await self._exchange(peer, request))
            finally:
                done.set()

        self.swarm.manager.run_task(ask)
        await done.wait()
        return answers[0] if answers else None

    async def _exchange(self, peer: Any, request: Any) -> Any | None:
        """Our own, since `find_providers` and `get_value` answer from what is held here, and store
        foreign provider entries with a new date, so that those of the dead would never expire.
        """
        if peer == self.own_id:
            return None
        try:
            stream = await self.host.new_stream(peer, [PROTOCOL_ID])
        except FAILURES:
            self.dht.routing_table.remove_peer(peer)
            return None
        body = request.SerializeToString()
        answer = Message()
        try:
            with trio.fail_after(ASK_DEADLINE_S):
                await stream.write(varint.encode(len(body)) + body)
                answer.ParseFromString(
                    await read_varint_prefixed_bytes_limited(stream, MAX_ANSWER_BYTES)
                )
        except trio.TooSlowError:
            self.swarm.give_up(peer)
            return None
        except FAILURES:
            return None
        finally:  # `reset`, for `close` would wait for the other side
            with shielded(1.0), suppress(*FAILURES):
                await stream.reset()
        return answer if answer.type == request.type else None

    def _advertise(self, candidates: list[Any]) -> list[Any]:
        """Replace "any address" by those of the interfaces, looked at every 30 s at most."""
        stale_at, texts, result = self._advertised
        now = time.monotonic()
        if now >= stale_at or texts != tuple(map(str, candidates)):
            texts = tuple(map(str, candidates))
            expanded = [address for text in texts for address in dialable(text)]
            result = [Multiaddr(text) for text in expanded]
            self._advertised = (now + 30.0, texts, result)
            self.addresses = tuple(f"{text}/p2p/{self.own_id}" for text in expanded)
        return result


def _quieten() -> None:
    """Keep libp2p's own lines off stderr, unless LIBP2P_DEBUG asked for them.

    It takes its logger out of the tree and gives it no handler, so that every warning, and a
    stranger can cause any number of them, would go to Python's handler of last resort.
    """
    libp2p_logger = logging.getLogger("libp2p")
    if not libp2p_logger.handlers:
        libp2p_logger.addHandler(logging.NullHandler())
    logging.getLogger().addFilter(_is_not_from_libp2p)  # adding it twice does nothing


def _is_not_from_libp2p(record: logging.LogRecord) -> bool:
    """Refuse what `libp2p/network/connection/` logs on the root logger itself."""
    return "libp2p" not in Path(record.pathname).parts
