"""Codecs of the store: any bytes are a message or a refusal, and no changed byte gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.store.awareness import Awareness, News, Told
from covey.store.document import Document
from covey.store.envelope import MAX_SEQUENCE, Envelope, Kind, decode, encode
from covey.store.errors import RecordMalformed, UpdateRejected
from covey.store.state_vector import Held, decode_vector, encode_vector
from covey.store.sync import SyncSession, is_summary
from covey.store.values import decode_value, encode_value
from support.swarm_keys import SWARM, is_member, replica_of, sealed, signer, verify

authors = st.text("abcQm1", min_size=1, max_size=64)
SUMMARY = b"\x01\x92\xa7summary\xc4\x10"
any_bytes = st.one_of(
    st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: bytes([1]) + tail)
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=4), json_values, max_size=4)


@given(authors, st.integers(1, MAX_SEQUENCE), st.sampled_from(Kind), st.binary(max_size=300))
def test_an_envelope_comes_back_from_its_encoding(
    author: str, sequence: int, kind: Kind, payload: bytes
) -> None:
    data = sealed(author, sequence, payload, kind=kind)
    envelope = decode(data)
    assert encode(envelope) == data
    fields = (envelope.author, envelope.sequence, envelope.kind, envelope.payload)
    assert fields == (author, sequence, kind, payload)
    assert verify(author, envelope.signature, envelope.signed_bytes(SWARM))


@given(any_bytes)
def test_any_bytes_are_an_envelope_or_refused(data: bytes) -> None:
    try:
        envelope = decode(data)
    except UpdateRejected:
        return
    assert isinstance(envelope, Envelope)
    assert encode(envelope) == data


@given(any_bytes)
def test_any_bytes_leave_a_sync_session_standing(data: bytes) -> None:
    replica = replica_of("alice")
    replica.set("a", {})
    before = replica.state_vector()
    try:
        answers = SyncSession(replica).receive(data)
    except UpdateRejected:
        answers = []
    assert len(answers) <= 2
    assert replica.state_vector() == before


@given(st.one_of(any_bytes, st.binary(min_size=12, max_size=20).map(lambda end: SUMMARY + end)))
def test_what_looks_like_a_summary_is_never_refused(data: bytes) -> None:
    if is_summary(data):
        SyncSession(replica_of("alice")).receive(data)


@given(any_bytes)
def test_any_bytes_are_a_state_vector_or_refused(data: bytes) -> None:
    try:
        held = decode_vector(data)
    except UpdateRejected:
        return
    assert decode_vector(encode_vector(held)) == held


@given(st.dictionaries(authors, st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_state_vector_comes_back_from_its_encoding(rows: dict[str, tuple[int, int]]) -> None:
    held = {author: Held(base, base + more) for author, (base, more) in rows.items()}
    assert decode_vector(encode_vector(held)) == held


@given(any_bytes)
def test_any_bytes_are_a_beat_or_refused(data: bytes) -> None:
    bob = Awareness(
        "bob",
        swarm=SWARM,
        sign=signer("bob"),
        verify=verify,
        is_member=is_member,
        started_ms=0,
    )
    with pytest.raises(UpdateRejected):
        bob.receive(Told(0, data), now=0.0)
    assert bob.rejected.total() == 1


@given(any_bytes)
def test_any_bytes_are_news_of_lives_or_refused(data: bytes) -> None:
    try:
        news = News.decode(data)
    except UpdateRejected:
        return
    assert News.decode(news.encode()) == news


@given(st.data(), st.sampled_from(Kind))
def test_no_changed_envelope_gets_through(data: st.DataObject, kind: Kind) -> None:
    good = sealed("bob", 1, Document().write({"a": b'{"n":1}'}), kind=kind)
    position = data.draw(st.integers(0, len(good) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "insert", "end here"]))
    byte = bytes([data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))])
    bad = {
        "change": good[:position] + byte + good[position + 1 :],
        "cut": good[:position] + good[position + 1 :],
        "insert": good[:position] + byte + good[position:],
        "end here": good[:position],
    }[how]
    alice = replica_of("alice")
    with pytest.raises(UpdateRejected):
        alice.apply(bad)
    assert alice.authors() == []
    assert alice.apply(good).is_new


@given(st.binary(max_size=60))
def test_any_payload_that_is_signed_is_an_update_or_refused(payload: bytes) -> None:
    alice = replica_of("alice")
    try:
        alice.apply(sealed("bob", 1, payload))
    except UpdateRejected:
        assert alice.authors() == []


@given(st.data())
def test_a_damaged_payload_is_refused_or_changes_its_authors_records_only(
    data: st.DataObject,
) -> None:
    document = Document()
    document.write({"a": b'{"n":1}', "b": b"{}"})
    before = document.compacted()[1]
    update = bytearray(document.write({"a": b'{"n":2}', "b": None}))
    for _ in range(data.draw(st.integers(1, 3))):
        update[data.draw(st.integers(0, len(update) - 1))] = data.draw(st.integers(0, 255))
    alice = replica_of("alice")
    alice.set("mine", {})
    alice.apply(sealed("bob", 1, before, kind=Kind.SNAPSHOT))
    try:
        alice.apply(sealed("bob", 2, bytes(update)))
    except UpdateRejected:
        assert alice.get("bob", "a") == {"n": 1}
    assert alice.get("alice", "mine") == {}
    assert all(isinstance(value, dict) for _, _, value in alice.items())


@given(json_objects)
def test_a_value_comes_back_from_its_one_encoding(value: dict[str, object]) -> None:
    data = encode_value(value)
    assert decode_value(data) == value
    assert encode_value(decode_value(data)) == data


@given(
    st.binary(max_size=100) | st.text('{}[]":,0123456789eE+-.tfnul\\ ', max_size=40).map(str.encode)
)
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    try:
        value = decode_value(data)
    except RecordMalformed:
        return
    assert decode_value(encode_value(value)) == value
