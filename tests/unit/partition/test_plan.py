"""The plan as a value: what it refuses, what identifies it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from covey.partition.errors import InvalidPlan
from covey.partition.plan import LayerPlan, Member, PlanLimits, Span, StagePlan, make_plan
from support.plans import plan, stages

PLAN = plan(("a", 0, 2), ("b", 2, 4))
GOLDEN_DIGEST = "bc9394610c19476508133e34bfff36e94f2797807f28ecd414113ad76301f17a"


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
            stages(*spans), PLAN.prediction, model_digest="m", epoch=1, proposer="a", engine="fp32"
        )
    assert caught.value.field == "plan.stages"


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (1, 1), (2, 1), (0, 1025)])
def test_a_span_is_not_empty_and_within_bounds(start: int, end: int) -> None:
    with pytest.raises(InvalidPlan):
        Span(start, end)


def test_shares_of_a_group_add_up_to_one() -> None:
    group = StagePlan(Span(0, 1), (Member("a", 1, 3), Member("b", 2, 3)), hub_idx=1)
    assert group.hub == "b"
    with pytest.raises(InvalidPlan):
        StagePlan(Span(0, 1), (Member("a", 1, 3), Member("b", 1, 3)))


def test_a_share_has_one_spelling() -> None:
    with pytest.raises(InvalidPlan):
        Member("a", 2, 4)


def test_indices_are_carried_exactly_in_front_of_shared_blocks() -> None:
    carrying = plan(("a", 0, 1), ("b", 1, 3), ("c", 3, 4), index_pattern="FSSF")
    assert carrying.carries == (False, True, False, False)
    with pytest.raises(InvalidPlan):
        replace(carrying, carries=(False,) * 4)


@pytest.mark.parametrize("pattern", ["SFFF", "FFF", "FFFX", "FxSF"])
def test_a_wrong_index_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidPlan):
        plan(("a", 0, 4), index_pattern=pattern)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"epoch": -1},
        {"codecs": ("exact",)},
        {"codecs": ("exact", "zip", "exact")},
        {"carries": ()},
        {"proposer": ""},
        {"prediction": replace(PLAN.prediction, memory_bytes=(("b", 1), ("a", 1)))},
    ],
)
def test_a_plan_out_of_bounds_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidPlan):
        replace(PLAN, **change)


def test_the_digest_names_what_runs_and_not_how_fast() -> None:
    faster = replace(PLAN, prediction=replace(PLAN.prediction, tpot_s=0.5))
    assert faster.digest == PLAN.digest
    others = [
        replace(PLAN, epoch=2),
        replace(PLAN, proposer="b"),
        replace(PLAN, engine="bf16"),
        replace(PLAN, codecs=("exact", "fp16", "exact")),
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
