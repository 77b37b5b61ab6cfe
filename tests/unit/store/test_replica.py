"""Replicas: writing, exchanging, refusing, forgetting."""

from __future__ import annotations

import contextlib

import pytest

from covey.store.author_log import MAX_LOG_ENVELOPES, MAX_WAITING_ENVELOPES
from covey.store.document import Document
from covey.store.envelope import Kind, decode
from covey.store.errors import RejectReason, UpdateRejected
from covey.store.replica import COMPACT_AFTER_ENVELOPES, Applied, Replica
from covey.store.state_vector import Held, decode_vector, encode_vector
from support.swarm_keys import SWARM, recorded, replica_of, sealed, signer, verify


def refusal(replica: Replica, data: bytes) -> RejectReason:
    """Why the replica refuses the bytes; also checks that it counts them and stays as it is."""
    before = replica.state_vector(), list(replica.items()), replica.rejected.total()
    with pytest.raises(UpdateRejected) as caught:
        replica.apply(data)
    after = replica.state_vector(), list(replica.items()), replica.rejected.total() - 1
    assert after == before
    return caught.value.reason


def written(author: str, n_envelopes: int) -> list[bytes]:
    """Envelopes 1..n of a replica that counts up one key."""
    replica = replica_of(author)
    envelopes = recorded(replica)
    for n in range(1, n_envelopes + 1):
        replica.set("n", {"n": n})
    return envelopes


def test_a_value_is_the_readers_own_copy_with_its_types() -> None:
    alice = replica_of("alice")
    alice.set("a", {"n": 1, "list": [1.0, "x"]})
    got = alice.get("alice", "a")
    assert got == {"n": 1, "list": [1.0, "x"]}
    assert type(got["n"]) is int
    got["n"] = 2
    assert alice.get("alice", "a") == {"n": 1, "list": [1.0, "x"]}
    assert alice.get("alice", "b") is None
    assert alice.get("nobody", "a") is None


def test_items_are_sorted_by_author_then_key() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    bob.on_local(alice.apply)
    bob.set("p/1", {})
    for key in ("p/2", "p/10", "q"):
        alice.set(key, {})
    places = [(author, key) for author, key, _ in alice.items("p/")]
    assert places == [("alice", "p/10"), ("alice", "p/2"), ("bob", "p/1")]


def test_an_edit_is_one_envelope_and_one_event() -> None:
    alice, events = replica_of("alice"), []
    envelopes = recorded(alice)
    alice.set("old", {})
    alice.subscribe(lambda author, keys: events.append((author, keys)))
    with alice.edit() as edit:
        edit.set("a", {"n": 1})
        edit.set("b", {"n": 2})
        edit.delete("old")
        edit.delete("never there")
    assert len(envelopes) == 2
    assert events == [("alice", frozenset({"a", "b", "old"}))]
    assert [key for _, key, _ in alice.items()] == ["a", "b"]


def test_an_edit_that_raises_writes_nothing() -> None:
    alice = replica_of("alice")
    with contextlib.suppress(ZeroDivisionError), alice.edit() as edit:
        edit.set("a", {})
        edit.set("b", {"n": 1 // 0})
    assert alice.authors() == []


@pytest.mark.parametrize("key", ["", "not a key", "é"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        replica_of("alice").set(key, {})


def test_writing_what_is_there_already_makes_no_envelope() -> None:
    alice = replica_of("alice")
    envelopes = recorded(alice)
    alice.set("a", {"x": 1, "y": 2})
    alice.set("a", {"y": 2, "x": 1})
    alice.delete("b")
    assert len(envelopes) == 1


def test_listeners_end_when_told() -> None:
    alice = replica_of("alice")
    envelopes: list[bytes] = []
    events: list[frozenset[str]] = []
    stop_local = alice.on_local(envelopes.append)
    stop_events = alice.subscribe(lambda _author, keys: events.append(keys))
    alice.set("a", {"n": 1})
    stop_local()
    stop_events()
    alice.set("a", {"n": 2})
    assert (len(envelopes), len(events)) == (1, 1)


def test_a_duplicate_is_no_error_and_no_news() -> None:
    (data,) = written("bob", 1)
    alice = replica_of("alice")
    new, again = alice.apply(data), alice.apply(data)
    assert new == Applied(author="bob", is_new=True, changed=frozenset({"n"}))
    assert again == Applied(author="bob", is_new=False)
    assert not alice.rejected


def test_another_envelope_for_a_number_already_seen_is_refused() -> None:
    alice = replica_of("alice")
    alice.apply(written("bob", 1)[0])
    other = sealed("bob", 1, Document().write({"n": b'{"n":"other"}'}))
    assert refusal(alice, other) is RejectReason.REPLAYED


def test_strangers_and_forgers_are_refused() -> None:
    alice = replica_of("alice")
    payload = Document().write({"a": b"{}"})
    assert refusal(alice, sealed("mallory", 1, payload)) is RejectReason.UNKNOWN_AUTHOR
    assert refusal(alice, sealed("bob", 1, payload, swarm="other")) is RejectReason.BAD_SIGNATURE
    assert refusal(alice, b"\x01junk") is RejectReason.MALFORMED
    assert refusal(alice, sealed("bob", 1, b"junk")) is RejectReason.UNREADABLE
    assert alice.authors() == []


def test_early_envelopes_wait_and_then_apply_together() -> None:
    one, two, three = written("bob", 3)
    alice, events = replica_of("alice"), []
    alice.subscribe(lambda author, keys: events.append((author, keys)))
    assert alice.apply(three) == Applied(author="bob", is_new=True)
    assert alice.apply(two) == Applied(author="bob", is_new=True)
    assert alice.apply(two) == Applied(author="bob", is_new=False)
    assert alice.authors() == []
    alice.apply(one)
    assert alice.get("bob", "n") == {"n": 3}
    assert events == [("bob", frozenset({"n"}))]


def test_the_buffer_of_early_envelopes_keeps_the_earliest() -> None:
    envelopes = written("bob", MAX_WAITING_ENVELOPES + 3)
    alice = replica_of("alice")
    accepted = [alice.apply(data).is_new for data in reversed(envelopes[1:])]
    assert all(accepted)
    assert not alice.apply(envelopes[-1]).is_new  # dropped to make room, and no room for it
    alice.apply(envelopes[0])
    assert alice.get("bob", "n") == {"n": MAX_WAITING_ENVELOPES + 1}


def test_two_envelopes_that_wait_for_one_place_cannot_both() -> None:
    alice = replica_of("alice")
    alice.apply(written("bob", 2)[1])
    other = sealed("bob", 2, b"\x00\x00")
    assert refusal(alice, other) is RejectReason.REPLAYED


def test_an_unreadable_envelope_that_waited_does_not_harm_the_one_before() -> None:
    alice = replica_of("alice")
    alice.apply(sealed("bob", 2, b"junk"))
    assert alice.apply(written("bob", 1)[0]).changed == {"n"}
    assert alice.rejected == {RejectReason.UNREADABLE: 1}


def test_a_snapshot_replaces_the_log_and_needs_nothing_before_it() -> None:
    bob = replica_of("bob")
    envelopes = recorded(bob)
    for n in range(5):
        bob.set("n", {"n": n})
    bob.set("gone", {})
    bob.delete("gone")
    bob.compact()
    bob.set("after", {})
    behind, fresh = replica_of("alice"), replica_of("carol")
    for data in envelopes[:6]:
        behind.apply(data)
    assert behind.apply(envelopes[7]).changed == {"gone"}
    for data in envelopes[7:]:
        fresh.apply(data)
    behind.apply(envelopes[8])
    assert list(behind.items()) == list(fresh.items()) == list(bob.items())
    assert behind.state_vector() == fresh.state_vector() == bob.state_vector()
    assert decode_vector(bob.state_vector()) == {"bob": Held(base=8, last=9)}
    assert not fresh.apply(envelopes[0]).is_new  # superseded: late, not wrong


def test_a_snapshot_makes_room_where_what_it_replaces_waited() -> None:
    envelopes = written("bob", MAX_WAITING_ENVELOPES + 1)
    alice = replica_of("alice")
    for data in envelopes[1:]:
        alice.apply(data)
    alice.apply(sealed("bob", 100, b"\x00\x00", kind=Kind.SNAPSHOT))
    assert alice.apply(sealed("bob", 102, b"\x00\x00")).is_new
    alice.apply(sealed("bob", 101, b"\x00\x00"))
    assert decode_vector(alice.state_vector()) == {"bob": Held(base=100, last=102)}


def test_compacting_twice_makes_one_snapshot() -> None:
    alice = replica_of("alice")
    envelopes = recorded(alice)
    alice.compact()
    assert envelopes == []
    for n in range(2):
        alice.set("a", {"n": n})
    alice.compact()
    alice.compact()
    kinds = [decode(data).kind for data in envelopes]
    assert kinds == [Kind.SNAPSHOT, Kind.UPDATE, Kind.SNAPSHOT]


@pytest.mark.parametrize("n_writes", [2_000, pytest.param(10_000, marks=pytest.mark.lab)])
def test_thousands_of_overwrites_leave_a_short_log_everywhere(n_writes: int) -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.on_local(bob.apply)
    for n in range(n_writes):
        alice.set(f"key{n % 100}", {"n": n})
    for replica in (alice, bob):
        everything = replica.missing_for(encode_vector({}), max_bytes=2**30)
        assert len(everything) <= COMPACT_AFTER_ENVELOPES
        assert sum(map(len, everything)) < 150_000
    assert list(alice.items()) == list(bob.items())
    assert len(list(alice.items())) == 100


def test_large_records_are_compacted_by_size() -> None:
    alice = replica_of("alice")
    envelopes = recorded(alice)
    for n in range(40):
        alice.set("large", {"n": n, "text": "x" * 60_000})
    held = alice.missing_for(encode_vector({}), max_bytes=2**30)
    assert sum(map(len, held)) < 500_000
    assert sum(decode(data).kind is Kind.SNAPSHOT for data in envelopes) in range(4, 12)


def test_an_author_that_never_compacts_fills_its_own_log_only() -> None:
    alice = replica_of("alice")
    for sequence in range(1, MAX_LOG_ENVELOPES + 1):
        alice.apply(sealed("bob", sequence, b"\x00\x00"))
    beyond = sealed("bob", MAX_LOG_ENVELOPES + 1, b"\x00\x00")
    assert refusal(alice, beyond) is RejectReason.TOO_LARGE
    alice.apply(written("carol", 1)[0])
    snapshot = Document().write({"a": b"{}"})
    alice.apply(sealed("bob", MAX_LOG_ENVELOPES + 2, snapshot, kind=Kind.SNAPSHOT))
    assert alice.get("bob", "a") == {}


def test_missing_for_sends_the_rest_from_where_the_other_is() -> None:
    bob = replica_of("bob")
    envelopes = recorded(bob)
    for n in range(4):
        bob.set("n", {"n": n})
    assert bob.missing_for(encode_vector({"bob": Held(0, 2)}), max_bytes=9999) == envelopes[2:]
    assert bob.missing_for(encode_vector({"bob": Held(0, 4)}), max_bytes=9999) == []
    assert bob.missing_for(encode_vector({"bob": Held(9, 9)}), max_bytes=9999) == []
    assert (
        bob.missing_for(encode_vector({}), max_bytes=len(envelopes[0] + envelopes[1]))
        == envelopes[:2]
    )
    assert bob.missing_for(encode_vector({}), max_bytes=1) == envelopes[:1]
    bob.compact()
    assert bob.missing_for(encode_vector({"bob": Held(0, 2)}), max_bytes=9999) == envelopes[4:]


def test_authors_take_turns_so_that_none_starves() -> None:
    alice = replica_of("alice")
    for author in ("bob", "carol"):
        for data in written(author, 3):
            alice.apply(data)
    nothing = encode_vector({})
    authors = [decode(data).author for data in alice.missing_for(nothing, max_bytes=9999)]
    assert authors == ["bob", "carol"] * 3
    (first,) = alice.missing_for(nothing, max_bytes=1, turn=1)
    assert decode(first).author == "carol"


@pytest.mark.parametrize(
    "vector",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",
        encode_vector({"bob": Held(base=2, last=1)}),
        encode_vector({"b b": Held(0, 1)}),
        encode_vector({"bob": Held(0, -1)}),
        encode_vector({"bob": Held(0, 2**60)}),
        b"\x92\x93\xa1b\x00\x01\x93\xa1a\x00\x01",
        b"\x92\x93\xa1a\x00\x01\x93\xa1a\x00\x01",
        bytes(200_000),
    ],
)
def test_hostile_vectors_are_refused(vector: bytes) -> None:
    with pytest.raises(UpdateRejected):
        replica_of("alice").missing_for(vector, max_bytes=9999)
    with pytest.raises(UpdateRejected):
        replica_of("alice").lacks(vector)


def test_lacks_looks_at_members_only() -> None:
    alice = replica_of("alice")
    assert alice.lacks(encode_vector({"bob": Held(0, 1)}))
    assert not alice.lacks(encode_vector({"mallory": Held(0, 1)}))
    alice.apply(written("bob", 1)[0])
    assert not alice.lacks(encode_vector({"bob": Held(0, 1)}))


def test_a_forgotten_author_is_gone_and_no_longer_passed_on() -> None:
    members = {"bob", "carol"}
    alice = Replica(
        "alice",
        swarm=SWARM,
        sign=signer("alice"),
        verify=verify,
        is_member=members.__contains__,
        disk=None,
        started_ms=1,
    )
    events: list[tuple[str, frozenset[str]]] = []
    (data,) = written("bob", 1)
    alice.apply(data)
    alice.subscribe(lambda author, keys: events.append((author, keys)))
    members.remove("bob")
    assert alice.missing_for(encode_vector({}), max_bytes=9999) == []
    alice.forget("bob")
    alice.forget("bob")
    assert events == [("bob", frozenset({"n"}))]
    assert list(alice.items()) == []
    assert refusal(alice, data) is RejectReason.UNKNOWN_AUTHOR
    with pytest.raises(ValueError, match="forget itself"):
        alice.forget("alice")


def test_a_node_that_lost_its_store_takes_its_records_back_before_it_writes() -> None:
    old, bob = replica_of("alice"), replica_of("bob")
    old.on_local(bob.apply)
    old.set("a", {"n": 1})
    old.set("a", {"n": 2})
    new = replica_of("alice", started_ms=1000)
    new.on_local(bob.apply)
    for data in bob.missing_for(new.state_vector(), max_bytes=9999):
        new.apply(data)
    new.set("b", {})
    assert list(bob.items()) == [("alice", "a", {"n": 2}), ("alice", "b", {})]
    assert not bob.rejected


def test_a_node_that_lost_its_store_and_wrote_at_once_does_not_use_its_numbers_again() -> None:
    past, bob = written("alice", 3), replica_of("bob")
    for data in past:
        bob.apply(data)
    new = replica_of("alice", started_ms=1000)
    new.on_local(bob.apply)
    new.set("fresh", {"n": 1})
    new.set("fresh", {"n": 2})
    assert list(bob.items()) == [("alice", "fresh", {"n": 2})]
    assert decode_vector(bob.state_vector()) == {"alice": Held(base=1000, last=1001)}
    assert not any(new.apply(data).is_new for data in past)
    assert not new.rejected


def test_even_with_a_wrong_clock_the_present_wins_once_the_past_is_known() -> None:
    past, bob = written("alice", 3), replica_of("bob")
    new = replica_of("alice", started_ms=0)
    envelopes = recorded(new)
    new.set("fresh", {})
    for data in past:
        bob.apply(data)
        assert not new.apply(data).is_new
    assert bob.apply(envelopes[-1]).changed == {"fresh", "n"}
    new.set("more", {})
    bob.apply(envelopes[-1])
    assert list(bob.items()) == list(new.items())


def test_the_first_write_goes_on_after_a_past_that_still_waits_for_its_beginning() -> None:
    new = replica_of("alice", started_ms=0)
    new.apply(written("alice", 3)[2])
    envelopes = recorded(new)
    new.set("fresh", {})
    assert [decode(data).sequence for data in envelopes] == [4]
