"""The preamble: whoever holds the key and means us gets in, once, and nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.transport import preamble
from covey.transport.preamble import (
    BEFORE_OPENING_S,
    NONCE_BYTES,
    PREAMBLE_BYTES,
    RECEIPT_BYTES,
    STALE_AFTER_S,
    PreambleGate,
    Verdict,
    build_preamble,
    build_receipt,
)

KEY_ID, KEY, PEER = b"k" * 16, b"s" * 32, "12D3KooWpeer"
NOW = 1_800_000_000

nonces = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)


def gate(peer_id: str = PEER, *, opened_at: float = 0.0) -> PreambleGate:
    return PreambleGate(peer_id, {KEY_ID: KEY}.get, opened_at=opened_at)


def build(nonce: bytes = bytes(16), *, key: bytes = KEY, key_id: bytes = KEY_ID) -> bytes:
    return build_preamble(key_id=key_id, key=key, expected_peer_id=PEER, nonce=nonce, unix_time=NOW)


@given(nonces, st.floats(-STALE_AFTER_S, STALE_AFTER_S))
def test_a_good_one_passes_once(nonce: bytes, skew_s: float) -> None:
    door, hello = gate(), build(nonce)
    assert len(hello) == PREAMBLE_BYTES
    assert door.judge(hello, unix_time=NOW + skew_s) == (Verdict.GOOD, KEY_ID)
    assert door.judge(hello, unix_time=NOW + skew_s) == (Verdict.REPLAYED, KEY_ID)


@given(st.integers(0, 8 * PREAMBLE_BYTES - 1))
def test_any_changed_bit_is_refused(bit: int) -> None:
    hello = bytearray(build())
    hello[bit // 8] ^= 1 << bit % 8
    assert gate().judge(bytes(hello), unix_time=NOW)[0] is not Verdict.GOOD


@given(st.binary(max_size=2 * PREAMBLE_BYTES))
def test_any_bytes_are_refused(hello: bytes) -> None:
    assert gate().judge(hello, unix_time=NOW)[0] is not Verdict.GOOD


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 100.0)), max_size=40),
)
def test_no_nonce_passes_twice_at_any_time(attempts: list[tuple[int, float]]) -> None:
    door, now, passed = gate(), float(NOW), list[int]()
    hellos = [build(bytes([n]) * 16) for n in range(4)]
    for n, step_s in attempts:
        now += step_s
        if door.judge(hellos[n], unix_time=now)[0] is Verdict.GOOD:
            passed.append(n)
    assert len(passed) == len(set(passed))


def test_each_fault_has_its_name() -> None:
    assert gate().judge(build(key=b"x" * 32), unix_time=NOW)[0] is Verdict.FORGED
    assert gate("12D3KooWother").judge(build(), unix_time=NOW)[0] is Verdict.FORGED
    assert gate().judge(build(key_id=b"x" * 16), unix_time=NOW)[0] is Verdict.UNKNOWN_KEY
    for skew_s in (-STALE_AFTER_S - 1, STALE_AFTER_S + 1):
        assert gate().judge(build(), unix_time=NOW + skew_s)[0] is Verdict.STALE
    assert gate().judge(b"", unix_time=NOW)[0] is Verdict.NOT_COVEY


def test_a_full_memory_refuses_and_then_forgets() -> None:
    door, limit = gate(), preamble.MAX_REMEMBERED
    for n in range(limit):
        door._seen[n.to_bytes(16, "big")] = NOW + 10.0
    fresh = build(b"\xff" * 16)
    assert door.judge(fresh, unix_time=NOW)[0] is Verdict.REPLAYED
    assert door.judge(fresh, unix_time=NOW + 11)[0] is Verdict.GOOD
    assert len(door._seen) == 1


@given(nonces, nonces)
def test_a_receipt_is_for_one_preamble_and_needs_the_key(nonce: bytes, other: bytes) -> None:
    door, hello = gate(), build(nonce)
    door.judge(hello, unix_time=NOW)
    receipt = door.receipt(hello)
    assert len(receipt) == RECEIPT_BYTES
    assert receipt == build_receipt(hello, key=KEY, peer_id=PEER)
    assert receipt not in hello
    assert receipt != build_receipt(hello, key=b"x" * 32, peer_id=PEER)
    assert receipt != build_receipt(hello, key=KEY, peer_id=PEER + "2")
    assert (receipt == door.receipt(build(other))) == (nonce == other)


@given(st.floats(0, 2 * STALE_AFTER_S))
def test_what_passed_before_a_restart_does_not_pass_after_it(down_s: float) -> None:
    before, hello = gate(opened_at=NOW - 100), build()
    assert before.judge(hello, unix_time=NOW)[0] is Verdict.GOOD
    opened_at = NOW + BEFORE_OPENING_S + 0.01 + down_s
    after = gate(opened_at=opened_at)
    assert after.judge(hello, unix_time=opened_at)[0] in (Verdict.BEFORE_US, Verdict.STALE)


def test_a_member_whose_clock_is_a_little_behind_gets_in_at_once() -> None:
    assert gate(opened_at=NOW + 4.0).judge(build(), unix_time=NOW + 4.0)[0] is Verdict.GOOD
