"""libp2p's Kademlia node as Covey wants it: members only, silent unless asked, and forgetful.

Belongs to `control_node.py` and to the trio thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import Validator
from multiaddr import Multiaddr

from .control_lookup import MAX_NAMED
from .control_records import RecordRejected, RecordRule
from .control_swarm import FAILURES, MAX_DIALS
from .identity import public_key_of

PROVIDER_TTL_S = 2 * 3600  # libp2p's own 48 h would have everybody look for the dead for two days
TIDY_S = 60.0
ADDRESS_TTL_S = 24 * 3600  # libp2p's own 120 s forgets how to dial a peer that was quiet


class QuietDht(KadDHT):  # type: ignore[misc]  # libp2p is not followed by mypy
    """libp2p's DHT without what it does of its own accord, and with members only in its table.

    Its main loop looks up a random key of each bucket every ten minutes and publishes the records
    of others anew. Covey's records are published by whom they are of, and lookups keep the table.
    """

    rule: RecordRule

    async def run(self) -> None:
        """Forget what has expired, until cancelled."""
        while True:
            await trio.sleep(TIDY_S)
            self.tidy(time.time())

    def tidy(self, now: float) -> None:
        """Forget the records and provider entries that nobody may believe at `now` any more."""
        values = self.value_store.store
        for key in [key for key, (record, _) in values.items() if not self._is_good(key, record)]:
            del values[key]
        for providers in self.provider_store.providers.values():
            for peer in [p for p, e in providers.items() if e.timestamp < now - PROVIDER_TTL_S]:
                del providers[peer]

    def _is_good(self, key: bytes, record: Any) -> bool:
        try:
            self.rule.validate(key.decode(), record.value)
        except (RecordRejected, UnicodeDecodeError):
            return False
        return True

    async def handle_stream(self, stream: Any) -> None:
        """Answer a peer's questions; its connection is in use."""
        self.host.get_network().used(stream.muxed_conn.peer_id)
        await super().handle_stream(stream)

    async def take_in(self, answer: Any) -> list[bytes]:
        """The peers that an answer names; what it says of their addresses is kept if new.

        Nobody's word counts against what a peer has said of itself: addresses are taken only of
        peers for which there are none, and of these as many as one dial tries.
        """
        named = []
        peers = self.host.get_peerstore()
        for entry in answer.closerPeers[: MAX_NAMED + 1]:
            try:
                peer = ID(entry.id)
                public_key_of(peer.to_base58())
                addresses = [Multiaddr(address) for address in entry.addrs[:MAX_DIALS]]
            except FAILURES:
                continue
            if peer == self.local_peer_id:
                continue
            if addresses and not _addresses(peers, peer):
                peers.add_addrs(peer, addresses, ADDRESS_TTL_S)
            if await self._keep(peer):
                named.append(peer.to_bytes())
        return named

    async def _keep(self, peer: Any) -> bool:
        """Have a peer in the routing table if there is room; whether it can be dialled.

        libp2p's own would ping, and so dial, the oldest of a full bucket each time. Here that
        stays until it is asked something and does not answer.
        """
        addresses = _addresses(self.host.get_peerstore(), peer)
        if not addresses:
            return False
        table = self.routing_table
        bucket = table.find_bucket(peer)
        is_full = bucket.size() >= bucket.bucket_size and not table._should_split_bucket(bucket)
        if bucket.has_peer(peer) or not is_full:
            await table.add_peer(PeerInfo(peer, addresses), skip_server_mode_check=True)
        return True

    async def add_peer(self, peer_id: Any, *, skip_server_mode_check: bool = False) -> bool:
        """Take a peer that serves into the routing table.

        libp2p takes whoever asks it something for a server, and so would look for members that
        nobody can dial. Here it is who said so of itself, or whom we have dialled (`bootstrap`).
        """
        speaks = self.host.get_peerstore().supports_protocols
        try:
            is_server = bool(speaks(peer_id, [str(PROTOCOL_ID)]))
        except FAILURES:
            is_server = False
        return is_server and await self._keep(peer_id)

    def _add_closer_peers_to_response(
        self, response: Any, closest_peers: Sequence[Any], exclude_peer_id: Any = None
    ) -> None:
        """Name peers with their addresses, and leave out their signed records of 200 bytes.

        Whoever dials is told by the handshake whether it is the right peer.
        """
        peers = self.host.get_peerstore()
        for peer in closest_peers:
            if peer == exclude_peer_id:
                continue
            entry = response.closerPeers.add(id=peer.to_bytes())
            with suppress(*FAILURES):
                entry.addrs.extend(address.to_bytes() for address in peers.addrs(peer)[:MAX_DIALS])


class DhtValidator(Validator):  # type: ignore[misc]  # libp2p is not followed by mypy
    """`RecordRule` as libp2p asks for it."""

    def __init__(self, rule: RecordRule) -> None:
        self._rule = rule

    def validate(self, key: str, value: bytes) -> None:
        """Raise RecordRejected if `value` may not stand under `key`."""
        self._rule.validate(key, value)

    def select(self, key: str, values: list[bytes]) -> int:
        """The index of the value that wins."""
        best = self._rule.best(key, values)
        if best is None:
            raise ValueError("none of the values may stand under this key")
        return best[0]


def _addresses(peers: Any, peer: Any) -> list[Any]:
    try:
        return list(peers.addrs(peer))
    except KeyError:  # PeerStoreError derives from it
        return []
