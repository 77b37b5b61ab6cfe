"""The plan as a value: what it refuses, what identifies it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from covey.partition.errors import InvalidPlan
from covey.partition.plan import (
    LayerPlan,
    Member,
    Pipeline,
    PlanLimits,
    Span,
    StagePlan,
    make_plan,
)
from support.plans import layout, plan, stages

PLAN = plan(("a", 0, 2), ("b", 2, 4))
(CHAIN,) = PLAN.pipelines
GOLDEN_DIGEST = "aa082e5f58c5667c2cb4636c5a4991df56aa00202f52a344e6d2ff005df1d83e"


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [("a", 1, 4)],
        [("a", 0, 2), ("b", 3, 4)],
        [("a", 0, 3), ("b", 2, 4)],
        [("b", 2, 4), ("a", 0, 2)],
        [("a", 0, 2), ("a", 2, 4)],
        [(f"p{i}", i, i + 1) for i in range(65)],
    ],
)
def test_stages_that_do_not_cover_the_model_once_are_refused(
    spans: list[tuple[str, int, int]],
) -> None:
    with pytest.raises(InvalidPlan) as caught:
        make_plan(
            [Pipeline.of(stages(*spans))],
            PLAN.prediction,
            model_digest="m",
            epoch=1,
            proposer="a",
            engine="fp32",
        )
    assert caught.value.field == "plan.stages"


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (1, 1), (2, 1), (0, 1025)])
def test_a_span_is_not_empty_and_within_bounds(start: int, end: int) -> None:
    with pytest.raises(InvalidPlan):
        Span(start, end)


SPLITTABLE = replace(layout(4), n_kv_heads=3, mlp_columns=96)


def group(*shares: tuple[int, int], hub_idx: int = 0) -> StagePlan:
    members = (Member(name, *share) for name, share in zip("abcd", shares, strict=False))
    return StagePlan(Span(0, 4), tuple(members), hub_idx=hub_idx)


def test_the_members_of_a_group_hold_ranges_one_behind_the_other() -> None:
    pair = group((2, 32), (0, 32), (1, 32), hub_idx=1)
    pair.check_shares(SPLITTABLE)
    assert pair.hub == "b"
    assert [pair.kv_heads_of(i) for i in range(3)] == [(0, 2), (2, 2), (2, 3)]
    assert [pair.mlp_columns_of(i) for i in range(3)] == [(0, 32), (32, 64), (64, 96)]


@pytest.mark.parametrize(
    "shares", [((2, 32), (1, 32)), ((2, 48), (1, 48)), ((2, 64), (2, 32)), ((3, 96), (0, 0))]
)
def test_shares_that_are_not_all_of_a_block_are_refused(shares: tuple[tuple[int, int]]) -> None:
    with pytest.raises(InvalidPlan):
        group(*shares).check_shares(SPLITTABLE)


def test_a_model_without_kv_heads_to_share_cannot_be_split() -> None:
    with pytest.raises(InvalidPlan):
        group((2, 32), (1, 64)).check_shares(layout(4))


def test_one_member_alone_has_no_share() -> None:
    with pytest.raises(InvalidPlan):
        group((3, 96))


def test_pipelines_of_one_plan_share_no_member() -> None:
    one, other = Pipeline.of(stages(("a", 0, 4))), Pipeline.of(stages(("b", 0, 4)))
    prediction = replace(PLAN.prediction, memory_bytes=(("a", 1), ("b", 1)))
    both = replace(PLAN, pipelines=(one, other), prediction=prediction)
    assert both.peers == ("a", "b")
    with pytest.raises(InvalidPlan):
        replace(both, pipelines=(one, one))
    with pytest.raises(InvalidPlan):
        replace(both, pipelines=(one, Pipeline.of(stages(("b", 0, 3)))))


def test_indices_are_carried_exactly_in_front_of_shared_blocks() -> None:
    carrying = plan(("a", 0, 1), ("b", 1, 3), ("c", 3, 4), index_pattern="FSSF")
    (pipeline,) = carrying.pipelines
    assert pipeline.carries == (False, True, False, False)
    with pytest.raises(InvalidPlan):
        replace(carrying, pipelines=(replace(pipeline, carries=(False,) * 4),))


@pytest.mark.parametrize("pattern", ["SFFF", "FFF", "FFFX", "FxSF"])
def test_a_wrong_index_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidPlan):
        plan(("a", 0, 4), index_pattern=pattern)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"epoch": -1},
        {"proposer": ""},
        {"prediction": replace(PLAN.prediction, memory_bytes=(("b", 1), ("a", 1)))},
    ],
)
def test_a_plan_out_of_bounds_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    "change", [{"codecs": ("exact",)}, {"codecs": ("exact", "zip", "exact")}, {"carries": ()}]
)
def test_borders_have_one_known_codec_each(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan):
        replace(CHAIN, **change)


def test_the_digest_names_what_runs_and_not_how_fast() -> None:
    faster = replace(PLAN, prediction=replace(PLAN.prediction, tpot_s=0.5))
    assert faster.digest == PLAN.digest
    others = [
        replace(PLAN, epoch=2),
        replace(PLAN, proposer="b"),
        replace(PLAN, engine="bf16"),
        replace(PLAN, pipelines=(replace(CHAIN, codecs=("exact", "fp16", "exact")),)),
        plan(("a", 0, 1), ("b", 1, 4)),
        plan(("a", 0, 2), ("b", 2, 4), index_pattern="FFFF"),
    ]
    assert len({PLAN.digest, *(other.digest for other in others)}) == 7


def test_the_digest_stays_what_it_was() -> None:
    # Members of different versions must name one plan alike; a change needs a new PLAN_VERSION.
    assert PLAN.digest == GOLDEN_DIGEST


@pytest.mark.parametrize(
    "limits",
    [
        PlanLimits(n_blocks=5),
        PlanLimits(peers=frozenset({"a"})),
        PlanLimits(max_stages=1),
        PlanLimits(max_bytes=10),
    ],
)
def test_decode_keeps_the_readers_limits(limits: PlanLimits) -> None:
    assert LayerPlan.decode(PLAN.encode()) == PLAN
    with pytest.raises(InvalidPlan):
        LayerPlan.decode(PLAN.encode(), limits)


def test_an_unknown_field_is_refused() -> None:
    value = {**msgspec.msgpack.decode(PLAN.encode()), "zeal": 1}
    with pytest.raises(InvalidPlan):
        LayerPlan.decode(msgspec.msgpack.encode(value, order="sorted"))


def test_another_order_of_keys_is_refused() -> None:
    value = dict(reversed(msgspec.msgpack.decode(PLAN.encode()).items()))
    with pytest.raises(InvalidPlan):
        LayerPlan.decode(msgspec.msgpack.encode(value))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(InvalidPlan):
        LayerPlan.decode(b"\x81\xa1x" + b"\x91" * 60_000)


def test_stage_of_finds_a_member_or_nothing() -> None:
    assert PLAN.stage_of("b") == StagePlan.alone("b", 2, 4)
    assert PLAN.stage_of("c") is None
    assert PLAN.peers == ("a", "b")
