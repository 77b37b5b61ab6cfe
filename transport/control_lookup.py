"""Kademlia's search for the peers closest to a key (Maymounkov and Mazieres 2002, section 2.3).

Sans-IO and without libp2p: ids are bytes, the caller asks whom `take` names and reports back. In
place of libp2p 0.8.1's own, which asks ten at once, goes on until twenty have answered, and waits
for each that does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

N_FRUITLESS = 3  # answers in a row without anybody closer: then the search has arrived
MAX_NAMED = 20  # peers taken from one answer
MAX_KNOWN = 512  # of one search; what a liar names beyond that is not looked at


class Search:
    """One search; it ends by itself, however much the peers lie."""

    def __init__(self, key: bytes, start: Iterable[bytes], *, n_wanted: int) -> None:
        self._target = _position(key)
        self._n_wanted = n_wanted
        self._known: dict[bytes, int] = {}  # peer -> distance
        self._asked: set[bytes] = set()
        self._waiting: set[bytes] = set()
        self._n_fruitless = 0
        self._add(start)

    def take(self) -> bytes | None:
        """Whom to ask next; None while or because there is nobody."""
        if self._n_fruitless >= N_FRUITLESS:
            return None
        peer = next((p for p in self.closest() if p not in self._asked), None)
        if peer is not None:
            self._asked.add(peer)
            self._waiting.add(peer)
        return peer

    def answered(self, peer: bytes, named: Iterable[bytes]) -> None:
        """A peer has told whom it knows close to the key."""
        self._waiting.discard(peer)
        before = self.closest()
        self._add(named)
        self._n_fruitless = 0 if self.closest() != before else self._n_fruitless + 1

    def failed(self, peer: bytes) -> None:
        """A peer cannot be reached or makes no sense."""
        self._waiting.discard(peer)
        self._known.pop(peer, None)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for."""
        if self._n_fruitless >= N_FRUITLESS:
            return True
        return not self._waiting and all(peer in self._asked for peer in self.closest())

    def closest(self) -> list[bytes]:
        """The peers found so far that did not fail, closest first."""
        return sorted(self._known, key=self._known.__getitem__)[: self._n_wanted]

    def _add(self, peers: Iterable[bytes]) -> None:
        for number, peer in enumerate(peers):
            if number >= MAX_NAMED or len(self._known) >= MAX_KNOWN:
                return
            if peer not in self._asked:
                self._known[peer] = self._target ^ _position(peer)


def _position(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest())
