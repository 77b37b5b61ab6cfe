"""Kademlia's search: it arrives, it ends, and neither the dead nor liars keep it from that."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.control_lookup import MAX_KNOWN, MAX_NAMED, N_FRUITLESS, Search

KEY = b"key"


def distance(peer: bytes, key: bytes = KEY) -> int:
    places = [int.from_bytes(hashlib.sha256(text).digest()) for text in (peer, key)]
    return places[0] ^ places[1]


def peers_of(n_peers: int) -> list[bytes]:
    return [b"peer-%d" % number for number in range(n_peers)]


def run(search: Search, answer: Callable[[bytes], Iterable[bytes] | None]) -> int:
    """Ask one after the other, as the caller does; how many were asked."""
    n_asked = 0
    while (peer := search.take()) is not None:
        n_asked += 1
        named = answer(peer)
        if named is None:
            search.failed(peer)
        else:
            search.answered(peer, named)
    return n_asked


@pytest.mark.parametrize("n_peers", [1, 5, 50, 500])
def test_the_closest_are_found_by_asking_few(n_peers: int) -> None:
    peers, rng = peers_of(n_peers), random.Random(n_peers)
    closest = sorted(peers, key=distance)

    def answer(peer: bytes) -> list[bytes]:
        """Everybody knows half of all peers, and of these names the closest to the key."""
        known = random.Random(peer).sample(peers, (n_peers + 1) // 2)
        return sorted(known, key=distance)[:MAX_NAMED]

    search = Search(KEY, rng.sample(peers, min(3, n_peers)), n_wanted=6)
    n_asked = run(search, answer)
    assert search.is_done
    assert len(set(search.closest()) & set(closest[:6])) >= min(5, n_peers)
    assert n_asked <= 12


def test_who_does_not_answer_is_left_out_and_the_next_is_asked() -> None:
    peers = sorted(peers_of(20), key=distance)
    dead = set(peers[:3])
    search = Search(KEY, peers, n_wanted=4)
    run(search, lambda peer: None if peer in dead else peers)
    assert search.closest() == peers[3:7]


def test_it_is_done_while_somebody_has_not_answered_when_the_others_name_nobody_closer() -> None:
    peers = sorted(peers_of(6), key=distance)
    search = Search(KEY, peers, n_wanted=6)
    assert search.take() == peers[0]  # never answers
    for _ in range(N_FRUITLESS):
        assert not search.is_done
        peer = search.take()
        assert peer is not None
        search.answered(peer, peers)
    assert search.is_done
    assert search.take() is None


def test_nobody_known_is_done_at_once() -> None:
    search = Search(KEY, [], n_wanted=3)
    assert search.take() is None
    assert search.is_done


def test_a_peer_that_failed_is_not_asked_again_however_often_it_is_named() -> None:
    search = Search(KEY, [b"a", b"b"], n_wanted=3)
    asked = []

    def answer(peer: bytes) -> list[bytes] | None:
        asked.append(peer)
        return None if peer == b"a" else [b"a", b"b"]

    run(search, answer)
    assert sorted(asked) == [b"a", b"b"]
    assert search.closest() == [b"b"]


@given(st.randoms(use_true_random=False), st.integers(1, 20))
def test_it_ends_whatever_is_answered(rng: random.Random, n_wanted: int) -> None:
    """Liars who name ever new peers, closer and closer, and more than they may."""
    numbers = iter(range(10**9))

    def answer(_: bytes) -> list[bytes] | None:
        if rng.random() < 0.2:
            return None
        return [b"liar-%d" % next(numbers) for _ in range(2 * MAX_NAMED)]

    search = Search(KEY, [b"first"], n_wanted=n_wanted)
    assert run(search, answer) <= MAX_KNOWN + 1
    assert search.is_done
    assert len(search.closest()) <= n_wanted
