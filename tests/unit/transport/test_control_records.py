"""Peer records: what is believed, what is refused and why, and which of several wins."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from covey.transport.control_records import (
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    PeerRecord,
    RecordRejected,
    RecordRule,
    record_key,
)
from covey.transport.identity import Identity

SWARM = "meadow2026"
NOW = 1_800_000_000
OWNER, STRANGER = Identity(bytes(31) + b"\1"), Identity(bytes(31) + b"\2")
KEY = record_key(SWARM, OWNER.peer_id)
RULE = RecordRule(swarm=SWARM, now=lambda: float(NOW))
RECORD = PeerRecord(
    peer_id=OWNER.peer_id,
    swarm=SWARM,
    addresses=("192.168.1.7:7070", "[fd00::7]:7070"),
    control_addresses=(f"/ip4/192.168.1.7/tcp/7071/p2p/{OWNER.peer_id}",),
    sequence=3,
    expires_at=NOW + 3600,
    relays=(STRANGER.peer_id,),
    is_reachable=False,
)


def verify(data: bytes, *, swarm: str = SWARM, now: float = NOW) -> PeerRecord:
    return PeerRecord.decode_and_verify(data, swarm=swarm, now=now)


def forge(payload: bytes, signer: Identity = OWNER) -> bytes:
    return msgspec.msgpack.encode((payload, signer.sign(b"covey peer record 1\0" + payload)))


def test_a_signed_record_comes_back_as_it_was() -> None:
    assert verify(RECORD.sign(OWNER.seed)) == RECORD


def test_only_the_owner_can_sign() -> None:
    with pytest.raises(RecordRejected, match="not that of its peer id"):
        RECORD.sign(STRANGER.seed)


def test_a_record_signed_by_another_key_is_refused() -> None:
    with pytest.raises(RecordRejected, match="not signed by"):
        verify(forge(msgspec.msgpack.encode(RECORD), STRANGER))


def test_a_record_of_another_swarm_is_refused() -> None:
    with pytest.raises(RecordRejected, match="another swarm"):
        verify(RECORD.sign(OWNER.seed), swarm="meadow2027")


def test_a_record_at_its_very_expiry_is_refused() -> None:
    data = RECORD.sign(OWNER.seed)
    assert verify(data, now=RECORD.expires_at - 1) == RECORD
    with pytest.raises(RecordRejected, match="expired"):
        verify(data, now=RECORD.expires_at)


def test_a_record_that_would_live_too_long_is_refused() -> None:
    with pytest.raises(RecordRejected, match="too far"):
        verify(replace(RECORD, expires_at=NOW + MAX_LIFETIME_S + 1).sign(OWNER.seed))


@pytest.mark.parametrize(
    "change",
    [
        {"peer_id": OWNER.peer_id + "\n"},
        {"peer_id": "Qm" + OWNER.peer_id[2:]},
        {"swarm": "short"},
        {"swarm": "with/slash"},
        {"addresses": ("example.org:7070",)},
        {"addresses": ("192.168.1.7:0",)},
        {"addresses": ("192.168.1.7:65536",)},
        {"addresses": ("192.168.1.7:+70",)},
        {"addresses": ("0.0.0.0:7070",)},
        {"addresses": ("224.0.0.1:7070",)},
        {"addresses": ("fd00::7:7070",)},
        {"addresses": ("[192.168.1.7]:7070",)},
        {"addresses": ("192.168.1.7:7070",) * 17},
        {"control_addresses": ("/ip4/192.168.1.7/tcp/7071",)},
        {"control_addresses": (f"/ip4/192.168.1.7/tcp/7071/p2p/{STRANGER.peer_id}",)},
        {"control_addresses": (f"/ip6/192.168.1.7/tcp/7071/p2p/{OWNER.peer_id}",)},
        {"control_addresses": (f"/dns4/example.org/tcp/7071/p2p/{OWNER.peer_id}",)},
        {"sequence": -1},
        {"sequence": 1 << 53},
        {"sequence": 1.5},
        {"expires_at": "soon"},
        {"relays": ("relay",)},
        {"relays": (STRANGER.peer_id,) * 2},
        {"relays": (OWNER.peer_id,)},
        {"relays": tuple(Identity(bytes(31) + bytes([n])).peer_id for n in range(10, 15))},
        {"is_reachable": "perhaps"},
    ],
)
def test_a_field_out_of_bounds_is_refused_when_signed_and_when_read(
    change: dict[str, object],
) -> None:
    record = replace(RECORD, **change)  # type: ignore[arg-type]
    with pytest.raises(RecordRejected):
        record.sign(OWNER.seed)
    with pytest.raises(RecordRejected):
        verify(forge(msgspec.msgpack.encode(record)))


def test_versions_that_know_of_no_relays_and_those_that_do_understand_each_other() -> None:
    fields = msgspec.to_builtins(RECORD)
    of_old = {name: fields[name] for name in fields if name not in ("relays", "is_reachable")}
    record = verify(forge(msgspec.msgpack.encode(of_old)))
    assert (record.relays, record.is_reachable) == ((), None)
    of_new = fields | {"colour": "blue"}
    assert verify(forge(msgspec.msgpack.encode(of_new))) == RECORD


def test_one_byte_too_many_is_refused_unread() -> None:
    with pytest.raises(RecordRejected, match="at most"):
        verify(bytes(MAX_RECORD_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RecordRejected):
        verify(b"\x91" * (MAX_RECORD_BYTES - 1))
    nested = b"\x81\xa1x" + b"\x91" * 3000  # an unknown field, which a decoder skips
    with pytest.raises(RecordRejected):
        verify(forge(nested))


def test_the_fullest_record_fits() -> None:
    longest = "[1111:2222:3333:4444:5555:6666:7777:{:04x}]:65535"
    record = replace(
        RECORD,
        swarm="s" * 64,
        addresses=tuple(longest.format(index) for index in range(16)),
        control_addresses=tuple(
            f"/ip6/1111:2222:3333:4444:5555:6666:7777:{index:04x}/tcp/65535/p2p/{OWNER.peer_id}"
            for index in range(16)
        ),
    )
    assert verify(record.sign(OWNER.seed), swarm="s" * 64) == record


def test_a_key_is_short_enough_for_libp2p_to_route() -> None:
    assert len(record_key("s" * 64, OWNER.peer_id)) <= 50
    assert record_key(SWARM, OWNER.peer_id) != record_key(SWARM, STRANGER.peer_id)


def test_the_higher_sequence_wins_in_either_order() -> None:
    old, new = RECORD.sign(OWNER.seed), replace(RECORD, sequence=4).sign(OWNER.seed)
    best = RULE.best(KEY, [old, new])
    assert best is not None
    assert best == (1, replace(RECORD, sequence=4))
    assert RULE.best(KEY, [new, old]) == (0, best[1])


def test_of_equal_values_the_last_one_wins() -> None:
    data = RECORD.sign(OWNER.seed)
    assert RULE.best(KEY, [data, data]) == (1, RECORD)


def test_an_expired_record_loses_to_a_valid_one_of_lower_sequence() -> None:
    expired = replace(RECORD, sequence=9, expires_at=NOW).sign(OWNER.seed)
    assert RULE.best(KEY, [RECORD.sign(OWNER.seed), expired]) == (0, RECORD)


def test_nothing_wins_where_nothing_is_valid() -> None:
    assert RULE.best(KEY, [b"", b"\xc0"]) is None


def test_a_valid_record_under_another_peers_key_is_refused() -> None:
    with pytest.raises(RecordRejected, match="the key names"):
        RULE.validate(record_key(SWARM, STRANGER.peer_id), RECORD.sign(OWNER.seed))
