"""Envelopes: one encoding, bound to author, place, swarm and version."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from covey.store.envelope import (
    FORMAT_VERSION,
    MAX_ENVELOPE_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_SEQUENCE,
    Kind,
    decode,
    encode,
    seal,
)
from covey.store.errors import RejectReason, UpdateRejected
from covey.store.replica import Replica
from support.swarm_keys import SWARM, sealed, verify


def reason_of(data: bytes) -> RejectReason:
    with pytest.raises(UpdateRejected) as caught:
        decode(data)
    return caught.value.reason


def test_the_largest_envelope_fits_its_limit() -> None:
    author = "Q" * 64
    envelope = seal(
        SWARM,
        author,
        MAX_SEQUENCE,
        Kind.SNAPSHOT,
        bytes(MAX_PAYLOAD_BYTES),
        sign=lambda _: bytes(64),
    )
    assert decode(encode(envelope)) == envelope
    assert len(encode(envelope)) <= MAX_ENVELOPE_BYTES


def test_refusals_name_their_reason() -> None:
    good = sealed("alice", 1, b"x")
    assert reason_of(b"") is RejectReason.MALFORMED
    assert reason_of(good[:-1]) is RejectReason.MALFORMED
    assert reason_of(bytes([FORMAT_VERSION + 1]) + good[1:]) is RejectReason.WRONG_VERSION
    assert reason_of(bytes(MAX_ENVELOPE_BYTES + 1)) is RejectReason.TOO_LARGE


def test_a_length_that_the_bytes_only_claim_costs_no_memory() -> None:
    head = bytes([FORMAT_VERSION])
    for claim in (b"\xdd\xff\xff\xff\xff", b"\x95\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        assert reason_of(head + claim) is RejectReason.MALFORMED
    assert reason_of(head + b"\x91" * 100_000) is RejectReason.MALFORMED


def test_a_longer_encoding_of_the_same_envelope_is_refused() -> None:
    good = sealed("alice", 1, b"x")
    fields = msgspec.msgpack.decode(good[1:])
    longer = good.replace(b"\xa5alice", b"\xd9\x05alice")
    assert msgspec.msgpack.decode(longer[1:]) == fields
    assert reason_of(longer) is RejectReason.MALFORMED


@pytest.mark.parametrize("author", ["", "a" * 65, "al ice", "alice\n", "älice"])
def test_an_author_that_cannot_be_a_peer_id_is_refused(author: str) -> None:
    assert reason_of(sealed(author, 1, b"x")) is RejectReason.MALFORMED


def test_the_signature_covers_every_field_and_the_swarm() -> None:
    envelope = decode(sealed("alice", 1, b"x"))
    assert verify("alice", envelope.signature, envelope.signed_bytes(SWARM))
    assert not verify("alice", envelope.signature, envelope.signed_bytes("another"))
    for change in (
        {"author": "bob"},
        {"sequence": 2},
        {"kind": Kind.SNAPSHOT},
        {"payload": b"y"},
    ):
        other = msgspec.structs.replace(envelope, **change)
        assert not verify("alice", envelope.signature, other.signed_bytes(SWARM))


@dataclasses.dataclass(frozen=True)
class RealKeys:
    """Members with Ed25519 keys, as the node has them."""

    public: dict[str, Ed25519PublicKey]

    def verify(self, author: str, signature: bytes, data: bytes) -> bool:
        try:
            self.public[author].verify(signature, data)
        except InvalidSignature:
            return False
        return True


def test_two_replicas_with_ed25519_keys_agree_and_refuse_each_others_pen() -> None:
    private = {name: Ed25519PrivateKey.generate() for name in ("alice", "bob")}
    keys = RealKeys({name: key.public_key() for name, key in private.items()})
    alice, bob = (
        Replica(
            name,
            swarm=SWARM,
            sign=private[name].sign,
            verify=keys.verify,
            is_member=private.__contains__,
            disk=None,
            started_ms=1,
        )
        for name in ("alice", "bob")
    )
    alice.on_local(bob.apply)
    alice.set("a", {"n": 1})
    assert bob.get("alice", "a") == {"n": 1}
    forged = seal(SWARM, "alice", 2, Kind.UPDATE, b"\x00\x00", sign=private["bob"].sign)
    with pytest.raises(UpdateRejected) as caught:
        alice.apply(encode(forged))
    assert caught.value.reason is RejectReason.BAD_SIGNATURE
