"""The cost of adding up: the table of `research/seeds.md` section 3.3, and where the ways cross."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.partition.allreduce import allreduce_s, direct_s, ring_s, star_s

MBIT = 1e6 / 8


@pytest.mark.parametrize(
    ("n", "payload", "mbit", "latency_s", "star_ms", "ring_ms"),
    [
        (8, 32 << 10, 300, 0.2e-3, 12.6, 4.3),
        (8, 32 << 10, 300, 1e-3, 14.2, 15.5),
        (8, 32 << 10, 300, 4e-3, 20.2, 57.5),
        (4, 8 << 10, 1000, 0.2e-3, 0.8, 1.3),
        (4, 8 << 10, 100, 4e-3, 11.9, 25.0),
        (4, 1 << 20, 300, 4e-3, 176, 66),
        (8, 16 << 20, 300, 4e-3, 6270, 839),
    ],
)
def test_the_published_cases(
    n: int, payload: int, mbit: float, latency_s: float, star_ms: float, ring_ms: float
) -> None:
    link = {"latency_s": latency_s, "bytes_per_s": mbit * MBIT}
    assert star_s(n, payload, **link) * 1e3 == pytest.approx(star_ms, rel=0.02, abs=0.06)
    assert ring_s(n, payload, **link) * 1e3 == pytest.approx(ring_ms, rel=0.02, abs=0.06)
    chosen, seconds = allreduce_s(n, payload, **link)
    assert chosen == ("star" if star_ms < ring_ms else "ring")
    assert seconds == min(star_s(n, payload, **link), ring_s(n, payload, **link))


def test_two_members_exchange_directly_whatever_the_size() -> None:
    for payload in (1, 1 << 26):
        chosen, seconds = allreduce_s(2, payload, latency_s=1e-3, bytes_per_s=1e6)
        assert chosen == "direct"
        assert seconds == direct_s(2, payload, latency_s=1e-3, bytes_per_s=1e6)


@given(
    st.integers(3, 16),
    st.integers(1, 1 << 26),
    st.floats(1e-6, 1.0),
    st.floats(1e3, 1e10),
)
def test_the_star_wins_where_the_study_says_so(
    n: int, payload: int, latency_s: float, bytes_per_s: float
) -> None:
    chosen, _ = allreduce_s(n, payload, latency_s=latency_s, bytes_per_s=bytes_per_s)
    left, right = latency_s * (n - 2), (n - 1) ** 2 / n * payload / bytes_per_s
    if abs(left - right) > 1e-9 * right:
        assert chosen == ("star" if left > right else "ring")


@pytest.mark.parametrize(
    ("n", "payload", "latency_s", "bytes_per_s"),
    [(1, 1, 0, 1), (2, 1, -1, 1), (2, 1, 0, 0), (2, -1, 0, 1), (2, 1, float("nan"), 1)],
)
def test_what_is_no_link_is_refused(
    n: int, payload: int, latency_s: float, bytes_per_s: float
) -> None:
    with pytest.raises(ValueError, match=r"must|at least"):
        allreduce_s(n, payload, latency_s=latency_s, bytes_per_s=bytes_per_s)
