"""Peer records: what a member says about itself in the DHT, signed, expiring, one writer each.

Knows no libp2p and no network; `control.py` carries these bytes. A record stands under one key,
derived from the swarm and the writer's peer id; the peer id holds the Ed25519 key that must have
signed it, so nobody else can write there. Of two valid records the one with the higher sequence
wins, the same one everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

import msgspec
from msgspec import Meta

from .errors import TransportError
from .identity import Identity, verify

MAX_RECORD_BYTES = 4096
MAX_ADDRESSES = 16
MAX_RELAYS = 4
MAX_MAPPED = 4
MAX_LIFETIME_S = 30 * 24 * 3600  # a bound, not advice; the DHT itself forgets values after a day

_SIGNED_AS = b"covey peer record 1\0"
_MULTIADDR = re.compile(r"/(ip4|ip6)/([0-9A-Fa-f.:]{2,45})/tcp/([0-9]{1,5})/p2p/([0-9A-Za-z]{52})")

# `\Z`, since `$` would let a trailing newline through.
_PeerIdText = Annotated[str, Meta(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]
_SwarmText = Annotated[str, Meta(pattern=r"^[0-9A-Za-z]{8,64}\Z")]
_AddressText = Annotated[str, Meta(min_length=3, max_length=128)]


class ControlError(TransportError):
    """The control plane cannot do what was asked; the data plane is not affected."""


class RecordRejected(ControlError):
    """A peer record that must not be believed; `.reason` is a short phrase."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"peer record refused: {reason}")
        self.reason = reason


class RecordOutdated(ControlError):
    """A record of ours with a higher sequence is published; `.sequence` is that one's.

    From an earlier life with a clock that was ahead, say: publish with a higher one.
    """

    def __init__(self, sequence: int) -> None:
        super().__init__("a newer record of this node is published: use a higher sequence")
        self.sequence = sequence


def record_key(swarm: str, peer_id: str) -> str:
    """The DHT key of a peer's record, 47 characters.

    A digest, because py-libp2p 0.8.1 resets a FIND_NODE stream for keys longer than 50 bytes: a
    lookup of a longer key never leaves the asking node's own routing table.
    """
    return f"/covey/{hashlib.sha256(f'{swarm}/{peer_id}'.encode()).hexdigest()[:40]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """Where a member can be reached, in its own words."""

    peer_id: _PeerIdText
    swarm: _SwarmText
    addresses: Annotated[tuple[_AddressText, ...], Meta(max_length=MAX_ADDRESSES)]
    """Data plane, "ip:port" with IPv6 in brackets."""
    control_addresses: Annotated[tuple[_AddressText, ...], Meta(max_length=MAX_ADDRESSES)]
    """Multiaddrs of the control plane, /ip4|ip6/.../tcp/.../p2p/<this peer id>."""
    sequence: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    """Grows with every record of this peer, also across restarts."""
    expires_at: Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
    """Unix seconds; from then on nobody may believe it."""
    relays: Annotated[tuple[_PeerIdText, ...], Meta(max_length=MAX_RELAYS)] = ()
    """Members that pass links on to this one, best first. Older versions leave it out, and do not
    read it."""
    is_reachable: bool | None = None
    """Whether others can dial `addresses`, as members found out; None if nobody knows."""
    mapped: Annotated[tuple[_AddressText, ...], Meta(max_length=MAX_MAPPED)] = ()
    """Where a router forwards to it; as `addresses`."""

    def sign(self, private_key: bytes) -> bytes:
        """Encode and sign with the raw 32-byte Ed25519 seed of `peer_id`.

        Raises:
            RecordRejected: a field out of bounds, or the key of another peer.
        """
        signer = Identity(private_key)
        if signer.peer_id != self.peer_id:
            raise RecordRejected("the key is not that of its peer id")
        payload = msgspec.msgpack.encode(self)
        _decode_payload(payload)
        envelope = msgspec.msgpack.encode((payload, signer.sign(_SIGNED_AS + payload)))
        if len(envelope) > MAX_RECORD_BYTES:
            raise RecordRejected(f"{len(envelope)} bytes, at most {MAX_RECORD_BYTES} are allowed")
        return envelope

    @classmethod
    def decode_and_verify(cls, data: bytes, *, swarm: str, now: float) -> PeerRecord:
        """Decode a record of `swarm` that is still good at `now` (unix seconds).

        Raises:
            RecordRejected: too large, malformed, out of bounds, of another swarm, expired or
                meant to live for too long, or not signed by the key of its own peer id.
        """
        if len(data) > MAX_RECORD_BYTES:
            raise RecordRejected(f"{len(data)} bytes, at most {MAX_RECORD_BYTES} are allowed")
        try:
            payload, signature = _ENVELOPE.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RecordRejected("malformed envelope") from error
        record = _decode_payload(payload)
        if record.swarm != swarm:
            raise RecordRejected("it belongs to another swarm")
        if record.expires_at <= now:
            raise RecordRejected("it has expired")
        if record.expires_at > now + MAX_LIFETIME_S:
            raise RecordRejected("it expires too far in the future")
        if not verify(record.peer_id, signature, _SIGNED_AS + payload):
            raise RecordRejected("not signed by the key of its peer id")
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRule:
    """What may stand under a key of the DHT, and which of several values wins."""

    swarm: str
    now: Callable[[], float]
    """Unix seconds."""

    def validate(self, key: str, value: bytes) -> PeerRecord:
        """The record that `value` holds.

        Raises:
            RecordRejected: it may not stand under `key`.
        """
        record = PeerRecord.decode_and_verify(value, swarm=self.swarm, now=self.now())
        if record_key(record.swarm, record.peer_id) != key:
            raise RecordRejected("it is not the record of the peer that the key names")
        return record

    def best(self, key: str, values: Sequence[bytes]) -> tuple[int, PeerRecord] | None:
        """The winner and its index: highest sequence, then latest expiry, then largest bytes.

        Values that may not stand under `key` are passed over; None if that leaves none. Of equal
        values the last one wins, so that a refreshed record counts as new where it is stored.
        """
        ranked: list[tuple[tuple[int, int, bytes, int], PeerRecord]] = []
        for index, value in enumerate(values):
            try:
                record = self.validate(key, value)
            except RecordRejected:
                continue
            ranked.append(((record.sequence, record.expires_at, value, index), record))
        if not ranked:
            return None
        rank, record = max(ranked, key=lambda pair: pair[0])
        return rank[3], record


def _decode_payload(payload: bytes) -> PeerRecord:
    """Decode what was signed, and hold every field to its bounds."""
    try:
        record = _PAYLOAD.decode(payload)
    except msgspec.ValidationError as error:
        raise RecordRejected(str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RecordRejected("malformed payload") from error
    if record.peer_id in record.relays or len(set(record.relays)) != len(record.relays):
        raise RecordRejected("a relay that is its own peer, or named twice")
    for address in (*record.addresses, *record.mapped):
        host, _, port = address.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        _check_endpoint(host[1:-1] if bracketed else host, port, version=6 if bracketed else 4)
    for address in record.control_addresses:
        parts = _MULTIADDR.fullmatch(address)
        if parts is None or parts[4] != record.peer_id:
            raise RecordRejected("a control address that is not /ip/tcp/p2p of its own peer")
        _check_endpoint(parts[2], parts[3], version=4 if parts[1] == "ip4" else 6)
    return record


def _check_endpoint(host: str, port: str, *, version: int) -> None:
    """Refuse what nobody could dial; never a name, which would make readers ask a DNS server."""
    try:
        ip = ip_address(host)
    except ValueError as error:
        raise RecordRejected("an address that is not a literal IP address") from error
    if ip.version != version or ip.is_unspecified or ip.is_multicast:
        raise RecordRejected("an address that cannot be dialled")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise RecordRejected("a port that is not in 1-65535")


_ENVELOPE = msgspec.msgpack.Decoder(
    tuple[bytes, Annotated[bytes, Meta(min_length=64, max_length=64)]]
)
_PAYLOAD = msgspec.msgpack.Decoder(PeerRecord)
