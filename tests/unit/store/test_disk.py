"""The file: what comes back after a restart, and what a person is told when it cannot."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey.store.disk import Disk
from covey.store.errors import StoreCorrupt, StoreError
from support.swarm_keys import SWARM, recorded, replica_of


def rows(disk: Disk) -> list[tuple[str, int, bytes]]:
    return list(disk.load())


def test_envelopes_come_back_in_order(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        disk.append("bob", 2, b"two", is_durable=True)
        disk.append("bob", 1, b"one", is_durable=False)
        disk.append("alice", 1, b"a", is_durable=True)
    with Disk(tmp_path / "store.db") as disk:
        assert rows(disk) == [("alice", 1, b"a"), ("bob", 1, b"one"), ("bob", 2, b"two")]


def test_a_snapshot_takes_the_place_of_its_authors_log_only(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        for author in ("alice", "bob"):
            disk.append(author, 1, b"one", is_durable=True)
        disk.restart("bob", 2, b"all", is_durable=True)
        assert rows(disk) == [("alice", 1, b"one"), ("bob", 2, b"all")]


def test_a_restarted_replica_is_equal_and_never_uses_a_sequence_twice(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        before, bob = replica_of("alice", disk=disk), replica_of("bob")
        envelopes = recorded(before)
        bob.on_local(before.apply)
        bob.set("b", {"n": 1})
        before.set("a", {"n": 1})
        before.set("a", {"n": 2})
        before.compact()
        before.set("c", {"n": 3})
        state = before.state_vector(), list(before.items())
    with Disk(tmp_path / "store.db") as disk:
        after = replica_of("alice", disk=disk)
        assert (after.state_vector(), list(after.items())) == state
        after.on_local(envelopes.append)
        after.set("d", {"n": 4})
    reader = replica_of("carol")
    assert [reader.apply(data).is_new for data in envelopes] == [True] * 5
    assert reader.get("alice", "d") == {"n": 4}


def test_the_file_of_another_swarm_or_author_is_refused(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        replica_of("alice", disk=disk)
    with Disk(tmp_path / "store.db") as disk:
        with pytest.raises(StoreError, match="another swarm or identity"):
            replica_of("alice", swarm="another", disk=disk)
        with pytest.raises(StoreError, match="another swarm or identity"):
            replica_of("bob", swarm=SWARM, disk=disk)


def test_a_file_that_is_no_database_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreCorrupt, match=r"store.db is damaged; move it away and start again"):
        Disk(path)


def test_a_flipped_bit_in_a_row_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Disk(path) as disk:
        disk.append("alice", 1, b"the very bytes", is_durable=True)
    path.write_bytes(path.read_bytes().replace(b"the very bytes", b"the vary bytes"))
    with Disk(path) as disk, pytest.raises(StoreCorrupt):
        rows(disk)


def test_a_row_that_is_no_envelope_is_noticed(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        disk.append("bob", 1, b"no envelope", is_durable=True)
        with pytest.raises(StoreCorrupt, match="never wrote"):
            replica_of("alice", disk=disk)


def test_an_envelope_under_another_authors_name_is_noticed(tmp_path: Path) -> None:
    bob = replica_of("bob")
    envelopes = recorded(bob)
    bob.set("b", {})
    with Disk(tmp_path / "store.db") as disk:
        disk.append("carol", 1, envelopes[0], is_durable=True)
        with pytest.raises(StoreCorrupt, match="never wrote"):
            replica_of("alice", disk=disk)


def test_what_follows_a_gap_is_dropped_and_fetched_again(tmp_path: Path) -> None:
    bob = replica_of("bob")
    envelopes = recorded(bob)
    for n in range(3):
        bob.set("b", {"n": n})
    with Disk(tmp_path / "store.db") as disk:
        for sequence in (1, 3):
            disk.append("bob", sequence, envelopes[sequence - 1], is_durable=False)
        alice = replica_of("alice", disk=disk)
        assert alice.get("bob", "b") == {"n": 0}
        assert rows(disk) == [("bob", 1, envelopes[0])]
        for data in bob.missing_for(alice.state_vector(), max_bytes=10_000):
            alice.apply(data)
        state = list(alice.items())
    with Disk(tmp_path / "store.db") as disk:
        assert list(replica_of("alice", disk=disk).items()) == state == [("bob", "b", {"n": 2})]


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot write .*--home"):
        Disk(tmp_path / "home" / "store.db")


def test_a_second_node_in_one_home_is_told_so(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        disk.append("alice", 1, b"", is_durable=True)
        with pytest.raises(StoreError, match="another node running in this home"):
            Disk(tmp_path / "store.db")


def test_a_file_of_a_newer_covey_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer Covey"):
        Disk(path)


@contextlib.contextmanager
def full_disk(disk: Disk) -> Iterator[None]:
    """No file of this process may grow beyond what the store's log takes now."""
    log = disk.path.with_name(disk.path.name + "-wal")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_replica_as_it_was(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        alice, reader = replica_of("alice", disk=disk), replica_of("bob")
        alice.on_local(reader.apply)
        alice.set("a", {"n": 1})
        with full_disk(disk), pytest.raises(StoreError, match="is the disk full"):
            alice.set("a", {"n": 2})
        assert list(alice.items()) == list(reader.items()) == [("alice", "a", {"n": 1})]
        alice.set("a", {"n": 3})
        assert list(alice.items()) == list(reader.items()) == [("alice", "a", {"n": 3})]


def test_what_others_wrote_shows_even_if_it_cannot_be_stored(tmp_path: Path) -> None:
    bob = replica_of("bob")
    envelopes = recorded(bob)
    for n in range(3):
        bob.set("b", {"n": n})
    with Disk(tmp_path / "store.db") as disk:
        alice, seen = replica_of("alice", disk=disk), []
        alice.apply(envelopes[0])
        alice.subscribe(lambda author, _keys: seen.append(author))
        with full_disk(disk), pytest.raises(StoreError):
            alice.apply(envelopes[1])
        assert alice.get("bob", "b") == {"n": 1}
        assert seen == ["bob"]
        alice.apply(envelopes[2])
    with Disk(tmp_path / "store.db") as disk:
        assert replica_of("alice", disk=disk).get("bob", "b") == {"n": 0}


@pytest.mark.parametrize("page", [1, 2, 3])
def test_a_page_of_garbage_is_noticed(tmp_path: Path, page: int) -> None:
    path = tmp_path / "store.db"
    with Disk(path) as disk:
        for sequence in range(1, 100):
            disk.append("alice", sequence, bytes(200), is_durable=False)
    content = bytearray(path.read_bytes())
    content[page * 4096 : (page + 1) * 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        open_and_read(path)


def open_and_read(path: Path) -> None:
    with Disk(path) as disk:
        rows(disk)


def test_a_forgotten_author_stays_forgotten(tmp_path: Path) -> None:
    with Disk(tmp_path / "store.db") as disk:
        alice, bob = replica_of("alice", disk=disk), replica_of("bob")
        bob.on_local(alice.apply)
        bob.set("b", {})
        alice.forget("bob")
        assert rows(disk) == []
    assert alice.authors() == []
