"""Replicas agree, whatever the network does to their envelopes and whenever they restart."""

from __future__ import annotations

import itertools
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from covey.store.disk import Disk
from covey.store.errors import RejectReason
from covey.store.replica import Replica
from covey.store.sync import SyncSession
from covey.store.views import Views
from support.swarm_keys import recorded, replica_of

WRITERS = ("alice", "bob")

# What a member does: write one key, write two at once, delete, compact.
actions = st.tuples(
    st.sampled_from(WRITERS),
    st.sampled_from(["set", "set two", "delete", "compact"]),
    st.sampled_from(["member", "a", "b"]),
    st.integers(0, 3),
)


def act(replica: Replica, what: str, key: str, n: int) -> None:
    match what:
        case "set":
            replica.set(key, {"n": n})
        case "set two":
            with replica.edit() as edit:
                edit.set(key, {"n": n})
                edit.set("also", {"n": n})
        case "delete":
            replica.delete(key)
        case _:
            replica.compact()


def shown(replica: Replica) -> list[tuple[str, str, dict[str, Any]]]:
    return list(replica.items())


def converse(one: Replica, other: Replica, *, lost: frozenset[int] = frozenset()) -> None:
    """One round of anti-entropy; the messages whose number is in `lost` never arrive."""
    ends = SyncSession(one), SyncSession(other)
    queue = deque([(1, ends[0].hello())])
    number = 0
    while queue:
        to, message = queue.popleft()
        if number not in lost:
            queue.extend((1 - to, answer) for answer in ends[to].receive(message))
        number += 1
        assert number < 50, "the ends never fall silent"


@settings(deadline=None)
@given(st.lists(actions, max_size=25), st.randoms(use_true_random=False), st.data())
def test_replicas_agree_after_any_order_duplication_and_loss(
    history: list[tuple[str, str, str, int]], random: Any, data: st.DataObject
) -> None:
    writers = {author: replica_of(author) for author in WRITERS}
    logs = [recorded(replica) for replica in writers.values()]
    for author, what, key, n in history:
        act(writers[author], what, key, n)
    sent = [envelope for log in logs for envelope in log]
    readers = [replica_of("carol"), replica_of("dave")]
    for reader in readers:
        arriving = [envelope for envelope in sent + sent if random.random() < 0.7]
        random.shuffle(arriving)
        for envelope in arriving:
            reader.apply(envelope)
        assert not reader.rejected
    everyone = [*writers.values(), *readers]
    lost = frozenset(data.draw(st.sets(st.integers(0, 6), max_size=3), label="lost messages"))
    converse(everyone[0], everyone[2], lost=lost)
    for _ in range(2):  # a line of neighbours: what one end knows reaches the other in two rounds
        for left, right in itertools.pairwise(everyone):
            converse(left, right)
    for replica in everyone[1:]:
        assert shown(replica) == shown(everyone[0])
        assert replica.state_vector() == everyone[0].state_vector()
        assert Views(replica).members() == Views(everyone[0]).members()
        assert not replica.rejected


@settings(deadline=None)
@given(st.lists(actions, max_size=25))
def test_a_replica_shows_what_was_written_last(history: list[tuple[str, str, str, int]]) -> None:
    alice, reader = replica_of("alice"), replica_of("bob")
    alice.on_local(reader.apply)
    expected: dict[str, dict[str, int]] = {}
    for _, what, key, n in history:
        act(alice, what, key, n)
        match what:
            case "set":
                expected[key] = {"n": n}
            case "set two":
                expected |= {key: {"n": n}, "also": {"n": n}}
            case "delete":
                expected.pop(key, None)
    assert shown(reader) == [("alice", key, expected[key]) for key in sorted(expected)]
    assert shown(alice) == shown(reader)


@settings(deadline=None, max_examples=30)
@given(st.lists(actions, max_size=12), st.integers(0, 12), st.integers(1, 2000))
def test_a_restart_from_disk_changes_nothing(
    history: list[tuple[str, str, str, int]], restart_at: int, started_ms: int
) -> None:
    bob, reader = replica_of("bob"), replica_of("carol")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        disk = Disk(path)
        alice = replica_of("alice", disk=disk)
        alice.on_local(reader.apply)
        bob.on_local(alice.apply)
        for moment, (author, what, key, n) in enumerate([*history, ("alice", "set", "a", 9)]):
            if moment == restart_at:
                before = shown(alice), alice.state_vector()
                disk.close()
                disk = Disk(path)
                alice = replica_of("alice", disk=disk, started_ms=started_ms)
                assert (shown(alice), alice.state_vector()) == before
                alice.on_local(reader.apply)
                bob = replica_of("bob", started_ms=started_ms + 100)
                converse(bob, alice)
                bob.on_local(alice.apply)
            act(alice if author == "alice" else bob, what, key, n)
        disk.close()
    own = [item for item in shown(alice) if item[0] == "alice"]
    assert shown(reader) == own
    assert not reader.rejected
    assert alice.rejected.keys() <= {RejectReason.REPLAYED}
