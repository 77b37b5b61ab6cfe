"""How many circuits a relay gives, and to whom."""

from __future__ import annotations

from covey.transport.relay.circuits import CIRCUIT_ID_BYTES, CIRCUIT_KEY_BYTES, CircuitBook
from covey.transport.relay.circuits import RelayLimits as Limits


def open_full(book: CircuitBook, origin: str, *, now: float = 0.0) -> bool:
    """A circuit whose ends have both come."""
    circuit = book.open(origin, "target", now=now)
    if circuit is not None:
        circuit.n_ends = 2
    return circuit is not None


def test_circuits_have_ids_and_keys_of_their_own() -> None:
    book = CircuitBook(Limits())
    circuits = [book.open("a", "b", now=0.0) for _ in range(8)]
    ids = {circuit.id for circuit in circuits if circuit is not None}
    keys = {circuit.key for circuit in circuits if circuit is not None}
    assert len(ids) == len(keys) == 8
    assert {len(circuit_id) for circuit_id in ids} == {CIRCUIT_ID_BYTES}
    assert {len(key) for key in keys} == {CIRCUIT_KEY_BYTES}


def test_one_member_leaves_room_for_others() -> None:
    book = CircuitBook(Limits(circuits=10, circuits_per_peer=4))
    assert [open_full(book, "a") for _ in range(6)] == [True] * 4 + [False] * 2
    assert [open_full(book, "b") for _ in range(4)] == [True] * 4
    assert [open_full(book, "c") for _ in range(3)] == [True] * 2 + [False]
    assert len(book) == 10


def test_half_open_ones_are_bounded_in_all_and_for_each() -> None:
    book = CircuitBook(Limits(half_open=5, half_open_per_peer=2))
    got = [
        book.open(origin, "target", now=0.0) is not None
        for origin in ("a", "a", "a", "b", "b", "b", "c", "c")
    ]
    assert got == [True, True, False, True, True, False, True, False]
    for circuit in book:
        circuit.n_ends = 2
    assert book.open("a", "target", now=0.0) is not None


def test_only_those_that_still_wait_are_overdue() -> None:
    book = CircuitBook(Limits(half_open_s=4.0))
    assert open_full(book, "a", now=0.0)
    waiting = book.open("a", "b", now=1.0)
    assert book.overdue(now=4.9) == []
    assert book.overdue(now=5.0) == [waiting]
    if waiting is not None:
        book.remove(waiting)
        book.remove(waiting)
    assert book.n_of("a") == 1


def test_circuits_that_come_and_go_are_limited_in_number_over_time() -> None:
    book = CircuitBook(Limits(circuits_per_peer=4, opens_per_s=2.0))

    def opened_and_closed(origin: str, now: float) -> bool:
        circuit = book.open(origin, "target", now=now)
        if circuit is not None:
            book.remove(circuit)
        return circuit is not None

    assert sum(opened_and_closed("a", 0.0) for _ in range(100)) == 4
    assert opened_and_closed("b", 0.0)
    assert sum(opened_and_closed("a", 1.0) for _ in range(100)) == 2
    assert sum(opened_and_closed("a", 100.0) for _ in range(100)) == 4
    for n in range(1000):
        assert opened_and_closed(f"{n}", 200.0 + n)
    assert len(book._opens) == 1  # what is forgiven is forgotten
