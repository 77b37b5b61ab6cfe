"""Removal by signed statements: the same judgement for all who hold the same ones."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.node.standing import (
    UNSIGNED,
    Statement,
    decode_statement,
    encode_statement,
    is_genuine,
    judge,
    sign_statement,
)
from covey.store.errors import RecordMalformed
from covey.store.schema import Delegation, Revocation, Rotation
from covey.transport.identity import Identity, verify
from support.node_core import PEERS

SWARM = "0123456789abcdef"
FOUNDER, ANN, BOB, CYD, DAN = PEERS
Parts: TypeAlias = tuple[str, ...]


def allow(member: str, by: str = FOUNDER) -> Delegation:
    return Delegation(member=member, by=by, at=1, signature=UNSIGNED)


def remove(member: str, by: str = FOUNDER, at: int = 1) -> Revocation:
    return Revocation(member=member, name="x", by=by, at=at, signature=UNSIGNED)


def rotate(epoch: int, by: str = FOUNDER, mark: int = 0) -> Rotation:
    return Rotation(
        epoch=epoch,
        by=by,
        at=1,
        commitment=bytes([mark]) * 32,
        without=(),
        copies={},
        signature=UNSIGNED,
    )


def removed(*statements: Statement) -> set[str]:
    return set(judge(FOUNDER, statements).removed)


peers = st.sampled_from(PEERS)
statements: st.SearchStrategy[list[Statement]] = st.lists(
    st.one_of(
        st.builds(allow, peers, peers),
        st.builds(remove, peers, peers, st.integers(0, 3)),
        st.builds(rotate, st.integers(1, 3), peers, st.integers(0, 2)),
    ),
    max_size=14,
)


@given(statements, st.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing(said: list[Statement], random: object) -> None:
    shuffled = [*said, *said[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert judge(FOUNDER, shuffled) == judge(FOUNDER, said)


@given(statements)
def test_whom_the_founder_has_not_allowed_has_no_say(said: list[Statement]) -> None:
    standing = judge(FOUNDER, said)
    allowed = {s.member for s in said if isinstance(s, Delegation) and s.by == FOUNDER}
    believed = [s for s in said if s.by == FOUNDER or s.by in allowed]
    assert judge(FOUNDER, believed) == standing
    assert standing.authorities <= allowed | {FOUNDER}


@given(statements)
def test_the_founder_stays_and_its_word_is_kept(said: list[Statement]) -> None:
    standing = judge(FOUNDER, said)
    by_founder = {s.member for s in said if isinstance(s, Revocation) and s.by == FOUNDER}
    assert by_founder - {FOUNDER} <= standing.removed.keys()
    assert FOUNDER not in standing.removed
    assert not standing.delegates & standing.removed.keys()


def test_the_founder_removes() -> None:
    assert removed(remove(ANN)) == {ANN}
    assert removed(remove(FOUNDER)) == set()


def test_a_member_removes_nobody_before_the_founder_lets_it() -> None:
    assert removed(remove(BOB, by=ANN)) == set()
    assert removed(remove(BOB, by=ANN), allow(ANN)) == {BOB}
    assert removed(remove(BOB, by=ANN), allow(ANN, by=CYD)) == set()


def test_delegates_cannot_remove_the_founder_each_other_or_themselves() -> None:
    both = allow(ANN), allow(BOB)
    assert (
        removed(*both, remove(FOUNDER, by=ANN), remove(BOB, by=ANN), remove(ANN, by=BOB)) == set()
    )
    assert removed(allow(ANN), remove(ANN, by=ANN)) == set()


def test_a_removed_delegates_word_counts_no_longer() -> None:
    assert removed(allow(ANN), remove(BOB, by=ANN), remove(ANN)) == {ANN}
    assert removed(allow(ANN), remove(BOB, by=ANN), remove(ANN), remove(BOB)) == {ANN, BOB}


def test_a_removal_is_the_founders_if_several_said_so() -> None:
    said = allow(ANN), remove(BOB, by=ANN, at=0), remove(BOB, at=5)
    assert judge(FOUNDER, said).removed[BOB].by == FOUNDER


def test_the_highest_epoch_holds_and_the_founders_of_two() -> None:
    both = allow(ANN), allow(BOB)
    late, early = rotate(3, by=ANN), rotate(2)
    assert judge(FOUNDER, (*both, early, late)).rotation == late
    assert judge(FOUNDER, (early, late)).rotation == early
    assert judge(FOUNDER, (*both, rotate(3, mark=0), rotate(3, by=ANN, mark=9))).rotation == rotate(
        3
    )
    winner = rotate(3, by=max(ANN, BOB))
    assert judge(FOUNDER, (*both, rotate(3, by=min(ANN, BOB)), winner)).rotation == winner


KEYS = {key.peer_id: key for key in (Identity(bytes([n] * 32)) for n in range(1, 6))}


@given(statements)
def test_a_statement_is_its_authors_and_for_one_swarm(said: list[Statement]) -> None:
    for statement in said:
        signed = sign_statement(statement, swarm=SWARM, sign=KEYS[statement.by].sign)
        assert is_genuine(signed, swarm=SWARM, verify=verify)
        assert not is_genuine(signed, swarm=SWARM + "0", verify=verify)
        assert not is_genuine(msgspec.structs.replace(signed, at=9), swarm=SWARM, verify=verify)
        other = next(peer for peer in PEERS if peer != signed.by)
        assert not is_genuine(msgspec.structs.replace(signed, by=other), swarm=SWARM, verify=verify)


@given(statements)
def test_a_statement_travels_as_it_is(said: list[Statement]) -> None:
    assert [decode_statement(encode_statement(statement)) for statement in said] == said


@given(st.binary(max_size=200))
def test_other_bytes_are_no_statement(data: bytes) -> None:
    with pytest.raises(RecordMalformed):
        decode_statement(data)
    with pytest.raises(RecordMalformed):
        decode_statement(encode_statement(remove(ANN)) + b"x" + data)
    with pytest.raises(RecordMalformed):
        decode_statement(encode_statement(remove(ANN))[:-1])
