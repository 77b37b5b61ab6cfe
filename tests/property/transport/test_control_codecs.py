"""What hostile bytes can do to peer records and mDNS cards: be refused, and nothing else."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from covey.transport.control_mdns import mdns_key, open_card, seal_card
from covey.transport.control_records import PeerRecord, RecordRejected
from covey.transport.identity import Identity

SWARM = "meadow2026"
NOW = 1_800_000_000
OWNER = Identity(bytes(31) + b"\1")
KEY = mdns_key(bytes(32), SWARM)
MULTIADDR = f"/ip4/10.0.0.1/tcp/7071/p2p/{OWNER.peer_id}"

endpoints = st.builds(
    lambda ip, port: f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}",
    st.ip_addresses().filter(lambda ip: not (ip.is_unspecified or ip.is_multicast)),
    st.integers(1, 65535),
)
records = st.builds(
    PeerRecord,
    peer_id=st.just(OWNER.peer_id),
    swarm=st.just(SWARM),
    addresses=st.lists(endpoints, max_size=16).map(tuple),
    control_addresses=st.lists(st.just(MULTIADDR), max_size=16).map(tuple),
    sequence=st.integers(0, (1 << 53) - 1),
    expires_at=st.integers(NOW + 1, NOW + 86400),
)


@given(records)
def test_every_signed_record_comes_back_as_it_was(record: PeerRecord) -> None:
    data = record.sign(OWNER.seed)
    assert PeerRecord.decode_and_verify(data, swarm=SWARM, now=NOW) == record


@given(st.binary(max_size=5000))
def test_any_bytes_are_refused(data: bytes) -> None:
    with suppress(RecordRejected):
        PeerRecord.decode_and_verify(data, swarm=SWARM, now=NOW)
        raise AssertionError("bytes that nobody signed were believed")


@given(records, st.data())
def test_one_changed_byte_is_refused(record: PeerRecord, data: st.DataObject) -> None:
    signed = bytearray(record.sign(OWNER.seed))
    signed[data.draw(st.integers(0, len(signed) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(RecordRejected):
        PeerRecord.decode_and_verify(bytes(signed), swarm=SWARM, now=NOW)
        raise AssertionError("a changed record was believed")


@given(st.dictionaries(st.binary(max_size=3), st.none() | st.binary(max_size=300), max_size=6))
def test_any_mdns_text_is_passed_over(properties: dict[bytes, bytes | None]) -> None:
    assert open_card(KEY, properties) is None


@given(st.integers(1, 8), st.binary(min_size=12, max_size=12))
def test_every_mdns_card_can_be_opened(n_addresses: int, nonce: bytes) -> None:
    addresses = tuple(
        f"/ip4/10.0.0.{index}/tcp/1/p2p/{OWNER.peer_id}" for index in range(n_addresses)
    )
    properties = seal_card(KEY, OWNER.peer_id, addresses, nonce=nonce)
    assert all(len(name) + 1 + len(text) <= 255 for name, text in properties.items())
    assert open_card(KEY, properties) == (OWNER.peer_id, addresses)
