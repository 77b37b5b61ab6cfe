"""Agreement: whose turn it is, what is refused, what is active, when to move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from covey.partition.activation import (
    HORIZON_S,
    PENDING_S,
    active_plan,
    highest_active_epoch,
    proposer_for,
    should_propose,
    should_replace,
    transfer_s,
    valid_proposals,
)
from covey.partition.plan import LayerPlan, Member, Pipeline, Prediction, Span, StagePlan
from support.plans import device, layout, link, plan

DEVICES = {name: device(name) for name in "abc"}
LINKS = [link("a", "b"), link("a", "c"), link("b", "c")]
OLD = plan(("a", 0, 2), ("b", 2, 4), epoch=1)
NEW = plan(("a", 0, 2), ("c", 2, 4), epoch=2)


def ready(*plans: LayerPlan) -> dict[str, set[str]]:
    return {one.digest: set(one.peers) for one in plans}


def active(plans: list[LayerPlan], said: dict[str, set[str]], live: str) -> LayerPlan | None:
    return active_plan(plans, said, set(live), layout(), DEVICES, LINKS)


def test_the_lowest_live_peer_proposes() -> None:
    assert proposer_for({"b", "c"}, now=0.0) == "b"
    assert proposer_for(set(), now=0.0) is None


def test_a_silent_proposer_is_passed_over_after_five_seconds() -> None:
    since = {"a": 10.0}
    assert proposer_for("abc", now=14.9, silent_since=since) == "a"
    assert proposer_for("abc", now=15.0, silent_since=since) == "b"


def test_when_all_are_silent_the_lowest_proposes() -> None:
    assert proposer_for("ab", now=9.0, silent_since={"a": 0.0, "b": 0.0}) == "a"


def test_others_may_propose_for_a_model_that_stays_uncovered() -> None:
    assert should_propose("a", "ab", pending_for_s=None, uncovered_for_s=None)
    assert not should_propose("b", "ab", pending_for_s=None, uncovered_for_s=5.0)
    assert should_propose("b", "ab", pending_for_s=None, uncovered_for_s=5.1)
    assert should_propose(
        "b", "ab", pending_for_s=None, uncovered_for_s=None, silent_for_s={"a": 5}
    )


def test_nobody_proposes_while_a_proposal_is_loading() -> None:
    assert not should_propose("a", "ab", pending_for_s=PENDING_S - 1, uncovered_for_s=9.0)
    assert should_propose("a", "ab", pending_for_s=PENDING_S, uncovered_for_s=None)


def test_an_epoch_may_run_one_ahead_of_the_active_one() -> None:
    plans = [OLD, NEW, replace(NEW, epoch=3)]
    assert highest_active_epoch(plans, ready(OLD)) == 1
    assert valid_proposals(plans, layout(), DEVICES, ready(OLD)) == [NEW, OLD]


def test_a_plan_that_became_active_counts_though_its_predecessors_are_gone() -> None:
    later = replace(NEW, epoch=9)
    assert valid_proposals([later], layout(), DEVICES, ready(later)) == [later]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(OLD, model_digest="other"),
        replace(OLD, engine="bf16"),
        plan(("a", 0, 3)),
        plan(("a", 0, 2), ("stranger", 2, 4)),
    ],
)
def test_a_plan_that_cannot_run_is_refused(wrong: LayerPlan) -> None:
    assert valid_proposals([wrong], layout(), DEVICES, {}) == []


def test_a_plan_beyond_what_a_device_gives_is_refused() -> None:
    for small in (device("b", max_blocks=1), device("b", memory=199)):
        assert valid_proposals([OLD], layout(), {**DEVICES, "b": small}, {}) == []


SPLIT = replace(layout(), n_kv_heads=2, mlp_columns=128, mlp_quantum=32, attention_share=0.5)


def grouped(*members: Member, start: int = 0, end: int = 4, epoch: int = 1) -> LayerPlan:
    stage = StagePlan(Span(start, end), members)
    memory = tuple((member.peer_id, 1) for member in members)
    return replace(
        plan(("a", 0, 4), epoch=epoch),
        pipelines=(Pipeline.of((stage,)),),
        prediction=replace(OLD.prediction, memory_bytes=memory),
    )


EVEN = grouped(Member("a", 1, 64), Member("b", 1, 64))


def test_a_group_whose_shares_are_the_whole_of_each_block_may_be_loaded() -> None:
    assert valid_proposals([EVEN], SPLIT, DEVICES, {}) == [EVEN]
    uneven = grouped(Member("a", 2, 96), Member("b", 0, 32))
    assert valid_proposals([uneven], SPLIT, DEVICES, {}) == [uneven]


@pytest.mark.parametrize(
    "wrong",
    [
        grouped(Member("a", 1, 64), Member("b", 2, 64)),
        grouped(Member("a", 1, 64), Member("b", 0, 64)),
        grouped(Member("a", 1, 64), Member("b", 1, 32)),
        grouped(Member("a", 1, 48), Member("b", 1, 80)),
        grouped(Member("a", 1, 64), Member("stranger", 1, 64)),
        grouped(Member("a", 1, 64), Member("b", 1, 64), end=3),
    ],
)
def test_a_group_with_wrong_shares_members_or_blocks_is_refused(wrong: LayerPlan) -> None:
    assert valid_proposals([wrong], SPLIT, DEVICES, {}) == []


def test_a_group_for_a_model_that_cannot_be_split_is_refused() -> None:
    assert valid_proposals([EVEN], layout(), DEVICES, {}) == []


def test_a_spoke_gives_room_for_its_share_and_no_more() -> None:
    for memory, n_valid in ((200, 1), (199, 0)):
        devices = {**DEVICES, "b": device("b", memory=memory)}
        assert len(valid_proposals([EVEN], SPLIT, devices, {})) == n_valid
    capped = {**DEVICES, "b": device("b", max_blocks=3)}
    assert valid_proposals([EVEN], SPLIT, capped, {}) == []


def test_blocks_that_stream_take_no_room_but_for_two() -> None:
    stage = StagePlan.alone("a", 0, 4, streamed_blocks=4)
    streamed = replace(plan(("a", 0, 4)), pipelines=(Pipeline.of((stage,)),))
    for memory, n_valid in ((200, 1), (199, 0)):
        devices = {"a": device("a", memory=memory)}
        assert len(valid_proposals([streamed], layout(), devices, {})) == n_valid


def test_of_several_pipelines_each_is_judged() -> None:
    both = replace(
        OLD,
        pipelines=(*OLD.pipelines, *plan(("c", 0, 4)).pipelines),
        prediction=replace(OLD.prediction, memory_bytes=tuple((peer, 1) for peer in "abc")),
    )
    assert valid_proposals([both], layout(), DEVICES, {}) == [both]
    small = {**DEVICES, "c": device("c", memory=399)}
    assert valid_proposals([both], layout(), small, {}) == []


def test_a_plan_from_or_with_a_revoked_member_is_refused() -> None:
    by_c = replace(OLD, proposer="c")
    assert valid_proposals([OLD, by_c], layout(), DEVICES, {}, members="ab") == [OLD]
    assert valid_proposals([OLD], layout(), DEVICES, {}, members="a") == []


def test_the_highest_ready_epoch_is_active() -> None:
    assert active([OLD, NEW], ready(OLD), "abc") == OLD
    assert active([OLD, NEW], ready(OLD, NEW), "abc") == NEW


def test_a_plan_waits_for_its_last_stage() -> None:
    assert active([OLD], {OLD.digest: {"a"}}, "abc") is None


def test_a_plan_without_one_of_its_members_gives_way() -> None:
    assert active([OLD, NEW], ready(OLD, NEW), "ab") == OLD
    assert active([OLD, NEW], ready(OLD, NEW), "bc") is None


def test_within_an_epoch_the_better_score_then_the_digest_decides() -> None:
    alone = plan(("a", 0, 4))
    other = replace(OLD, proposer="b")
    assert active([OLD, alone], ready(OLD, alone), "abc") in {OLD, alone}
    assert active([OLD, other], ready(OLD, other), "abc") == min(
        (OLD, other), key=lambda one: one.digest
    )


def prediction(seconds: float) -> Prediction:
    return Prediction(
        ttft_s=seconds,
        tpot_s=seconds,
        throughput_tok_per_s=1 / seconds,
        memory_bytes=(("a", 1),),
    )


def test_a_plan_moves_for_more_than_fifteen_per_cent() -> None:
    assert not should_replace(prediction(1.0), prediction(0.86), "balanced")
    assert should_replace(prediction(1.0), prediction(0.84), "balanced")


def test_a_plan_that_can_no_longer_be_priced_is_replaced() -> None:
    assert should_replace(None, prediction(9.0), "balanced")


def test_a_move_has_to_pay_its_transfer() -> None:
    half = (prediction(1.0), prediction(0.5), "balanced")
    assert should_replace(*half, transfer_s=0.49 * HORIZON_S)  # type: ignore[arg-type]
    assert not should_replace(*half, transfer_s=0.51 * HORIZON_S)  # type: ignore[arg-type]


def test_only_new_blocks_are_transferred() -> None:
    assert transfer_s(OLD, OLD, layout(), DEVICES, LINKS) == 0.0
    slow = [link("a", "c", bandwidth=50.0), link("b", "c", bandwidth=100.0)]
    assert transfer_s(OLD, NEW, layout(), DEVICES, slow) == pytest.approx(2.0)
    assert transfer_s(None, NEW, layout(), DEVICES, slow) == pytest.approx(200 / 1e6)
    assert transfer_s(OLD, NEW, layout(), {"a": device("a")}, slow) == math.inf


def test_of_a_grown_share_only_the_rest_is_transferred() -> None:
    slow = [link("a", "b", bandwidth=100.0)]

    def moved_s(before: LayerPlan, after: LayerPlan) -> float:
        return transfer_s(before, after, SPLIT, DEVICES, slow)

    assert moved_s(EVEN, EVEN) == 0.0
    more = grouped(Member("a", 1, 32), Member("b", 1, 96))
    assert moved_s(EVEN, more) == pytest.approx(0.5 * 400 * 32 / 128 / 100)
    assert moved_s(more, EVEN) == pytest.approx(0.5 * 400 * 32 / 128 / 100)
    # Who ran all of a block alone has every share of it.
    alone = plan(("a", 0, 4))
    assert moved_s(alone, EVEN) == pytest.approx(200 / 100)
    assert moved_s(EVEN, alone) == pytest.approx(200 / 100)


def test_members_that_change_places_transfer_their_whole_shares() -> None:
    slow = [link("a", "b", bandwidth=100.0)]
    swapped = grouped(Member("b", 1, 64), Member("a", 1, 64))
    assert transfer_s(EVEN, swapped, SPLIT, DEVICES, slow) == pytest.approx(200 / 100)
