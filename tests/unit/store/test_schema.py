"""Records: what goes out comes back, and nothing out of bounds gets in."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from covey.store.errors import RecordMalformed
from covey.store.schema import (
    MAX_EXPERIENCES,
    BlobEntry,
    Experience,
    IndexCache,
    MemberCard,
    ModelManifest,
    PlanRecord,
    PrefixEntry,
    ProfileRecord,
    Ready,
    Record,
    Seen,
)
from covey.store.values import MAX_VALUE_BYTES, decode_value, encode_value

DIGEST = "0f" * 32
CARD = MemberCard(
    peer_id="alice",
    name="Alice's Pi 5",
    addresses=("192.168.1.7:4001", "[2001:db8::1]:4001", "[fe80::1%eth0]:4001"),
    control_addresses=("/ip4/192.168.1.7/tcp/4002/p2p/alice",),
    models=(DIGEST,),
    max_blocks=None,
    memory_bytes=2**33,
    version="0.1.0",
    started_at=1_760_000_000.5,
    relays=("bob", "carol"),
    is_reachable=False,
)
MANIFEST = ModelManifest(
    name="SmolLM2-135M-Instruct",
    digest=DIGEST,
    architecture="llama",
    n_blocks=30,
    hidden_size=576,
    vocab_size=49152,
    context_length=8192,
    blobs=(BlobEntry("blk.0", 123, DIGEST), BlobEntry("head", 456, DIGEST)),
)
PLAN = PlanRecord(plan={"stages": [1, 2.5]}, digest=DIGEST, model="ab" * 8, epoch=3, proposer="bob")
READY = Ready(plan_digest=DIGEST, stage_idx=0, at=5)
DEVICE = ProfileRecord(kind="device", value={"cores": 4})
LINK = ProfileRecord(kind="link", value={"rtt_s": 0.001}, peer="bob")
SEEN = Seen(decode_s_per_block=0.01, n_sessions=3, at=5.0)
EXPERIENCE = Experience(model=DIGEST, peers={"bob": SEEN})
INDEX = IndexCache(
    model=DIGEST,
    pattern="FSSF",
    calibration=DIGEST,
    prefixes=(PrefixEntry(prefix_digest=DIGEST, n_tokens=17, span=(0, 4)),),
)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        (CARD, "member"),
        (MANIFEST, f"manifest/{DIGEST}"),
        (PLAN, f"plan/{'ab' * 8}/{DIGEST}"),
        (READY, f"ready/{DIGEST}/0"),
        (DEVICE, "profile/device"),
        (LINK, "profile/link/bob"),
        (EXPERIENCE, f"experience/{DIGEST}"),
        (INDEX, f"index/{DIGEST}"),
    ],
)
def test_a_record_comes_back_from_the_store_as_it_went_in(record: Record, key: str) -> None:
    stored = decode_value(encode_value(record.to_value()))
    assert type(record).from_value(stored) == record
    assert record.key == key
    assert type(record).from_value({**stored, "of_a_newer_version": 1}) == record


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (CARD, {"peer_id": "not an id"}),
        (CARD, {"name": ""}),
        (CARD, {"addresses": ("192.168.1.7",)}),
        (CARD, {"addresses": ("192.168.1.7:0",)}),
        (CARD, {"addresses": ("192.168.1.7:65536",)}),
        (CARD, {"addresses": ("2001:db8::1:4001",)}),
        (CARD, {"addresses": ("[192.168.1.7]:1",)}),
        (CARD, {"addresses": ("host.example:1",)}),
        (CARD, {"addresses": ("10.0.0.1:1",) * 33}),
        (CARD, {"models": ("not hex",)}),
        (CARD, {"max_blocks": -1}),
        (CARD, {"memory_bytes": 2**60}),
        (CARD, {"started_at": -1.0}),
        (MANIFEST, {"n_blocks": 0}),
        (MANIFEST, {"blobs": ()}),
        (MANIFEST, {"blobs": (BlobEntry("a", 1, DIGEST),) * 2}),
        (MANIFEST, {"blobs": (BlobEntry("a", -1, DIGEST),)}),
        (MANIFEST, {"blobs": (BlobEntry("a", 1, "0f"),)}),
        (PLAN, {"epoch": -1}),
        (PLAN, {"plan": ["no", "object"]}),
        (READY, {"stage_idx": -1}),
        (READY, {"at": "now"}),
        (DEVICE, {"kind": "other"}),
        (DEVICE, {"peer": "bob"}),
        (LINK, {"peer": None}),
        *(
            (EXPERIENCE, {"peers": {"bob": {**msgspec.to_builtins(SEEN), **change}}})
            for change in (
                {"decode_s_per_block": math.nan},
                {"decode_s_per_block": math.inf},
                {"decode_s_per_block": -1.0},
                {"decode_s_per_block": 0.0},
                {"decode_s_per_block": 1e-300},
                {"n_sessions": 0},
                {"at": math.nan},
            )
        ),
        (EXPERIENCE, {"peers": {"not an id": SEEN}}),
        (EXPERIENCE, {"peers": {f"peer{n}": SEEN for n in range(MAX_EXPERIENCES + 1)}}),
        (INDEX, {"pattern": "SF"}),
        (INDEX, {"pattern": "FX"}),
        (INDEX, {"pattern": "F" * 1025}),
        (INDEX, {"prefixes": ({"prefix_digest": DIGEST, "n_tokens": 1, "span": [4, 4]},)}),
        (INDEX, {"prefixes": ({"prefix_digest": DIGEST, "n_tokens": 0, "span": [0, 4]},)}),
    ],
)
def test_a_field_out_of_bounds_is_refused(record: Record, change: dict[str, Any]) -> None:
    value = {**msgspec.to_builtins(record), **msgspec.to_builtins(change)}
    with pytest.raises(RecordMalformed):
        type(record).from_value(value)


@pytest.mark.parametrize("value", [None, 1, "text", [], {}, {"peer_id": "alice"}])
def test_another_shape_is_refused(value: object) -> None:
    with pytest.raises(RecordMalformed):
        MemberCard.from_value(value)


@pytest.mark.parametrize(
    "relays", [["alice"], ["bob", "bob"], ["a", "b", "c", "d", "e"], ["b o b"]]
)
def test_relays_are_up_to_four_other_members(relays: list[str]) -> None:
    with pytest.raises(RecordMalformed):
        MemberCard.from_value(CARD.to_value() | {"relays": relays})


def test_a_card_of_a_version_without_relays_is_read() -> None:
    value = CARD.to_value()
    del value["relays"], value["is_reachable"]
    card = MemberCard.from_value(value)
    assert (card.relays, card.is_reachable) == ((), None)


def test_our_own_record_out_of_bounds_does_not_leave() -> None:
    with pytest.raises(RecordMalformed):
        msgspec.structs.replace(MANIFEST, n_blocks=0).to_value()


def test_the_manifest_of_a_model_with_many_blobs_fits() -> None:
    blobs = tuple(BlobEntry(f"blk.{i}.weights", 123_456_789, DIGEST) for i in range(512))
    manifest = msgspec.structs.replace(MANIFEST, blobs=blobs)
    assert len(encode_value(manifest.to_value())) < MAX_VALUE_BYTES
