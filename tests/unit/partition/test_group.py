"""Groups: shares, and what a block takes, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from covey.partition.cost import Network, price
from covey.partition.errors import InvalidPlan, PlanInfeasible
from covey.partition.group import GroupTerm, group_term, shares_term, sum_bytes
from covey.partition.plan import Member, Span, StagePlan
from covey.partition.profile import DeviceProfile, ModelLayout, Workload
from support.plans import device, layout, link

BLOCK = replace(
    layout(4, block_bytes=(1000,) * 4, kv_bytes=10),
    n_kv_heads=4,
    mlp_columns=1024,
    attention_share=0.25,
)
ONE = Workload(prompt_tokens=1, n_sessions=1)
NEAR = Network([link(a, b, rtt_s=0.0, bandwidth=1e15) for a, b in ("ab", "ac", "bc")])


def group(
    *devices: DeviceProfile,
    network: Network = NEAR,
    model: ModelLayout = BLOCK,
    request: Workload = ONE,
    hub: str = "a",
) -> GroupTerm:
    term = group_term(model, devices, network, request, hub=hub)
    assert term is not None
    return term


def shares(term: GroupTerm) -> list[tuple[int, int]]:
    return [(member.kv_heads, member.mlp_columns) for member in term.members]


def test_equal_members_get_equal_shares_and_halve_the_time() -> None:
    term = group(device("a"), device("b"))
    assert shares(term) == [(2, 512), (2, 512)]
    assert term.decode_s == pytest.approx([0.005, 0.01, 0.02, 0.04])


def test_shares_follow_speed_heads_whole_and_columns_in_quanta() -> None:
    term = group(device("a", decode_s=0.01), device("b", decode_s=0.03))
    assert shares(term) == [(3, 768), (1, 256)]
    assert term.decode_s[0] == pytest.approx(0.0075)


def test_a_slow_spoke_may_get_columns_and_no_head() -> None:
    term = group(device("a", decode_s=0.01), device("b", decode_s=0.07))
    assert shares(term) == [(4, 896), (0, 128)]
    assert term.decode_s[0] == pytest.approx(0.25 * 0.01 + 0.75 * 0.01 * 7 / 8)


def test_a_member_that_would_get_nothing_makes_no_group() -> None:
    assert group_term(BLOCK, [device("a"), device("b", decode_s=9)], NEAR, ONE, hub="a") is None
    far = Network([link("a", "b", rtt_s=1.0)])
    assert group_term(BLOCK, [device("a"), device("b")], far, ONE, hub="a") is None


@pytest.mark.parametrize(
    "model",
    [
        layout(4),
        replace(BLOCK, n_kv_heads=0),
        replace(BLOCK, mlp_columns=31),
        replace(BLOCK, mlp_columns=1000),
    ],
)
def test_a_block_that_cannot_be_split_makes_no_group(model: ModelLayout) -> None:
    assert group_term(model, [device("a"), device("b")], NEAR, ONE, hub="a") is None


def test_a_hub_without_links_makes_no_group() -> None:
    assert group_term(BLOCK, [device("a"), device("b")], Network([]), ONE, hub="a") is None


def test_two_exchange_directly_once_for_each_half() -> None:
    network = Network([link("a", "b", rtt_s=0.001, bandwidth=1e6)])
    term = group(device("a", decode_s=0.04), device("b", decode_s=0.04), network=network)
    assert term.algorithm == "direct"
    assert term.decode_s[0] == pytest.approx(0.02 + 2 * (0.0005 + 1000 / 1e6))
    assert term.token_bytes == 2 * sum_bytes(BLOCK, "fp16") == 2 * 1000


def test_a_star_waits_for_spokes_and_for_the_hubs_wire() -> None:
    network = Network([link(a, b, rtt_s=0.001, bandwidth=4e6) for a, b in ("ab", "ac", "bc")])
    even = (Member("a", 2, 352), Member("b", 1, 352), Member("c", 1, 320))
    devices = [device(peer) for peer in "abc"]
    term = shares_term(BLOCK, devices, network, ONE, members=even, hub_idx=0)
    assert term is not None
    wire_s = 2 * 2 * 1000 / 4e6
    attention_s = max(0.0025 / 2, 0.0025 / 4 + 0.001 + wire_s)
    assert term.decode_s[0] == pytest.approx(attention_s + 0.0075 * 352 / 1024 + 0.001 + wire_s)


def test_a_hub_computes_while_partial_sums_travel() -> None:
    network = Network([link(a, b, rtt_s=0.001, bandwidth=1e9) for a, b in ("ab", "ac", "bc")])
    devices = [device(peer, decode_s=0.02) for peer in "abc"]
    fine = replace(BLOCK, n_kv_heads=64, mlp_columns=4096)
    term = group(*devices, network=network, model=fine)
    hub, *spokes = shares(term)
    assert all(hub[0] > heads and hub[1] > columns for heads, columns in spokes)
    # Three share the work; of two round trips, the hub's own computing hides a third.
    assert term.decode_s[0] == pytest.approx(0.02 / 3 + 2 * 0.001 * 2 / 3, rel=0.02)


def test_with_many_sessions_the_hub_gets_no_more_than_serves_all() -> None:
    network = Network([link(a, b, rtt_s=0.001, bandwidth=1e9) for a, b in ("ab", "ac", "bc")])
    devices = [device(peer, decode_s=0.004) for peer in "abc"]
    fine = replace(BLOCK, n_kv_heads=64, mlp_columns=4096)
    alone = group(*devices, network=network, model=fine)
    full = group(*devices, network=network, model=fine, request=replace(ONE, n_sessions=8))
    assert full.decode_s[3] < alone.decode_s[3]
    assert full.decode_s[0] > alone.decode_s[0]


def test_depth_weighs_on_attention_and_splitting_on_both_halves() -> None:
    deep = replace(device("a"), depth_s_per_block=1e-4, split_s_per_block=1e-3)
    request = Workload(prompt_tokens=36, n_sessions=1)
    term = group(deep, replace(deep, peer_id="b"), request=request)
    assert term.decode_s[0] == pytest.approx(0.005 + 100 * 1e-4 / 2 + 1e-3)


def test_partial_sums_of_a_long_chunk_go_round_a_ring() -> None:
    slow = [link(a, b, rtt_s=0.0001, bandwidth=1e5) for a, b in ("ab", "ac")]
    request = replace(ONE, prompt_tokens=128)
    devices = [device(peer, prefill_s=1e-6, decode_s=0.1) for peer in "abc"]
    even = (Member("a", 2, 352), Member("b", 1, 352), Member("c", 1, 320))
    star = shares_term(BLOCK, devices, Network(slow), request, members=even, hub_idx=0)
    closed = Network([*slow, link("b", "c", rtt_s=0.0001, bandwidth=1e5)])
    ring = shares_term(BLOCK, devices, closed, request, members=even, hub_idx=0)
    assert star is not None
    assert ring is not None
    assert star.chunk_s == pytest.approx(2 * 4 * 1.28, rel=0.01)
    assert ring.chunk_s == pytest.approx(2 * 4 / 3 * 1.28, rel=0.01)


def staged(members: Sequence[Member], **more: int) -> StagePlan:
    return StagePlan(Span(0, 4), tuple(members), **more)


def test_a_plans_group_is_priced_with_the_shares_it_has() -> None:
    devices = {peer: replace(device(peer), step_s=0.1) for peer in "ab"}
    stage = staged([Member("a", 1, 32), Member("b", 3, 992)])
    terms = price([stage], BLOCK, devices, NEAR, request=ONE)
    parts_s = 0.0025 * 3 / 4 + 0.0075 * 992 / 1024
    assert terms.stages[0].decode_s == pytest.approx(0.1 + 4 * parts_s)
    assert terms.stages[0].peers == ("a", "b")


def test_members_of_a_group_hold_their_shares_of_weights_and_cache() -> None:
    devices = {peer: device(peer) for peer in "ab"}
    stage = staged([Member("a", 1, 256), Member("b", 3, 768)])
    request = Workload(context_tokens=2, n_sessions=3)
    made = price([stage], replace(BLOCK, embedding_bytes=7), devices, NEAR, request=request)
    cache = 4 * 10 * 2 * 3
    held = (1000 + cache // 4 + 7, 3000 + cache * 3 // 4)
    assert made.stages[0].memory_bytes == held


def test_what_spokes_send_and_get_counts_on_their_links() -> None:
    devices = {peer: device(peer) for peer in "ab"}
    stage = staged([Member("a", 2, 512), Member("b", 2, 512)], hub_idx=1)
    made = price([stage], BLOCK, devices, NEAR, request=ONE)
    assert made.link_bytes() == (("a", "b", 4 * 2 * 1000), ("b", "a", 4 * 2 * 1000))


def test_a_group_without_links_or_with_wrong_shares_has_no_price() -> None:
    devices = {peer: device(peer) for peer in "ab"}
    with pytest.raises(PlanInfeasible, match="another of its group"):
        price(
            [staged([Member("a", 2, 512), Member("b", 2, 512)])],
            BLOCK,
            devices,
            Network([]),
            request=ONE,
        )
    with pytest.raises(InvalidPlan):
        price(
            [staged([Member("a", 2, 512), Member("b", 2, 500)])], BLOCK, devices, NEAR, request=ONE
        )
