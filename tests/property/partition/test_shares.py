"""Shares of a group are the best there are, and its figures the same for everybody."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from covey.partition.cost import Network
from covey.partition.group import group_term
from covey.partition.plan import Span, StagePlan
from covey.partition.profile import Workload
from covey.partition.shares import handed_out
from covey.partition.speed import GRID_S
from support.plans import device, layout, link

SECONDS = st.floats(1e-4, 1.0)


@given(
    st.integers(1, 9),
    st.lists(st.tuples(SECONDS, st.floats(0.0, 0.5)), min_size=1, max_size=3),
)
def test_no_other_way_to_hand_out_parts_is_done_sooner(
    n_parts: int, workers: list[tuple[float, float]]
) -> None:
    whole_s, delays = zip(*workers, strict=True)

    def done_s(counts: tuple[int, ...]) -> float:
        return max(
            delay + count * seconds / n_parts
            for count, seconds, delay in zip(counts, whole_s, delays, strict=True)
            if count
        )

    counts = handed_out(n_parts, whole_s, delays)
    assert sum(counts) == n_parts
    ways = product(range(n_parts + 1), repeat=len(workers))
    best_s = min(done_s(way) for way in ways if sum(way) == n_parts)
    assert done_s(tuple(counts)) <= best_s * (1 + 1e-9)


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-5, 10.0), min_size=2, max_size=4),
    st.floats(0.0, 0.1),
    st.floats(1e3, 1e12),
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0.0, 1.0),
    st.integers(1, 9),
)
def test_a_groups_shares_are_a_plan_and_its_figures_add_up(
    speeds: list[float],
    rtt_s: float,
    bandwidth: float,
    n_kv_heads: int,
    n_units: int,
    attention_share: float,
    n_sessions: int,
) -> None:
    model = replace(
        layout(2),
        n_kv_heads=n_kv_heads,
        mlp_columns=32 * n_units,
        attention_share=attention_share,
    )
    peers = "abcd"[: len(speeds)]
    devices = [device(p, decode_s=s, prefill_s=s / 9) for p, s in zip(peers, speeds, strict=True)]
    network = Network(
        [link(a, b, rtt_s=rtt_s, bandwidth=bandwidth) for a in peers for b in peers if a < b]
    )
    term = group_term(model, devices, network, Workload(n_sessions=n_sessions), hub=peers[-1])
    assume(term is not None)
    assert term is not None
    StagePlan(Span(0, 2), term.members, term.hub_idx).check_shares(model)
    assert term.members[term.hub_idx].peer_id == peers[-1]
    assert 0 <= term.compute_s <= term.decode_s[0] + GRID_S
    for seconds in (*term.decode_s, term.chunk_s, term.compute_s):
        assert (seconds / GRID_S).is_integer()
    assert list(term.decode_s) == sorted(term.decode_s)
