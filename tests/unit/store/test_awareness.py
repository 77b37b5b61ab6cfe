"""Awareness: who is alive, told by signed beats with a TTL."""

from __future__ import annotations

import pytest

from covey.store.awareness import MAX_BEAT_BYTES, Awareness
from covey.store.errors import RejectReason, StoreFull, UpdateRejected
from support.swarm_keys import SWARM, is_member, signer, verify


def awareness_of(author: str, *, swarm: str = SWARM, started_ms: int = 1000) -> Awareness:
    return Awareness(
        author,
        swarm=swarm,
        sign=signer(author),
        verify=verify,
        is_member=is_member,
        ttl_s=5.0,
        started_ms=started_ms,
    )


def test_a_peer_is_alive_until_its_ttl_after_the_last_beat() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    assert bob.receive(alice.beat(0.0, {"load": 1}), now=100.0)
    assert bob.receive(alice.beat(0.0, {"load": 2}), now=103.0)
    assert bob.next_deadline() == 108.0
    assert bob.live(107.9) == {"alice": {"load": 2}}
    assert bob.live(108.0) == {}
    assert bob.expire(107.9) == []
    assert bob.expire(108.0) == ["alice"]
    assert bob.expire(108.0) == []
    assert bob.next_deadline() is None


def test_the_next_deadline_is_that_of_the_longest_silent() -> None:
    alice, bob, carol = map(awareness_of, ("alice", "bob", "carol"))
    carol.receive(alice.beat(0.0, {}), now=0.0)
    carol.receive(bob.beat(0.0, {}), now=1.0)
    carol.receive(alice.beat(0.0, {}), now=2.0)
    assert carol.next_deadline() == 6.0
    assert carol.expire(now=100.0) == ["bob", "alice"]


def test_a_node_counts_itself_alive_while_it_beats() -> None:
    alice = awareness_of("alice")
    assert alice.live(0.0) == {}
    own = alice.beat(10.0, {"x": 1})
    assert alice.live(14.9) == {"alice": {"x": 1}}
    assert alice.live(15.0) == {}
    assert alice.expire(15.0) == []
    assert not alice.receive(own, now=15.0)


def test_old_beats_are_no_news_and_raise_nobody_from_the_dead() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    first, second = alice.beat(0.0, {"n": 1}), alice.beat(0.0, {"n": 2})
    assert bob.receive(second, now=0.0)
    assert not bob.receive(second, now=1.0)
    assert not bob.rejected
    assert not bob.receive(first, now=1.0)
    assert bob.rejected == {RejectReason.REPLAYED: 1}
    assert bob.next_deadline() == 5.0
    assert bob.expire(5.0) == ["alice"]
    assert not bob.receive(second, now=6.0)
    assert bob.live(6.0) == {}


def test_a_restarted_peer_is_heard_at_once() -> None:
    bob = awareness_of("bob")
    bob.receive(awareness_of("alice", started_ms=1000).beat(0.0, {}), now=0.0)
    assert bob.receive(awareness_of("alice", started_ms=2000).beat(0.0, {}), now=1.0)


def test_forged_beats_are_refused_and_counted() -> None:
    bob = awareness_of("bob")
    good = awareness_of("alice").beat(0.0, {"a": 1})
    bad = {
        RejectReason.MALFORMED: good + b"x",
        RejectReason.WRONG_VERSION: b"\x07" + good[1:],
        RejectReason.TOO_LARGE: bytes(MAX_BEAT_BYTES + 1),
        RejectReason.UNKNOWN_AUTHOR: awareness_of("mallory").beat(0.0, {}),
        RejectReason.BAD_SIGNATURE: awareness_of("alice", swarm="other").beat(0.0, {}),
    }
    for reason, data in bad.items():
        with pytest.raises(UpdateRejected) as caught:
            bob.receive(data, now=0.0)
        assert caught.value.reason is reason
    assert bob.rejected == dict.fromkeys(bad, 1)
    assert bob.live(0.0) == {}


def test_a_signed_state_that_is_no_json_is_refused() -> None:
    beats: list[bytes] = []

    def sign_other_state(data: bytes) -> bytes:
        beats.append(data.replace(b'{"a":1}', b'["a":1]'))
        return signer("alice")(beats[-1])

    alice = Awareness(
        "alice",
        swarm=SWARM,
        sign=sign_other_state,
        verify=verify,
        is_member=is_member,
        ttl_s=5.0,
        started_ms=0,
    )
    data = alice.beat(0.0, {"a": 1}).replace(b'{"a":1}', b'["a":1]')
    with pytest.raises(UpdateRejected) as caught:
        awareness_of("bob").receive(data, now=0.0)
    assert caught.value.reason is RejectReason.UNREADABLE


def test_a_state_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(StoreFull):
        awareness_of("alice").beat(0.0, {"a": "x" * 2000})


def test_a_forgotten_peer_is_gone_at_once() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}), now=0.0)
    bob.forget("alice")
    bob.forget("nobody")
    assert bob.live(0.0) == {}
    assert bob.next_deadline() is None


def test_the_largest_beat_fits_its_limit() -> None:
    state = {"a": "x" * 1016}
    alice = Awareness(
        "Q" * 64,
        swarm=SWARM,
        sign=signer("alice"),
        verify=verify,
        is_member=is_member,
        ttl_s=5.0,
        started_ms=2**53 - 1,
    )
    assert len(alice.beat(0.0, state)) <= MAX_BEAT_BYTES
