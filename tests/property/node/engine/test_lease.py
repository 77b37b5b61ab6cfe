"""Leases: fixed cases first, then the invariant under any order of calls."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.node.engine.errors import CacheFull, LeaseExpired
from covey.node.engine.lease import LeaseTable


def table(capacity_bytes: int = 64) -> LeaseTable:
    return LeaseTable(bytes_per_token=32, capacity_bytes=capacity_bytes, ttl_s=10.0)


def test_grant_beyond_capacity_changes_nothing() -> None:
    leases = table()
    kept = leases.grant("one", n_tokens=1, now=0.0)
    with pytest.raises(CacheFull) as caught:
        leases.grant("one", n_tokens=3, now=1.0)
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (96, 64)
    assert leases.free_bytes == 32
    assert leases.next_deadline() == kept.expires_at


def test_renew_at_the_very_deadline_is_too_late() -> None:
    leases = table()
    leases.grant("one", n_tokens=1, now=0.0)
    leases.renew("one", now=9.9)
    with pytest.raises(LeaseExpired) as caught:
        leases.renew("one", now=19.9)
    assert caught.value.session == "one"


def test_release_gives_the_room_to_another() -> None:
    leases = table()
    leases.grant("one", n_tokens=2, now=0.0)
    leases.release("one")
    leases.release("one")
    assert leases.grant("two", n_tokens=2, now=0.0).nbytes == 64


def test_a_lease_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="n_tokens = 0"):
        table().grant("one", n_tokens=0, now=0.0)


calls_of_any_kind = st.lists(
    st.tuples(
        st.sampled_from(["grant", "renew", "release"]),
        st.sampled_from("abc"),
        st.integers(1, 6),
        st.floats(0.0, 9.0),
    ),
    max_size=30,
)


@given(calls_of_any_kind)
def test_budget_is_never_exceeded_nor_leaked(calls: list[tuple[str, str, int, float]]) -> None:
    leases = table(160)
    now = 0.0
    for call, name, n_tokens, step_s in calls:
        now += step_s
        leases.expire(now=now)
        with suppress(CacheFull, LeaseExpired):
            if call == "grant":
                leases.grant(name, n_tokens=n_tokens, now=now)
            elif call == "renew":
                leases.renew(name, now=now)
            else:
                leases.release(name)
        assert 0 <= leases.free_bytes <= 160
    leases.expire(now=now + 10.0)
    assert leases.free_bytes == 160
    assert leases.next_deadline() is None
