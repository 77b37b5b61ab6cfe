"""Awareness: who is alive, told by signed beats with a TTL."""

from __future__ import annotations

import pytest

from covey.store.awareness import (
    MAX_BEAT_BYTES,
    MAX_NEWS_BYTES,
    Awareness,
    News,
    Suspicion,
    Told,
)
from covey.store.errors import RejectReason, StoreFull, UpdateRejected
from support.swarm_keys import SWARM, is_member, signer, verify


def awareness_of(author: str, *, swarm: str = SWARM, started_ms: int = 1000) -> Awareness:
    return Awareness(
        author,
        swarm=swarm,
        sign=signer(author),
        verify=verify,
        is_member=is_member,
        started_ms=started_ms,
    )


def test_a_peer_is_alive_until_its_ttl_after_the_last_beat() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    assert bob.receive(alice.beat(0.0, {"load": 1}, ttl_s=5), now=100.0)
    assert bob.receive(alice.beat(0.0, {"load": 2}, ttl_s=5), now=103.0)
    assert bob.next_deadline() == 108.0
    assert bob.live(107.9) == {"alice": {"load": 2}}
    assert bob.live(108.0) == {}
    assert bob.expire(107.9) == []
    assert bob.expire(108.0) == ["alice"]
    assert bob.expire(108.0) == []
    assert bob.next_deadline() is None


def test_the_next_deadline_is_that_of_the_longest_silent() -> None:
    alice, bob, carol = map(awareness_of, ("alice", "bob", "carol"))
    carol.receive(alice.beat(0.0, {}, ttl_s=5), now=0.0)
    carol.receive(bob.beat(0.0, {}, ttl_s=5), now=1.0)
    carol.receive(alice.beat(0.0, {}, ttl_s=5), now=2.0)
    assert carol.next_deadline() == 6.0
    assert carol.expire(now=100.0) == ["bob", "alice"]


def test_a_node_counts_itself_alive_while_it_beats() -> None:
    alice = awareness_of("alice")
    assert alice.live(0.0) == {}
    own = alice.beat(10.0, {"x": 1}, ttl_s=5)
    assert alice.live(14.9) == {"alice": {"x": 1}}
    assert alice.live(15.0) == {}
    assert alice.expire(15.0) == []
    assert not alice.receive(own, now=15.0)


def test_old_beats_are_no_news_and_raise_nobody_from_the_dead() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    first, second = alice.beat(0.0, {"n": 1}, ttl_s=5), alice.beat(0.0, {"n": 2}, ttl_s=5)
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
    bob.receive(awareness_of("alice", started_ms=1000).beat(0.0, {}, ttl_s=5), now=0.0)
    assert bob.receive(awareness_of("alice", started_ms=2000).beat(0.0, {}, ttl_s=5), now=1.0)


def test_forged_beats_are_refused_and_counted() -> None:
    bob = awareness_of("bob")
    good = awareness_of("alice").beat(0.0, {"a": 1}, ttl_s=5).beat
    bad = {
        RejectReason.MALFORMED: good + b"x",
        RejectReason.WRONG_VERSION: b"\x07" + good[1:],
        RejectReason.TOO_LARGE: bytes(MAX_BEAT_BYTES + 1),
        RejectReason.UNKNOWN_AUTHOR: awareness_of("mallory").beat(0.0, {}, ttl_s=5).beat,
        RejectReason.BAD_SIGNATURE: awareness_of("alice", swarm="x").beat(0.0, {}, ttl_s=5).beat,
    }
    for reason, data in bad.items():
        with pytest.raises(UpdateRejected) as caught:
            bob.receive(Told(0, data), now=0.0)
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
        started_ms=0,
    )
    data = alice.beat(0.0, {"a": 1}, ttl_s=5).beat.replace(b'{"a":1}', b'["a":1]')
    with pytest.raises(UpdateRejected) as caught:
        awareness_of("bob").receive(Told(0, data), now=0.0)
    assert caught.value.reason is RejectReason.UNREADABLE


def test_a_state_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(StoreFull):
        awareness_of("alice").beat(0.0, {"a": "x" * 2000}, ttl_s=5)


def test_a_forgotten_peer_is_gone_at_once() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}, ttl_s=5), now=0.0)
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
        started_ms=2**53 - 1,
    )
    told = alice.beat(0.0, state, ttl_s=3600)
    assert len(told.beat) <= MAX_BEAT_BYTES
    assert len(News((told,)).encode()) <= MAX_NEWS_BYTES


def test_a_beat_says_itself_how_long_it_is_good() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}, ttl_s=600), now=0.0)
    assert set(bob.live(599.0)) == {"alice"}
    bob.receive(alice.beat(0.0, {}, ttl_s=0), now=1.0)
    assert bob.live(1.0) == {}


def test_what_is_passed_on_is_no_younger_than_it_was() -> None:
    alice, bob, carol = map(awareness_of, ("alice", "bob", "carol"))
    bob.receive(alice.beat(0.0, {}, ttl_s=60), now=100.0)
    (news,) = bob.known(140.9)
    assert [told.age_s for told in news.beats] == [40]
    carol.receive(news.beats[0], now=0.0)
    assert carol.next_deadline() == 20.0
    assert list(bob.known(160.0)) == []


def test_a_beat_that_comes_too_late_revives_nobody_and_is_remembered() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    told = alice.beat(0.0, {}, ttl_s=60)
    assert bob.receive(Told(60, told.beat), now=0.0)
    assert bob.live(0.0) == {}
    assert not bob.receive(told, now=0.0)


def test_all_that_is_known_is_told_in_pieces_within_their_limit() -> None:
    bob = awareness_of("bob")
    beats = {}
    for author in ("alice", "carol", "dave"):
        told = awareness_of(author).beat(0.0, {"x": "y" * 1000}, ttl_s=60)
        beats[author] = told.beat
        bob.receive(told, now=0.0)
    bob.beat(0.0, {"x": "y" * 1000}, ttl_s=60)
    pieces = list(bob.known(0.0))
    assert len(pieces) == 2
    assert all(len(piece.encode()) <= MAX_NEWS_BYTES for piece in pieces)
    assert {told.beat for piece in pieces for told in piece.beats} >= set(beats.values())


def test_a_suspected_peer_is_gone_unless_it_beats_in_time() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}, ttl_s=600), now=0.0)
    suspicion = bob.suspect("alice")
    assert suspicion is not None
    assert bob.doubt(suspicion, 10.0, within_s=2.5)
    assert not bob.doubt(suspicion, 11.0, within_s=2.5)  # no news, and no longer life
    assert bob.suspect("alice") is None
    assert list(bob.known(11.0)) == []  # nor is a newcomer told that it lives
    assert bob.next_deadline() == 12.5
    bob.receive(alice.beat(0.0, {}, ttl_s=600), now=12.0)
    assert bob.next_deadline() == 612.0
    assert not bob.doubt(suspicion, 12.0, within_s=2.5)  # an old one, that came round late


def test_a_suspicion_lengthens_no_life() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}, ttl_s=5), now=0.0)
    suspicion = bob.suspect("alice")
    assert suspicion is not None
    assert bob.doubt(suspicion, 4.0, within_s=2.5)
    assert bob.next_deadline() == 5.0


def test_a_node_is_asked_for_a_beat_when_it_is_suspected_itself() -> None:
    alice, bob = awareness_of("alice"), awareness_of("bob")
    bob.receive(alice.beat(0.0, {}, ttl_s=5), now=0.0)
    suspicion = bob.suspect("alice")
    assert suspicion is not None
    assert alice.doubt(suspicion, 0.0, within_s=2.5)
    assert set(alice.live(4.0)) == {"alice"}


def test_nobody_is_suspected_of_whom_nothing_was_heard() -> None:
    bob = awareness_of("bob")
    assert bob.suspect("alice") is None
    assert not bob.doubt(Suspicion("alice", 7), 0.0, within_s=2.5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", RejectReason.MALFORMED),
        (b"\x02\x92\x90\x91\x92\xa0\x00", RejectReason.MALFORMED),  # nobody's name
        (b"\x02\x92\x91\x92\xcd\xff\xff\xc4\x00\x90", RejectReason.MALFORMED),  # 18 h old
        (b"\x02\x92\x90\xdc\x00\x21" + b"\x92\xa1a\x00" * 33, RejectReason.MALFORMED),
        (b"\x01\x92\x90\x90", RejectReason.WRONG_VERSION),
        (bytes(MAX_NEWS_BYTES + 1), RejectReason.TOO_LARGE),
    ],
)
def test_bytes_that_are_no_news_are_refused(data: bytes, reason: RejectReason) -> None:
    with pytest.raises(UpdateRejected) as caught:
        News.decode(data)
    assert caught.value.reason is reason
