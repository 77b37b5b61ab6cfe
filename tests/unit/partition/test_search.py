"""The search on questions with known answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from covey.partition.errors import InvalidPlan, PlanInfeasible
from covey.partition.front.search import Front, pareto_front
from covey.partition.plan import border_bytes_per_token
from covey.partition.profile import Workload
from covey.partition.scope import CHAINS
from support.plans import device, layout, link, stages


def spans(front: Front) -> list[list[tuple[str, int, int]]]:
    return [
        [(stage.hub, stage.span.start, stage.span.end) for stage in point.stages]
        for point in front.points
    ]


def test_one_machine_is_an_ordinary_answer() -> None:
    far = link("fast", "slow", rtt_s=0.5)
    devices = [device("fast"), device("slow", decode_s=0.1, prefill_s=0.1)]
    front = pareto_front(layout(4), devices, [far], request=Workload(n_sessions=1))
    assert spans(front) == [[("fast", 0, 4)]]
    assert front.best_single == front.points[0]
    assert front.exact


def test_a_second_machine_buys_throughput_when_sessions_abound() -> None:
    devices = [device("a"), device("b")]
    front = pareto_front(
        layout(4), devices, [link("a", "b")], request=Workload(n_sessions=8), scope=CHAINS
    )
    assert stages(("a", 0, 2), ("b", 2, 4)) in [point.stages for point in front.points]


def test_a_model_too_large_for_one_is_split_where_memory_says() -> None:
    devices = [device("a", memory=300), device("b", memory=100)]
    front = pareto_front(layout(4), devices, [link("a", "b")])
    # b first: the head's work falls to the device with fewer blocks, which helps the throughput.
    assert spans(front) == [[("b", 0, 1), ("a", 1, 4)]]
    assert front.best_single is None
    assert front.no_single_because == "no device holds all 4 blocks; a holds 3"


def test_the_heads_weights_count_on_the_first_stage() -> None:
    devices = [device("a", memory=300), device("b", memory=300)]
    front = pareto_front(layout(4, head_weights=150), devices, [link("a", "b")])
    assert {tuple(point[0]) for point in spans(front)} <= {("a", 0, 1), ("b", 0, 1)}


def test_a_capped_device_runs_no_more_than_its_cap() -> None:
    devices = [device("a", max_blocks=3), device("b", max_blocks=1), device("c", max_blocks=0)]
    links = [link(one, other) for one, other in combinations("abc", 2)]
    front = pareto_front(layout(4), devices, links)
    assert {len(point) for point in spans(front)} == {2}
    assert {stage[0] for point in spans(front) for stage in point} == {"a", "b"}


def test_a_given_head_is_kept_though_it_runs_no_block() -> None:
    devices = [device("head", max_blocks=0), device("a")]
    front = pareto_front(layout(4), devices, [link("head", "a")], head="head")
    assert spans(front) == [[("a", 0, 4)]]
    sent = border_bytes_per_token(layout(4), front.points[0].pipelines[0].codecs[0])
    hop_s = 0.001 + sent / 1e6
    assert front.points[0].prediction.tpot_s == pytest.approx(0.04 + 0.001 + 2 * hop_s)


def test_a_slow_link_is_left_out() -> None:
    devices = [device(name, memory=200) for name in "abc"]
    links = [link("a", "b", rtt_s=1.0), link("a", "c"), link("b", "c")]
    front = pareto_front(layout(4), devices, links)
    assert all({stage[0] for stage in point} != {"a", "b"} for point in spans(front))


def test_a_cut_in_front_of_a_full_block_is_preferred() -> None:
    heavy = layout(4, index_bytes=100_000)
    devices = [device("a", memory=300), device("b", memory=300)]
    front = pareto_front(
        heavy, devices, [link("a", "b")], request=Workload(n_sessions=1), index_pattern="FSSF"
    )
    assert {point[0][2] for point in spans(front)} == {3}


def test_missing_blocks_and_bytes_are_told() -> None:
    with pytest.raises(PlanInfeasible, match="hold 3 of 4 blocks") as caught:
        pareto_front(
            layout(4), [device("a", memory=250), device("b", memory=100)], [], scope=CHAINS
        )
    assert (caught.value.missing_blocks, caught.value.missing_bytes) == (1, 100)


def test_missing_links_are_told() -> None:
    with pytest.raises(PlanInfeasible, match="no chain of linked devices") as caught:
        pareto_front(
            layout(4), [device("a", memory=200), device("b", memory=200)], [], scope=CHAINS
        )
    assert (caught.value.missing_blocks, caught.value.missing_bytes) == (0, 0)


def test_no_device_at_all_is_told() -> None:
    with pytest.raises(PlanInfeasible) as caught:
        pareto_front(layout(4), [], [])
    assert caught.value.missing_blocks == 4


def test_a_doubled_or_foreign_profile_is_refused() -> None:
    with pytest.raises(InvalidPlan):
        pareto_front(layout(4), [device("a"), device("a")], [])
    with pytest.raises(InvalidPlan):
        pareto_front(layout(4), [device("a")], [], head="b")


def test_many_devices_are_searched_within_bounds_and_it_is_said() -> None:
    names = [f"p{i:02}" for i in range(20)]
    devices = [device(name, decode_s=0.01 + 0.0007 * i, memory=500) for i, name in enumerate(names)]
    links = [
        link(one, other, rtt_s=0.001 * (1 + (ord(one[2]) * ord(other[1])) % 5))
        for one, other in combinations(names, 2)
    ]
    front = pareto_front(layout(12), devices, links)
    assert not front.exact
    for point in front.points:
        assert point.stages[-1].span.end == 12


def test_more_devices_than_are_considered_still_give_a_front() -> None:
    devices = [device(f"p{i:02}", decode_s=0.01 + i * 1e-4) for i in range(70)]
    front = pareto_front(layout(2), devices, [])
    assert spans(front) == [[(f"p0{i}", 0, 2) for i in range(4)]]
    assert not front.exact


def test_weights_stream_only_where_no_plan_has_them_in_memory() -> None:
    heavy = layout(8, block_bytes=(1000,) * 8)
    small, large = device("a", memory=4000), device("b", memory=8000)
    resident = pareto_front(heavy, [small, large], [])
    assert [stage.members[0].streamed_blocks for stage in resident.points[0].stages] == [0]
    streaming = pareto_front(heavy, [small], [])
    (stage,) = streaming.points[0].stages
    # Two blocks are held to read through, two stay: six stream.
    assert stage.members[0].streamed_blocks == 6
    assert streaming.points[0].prediction.memory_bytes == (("a", 4000),)
    assert streaming.best_single == streaming.points[0]
    with pytest.raises(PlanInfeasible, match="hold 4 of 8 blocks"):
        pareto_front(heavy, [small], [], scope=CHAINS)


def test_groups_are_of_one_engine() -> None:
    model = replace(layout(4), n_kv_heads=4, mlp_columns=1024)
    near = link("a", "b", rtt_s=0.0, bandwidth=1e12)
    one, other = device("a"), device("b")
    assert any(
        stage.is_group for stage in pareto_front(model, [one, other], [near]).points[0].stages
    )
    other = replace(other, engine="native")
    front = pareto_front(model, [one, other], [near])
    assert not any(stage.is_group for point in front.points for stage in point.stages)


def test_borders_get_the_codec_of_their_link() -> None:
    devices = [device("a", memory=300), device("b", memory=300)]
    fast = pareto_front(layout(4), devices, [link("a", "b", bandwidth=1e9)])
    slow = pareto_front(layout(4), devices, [link("a", "b", bandwidth=1e4)])
    assert {point.pipelines[0].codecs[1] for point in fast.points} == {"exact"}
    assert {point.pipelines[0].codecs[1] for point in slow.points} == {"int4"}
    # The first border joins the head with itself.
    assert {point.pipelines[0].codecs[0] for point in slow.points} == {"exact"}


def test_machines_that_hold_the_model_serve_side_by_side_where_sessions_abound() -> None:
    devices, links = [device("a"), device("b", decode_s=0.02)], [link("a", "b")]
    crowd = Workload(n_sessions=8)
    front = pareto_front(layout(4), devices, links, request=crowd)
    apart = [point for point in front.points if len(point.pipelines) > 1]
    assert stages(("a", 0, 4), ("b", 0, 4)) in [point.stages for point in apart]
    alone = pareto_front(layout(4), devices[:1], [], request=crowd).points[0].prediction
    best = max(point.prediction.throughput_tok_per_s for point in front.points)
    assert best > 1.4 * alone.throughput_tok_per_s
    # Nobody gains by a second pipeline who is alone.
    lonely = pareto_front(layout(4), devices, links, request=Workload(n_sessions=1))
    assert {len(point.pipelines) for point in lonely.points} == {1}
