"""Real routers: what `attempts` promises for a pair of NAT kinds makes a link, every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from testbed.nat import Nat, NatKind

from covey.transport.punch import AttemptKind
from support.punch_pair import MIRROR, MOST_S, Pair, kinds_of, two_hosts

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]

KINDS = tuple(kind for kind in NatKind if kind is not NatKind.OPEN)
NATS = tuple(
    Nat(kind, cone_for_tcp=cone_for_tcp)
    for kind in KINDS
    for cone_for_tcp in ((True, False) if kind.is_cone else (True,))
)


# One of each outcome: a punch, both birthdays, none at all; and the same for WebRTC.
_PORT, _SYMMETRIC = NatKind.PORT_RESTRICTED, NatKind.SYMMETRIC
_FEW_KINDS = (
    (_PORT, _PORT),
    (_PORT, _SYMMETRIC),
    (_SYMMETRIC, _PORT),
    (_SYMMETRIC, _SYMMETRIC),
    (NatKind.FULL_CONE, _SYMMETRIC),
)
FEW = (*_FEW_KINDS, *((Nat(ours), Nat(theirs)) for ours, theirs in _FEW_KINDS))


@pytest.fixture(scope="module")
def pair(inside: Path) -> Iterator[Pair]:
    with two_hosts(link=None) as pair:
        yield pair


def name_of(nat: Nat) -> str:
    suffix = "" if nat.cone_for_tcp or not nat.kind.is_cone else ", UDP only"
    return f"{nat.kind.value}{suffix}"


def pairs(kinds: Iterable[Any]) -> list[ParameterSet]:
    """All of them; most only in the lab."""
    return [
        pytest.param(*pair, marks=() if pair in FEW else pytest.mark.lab)
        for pair in itertools.product(kinds, kinds)
    ]


@pytest.mark.parametrize(("ours", "theirs"), pairs(NATS), ids=lambda nat: name_of(nat))
def test_the_first_attempt_makes_a_link(pair: Pair, ours: Nat, theirs: Nat) -> None:
    pair.lab.set_nat("ra", ours)
    pair.lab.set_nat("rb", theirs)
    first = next(iter(kinds_of(ours, theirs)), None)
    if first is None:
        assert ours.kind is theirs.kind is NatKind.SYMMETRIC
        return
    assert first in (AttemptKind.PUNCH, *MIRROR)
    for end in pair.meet(first, MIRROR.get(first, first)):
        assert end.get("kind") == "punched", end
        assert end["has_echo"]
        assert end["took_s"] < MOST_S


@pytest.mark.parametrize(("ours", "theirs"), pairs(KINDS))
def test_webrtc_connects_what_ice_can(pair: Pair, ours: NatKind, theirs: NatKind) -> None:
    pair.lab.set_nat("ra", Nat(ours))
    pair.lab.set_nat("rb", Nat(theirs))
    if AttemptKind.WEBRTC in kinds_of(Nat(ours), Nat(theirs)):
        for end in pair.webrtc(deadline_s=8.0):
            assert end.get("kind") == "webrtc", end
            assert end["has_echo"]
            assert end["took_s"] < MOST_S
    else:
        assert NatKind.SYMMETRIC in (ours, theirs)
        for end in pair.webrtc(deadline_s=1.0):
            assert "failed" in end


def test_a_punch_that_cannot_work_ends_in_time_and_the_next_one_works(pair: Pair) -> None:
    pair.lab.set_nat("ra", Nat(NatKind.SYMMETRIC))
    pair.lab.set_nat("rb", Nat(NatKind.SYMMETRIC))
    assert all("LinkTimeout" in end["failed"] for end in pair.meet(*[AttemptKind.PUNCH] * 2))
    pair.lab.set_nat("rb", Nat(NatKind.ADDRESS_RESTRICTED))
    assert all("has_echo" in end for end in pair.meet(*[AttemptKind.PUNCH] * 2))
