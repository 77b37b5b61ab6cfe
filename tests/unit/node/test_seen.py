"""Where members were seen: newest first, bounded, and worth nothing when damaged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from covey.node.seen import MAX_MEMBERS, Seen


def test_who_was_seen_last_comes_first() -> None:
    seen = Seen()
    seen.note("a", ["/ip4/192.0.2.1/tcp/1"], at=1.0)
    seen.note("b", ["/ip4/192.0.2.2/tcp/1"], at=2.0)
    seen.note("a", ["/ip4/192.0.2.3/tcp/1", "/ip4/192.0.2.4/tcp/1"], at=3.0)
    assert seen.addresses() == [
        ("/ip4/192.0.2.3/tcp/1", "/ip4/192.0.2.4/tcp/1"),
        ("/ip4/192.0.2.2/tcp/1",),
    ]


def test_it_survives_a_file() -> None:
    seen = Seen()
    seen.note("a", ["/ip4/192.0.2.1/tcp/1"], at=1.5)
    again = Seen.from_dict(json.loads(json.dumps(seen.to_dict())))
    assert again.addresses() == seen.addresses()


def test_the_longest_unseen_are_forgotten() -> None:
    seen = Seen()
    for number in range(MAX_MEMBERS + 10):
        seen.note(f"peer-{number}", [f"/ip4/192.0.2.1/tcp/{number + 1}"], at=float(number))
    assert len(seen.addresses()) == MAX_MEMBERS
    assert seen.addresses()[-1] == ("/ip4/192.0.2.1/tcp/11",)


def test_without_an_address_there_is_nothing_to_remember() -> None:
    seen = Seen()
    seen.note("a", ["", "x" * 200], at=1.0)
    assert seen.addresses() == []


def test_a_removed_member_is_forgotten() -> None:
    seen = Seen()
    seen.note("a", ["/ip4/192.0.2.1/tcp/1"], at=1.0)
    seen.forget("a")
    seen.forget("nobody")
    assert seen.addresses() == []


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"members": None},
        {"members": ["a"]},
        {"members": {"a": {"at": "yesterday", "control_addresses": []}}},
        {"members": {"a": {"at": 1.0, "control_addresses": [""]}}},
        {"members": {"a": {"at": -1.0, "control_addresses": []}}},
        {"members": {"a": {"at": 1.0, "control_addresses": ["abc"] * 17}}},
    ],
)
def test_a_damaged_file_is_no_more_than_an_empty_one(state: dict[str, Any]) -> None:
    assert Seen.from_dict(state).addresses() == []
