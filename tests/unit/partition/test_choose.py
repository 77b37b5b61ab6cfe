"""Choosing and scoring."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from covey.partition.choose import (
    SCORE_STEP,
    Limits,
    choose,
    choose_within,
    cost,
    priced,
    rounded,
    score,
)
from covey.partition.errors import InvalidPlan
from covey.partition.front.search import Candidate, Front
from covey.partition.plan import Pipeline, Prediction, StagePlan
from support.plans import device, layout, link, plan

DEVICES = [device("a"), device("b")]
PLAN = plan(("a", 0, 2), ("b", 2, 4))


def candidate(name: str, ttft_s: float, tpot_s: float, throughput: float) -> Candidate:
    return Candidate(
        pipelines=(Pipeline.of((StagePlan.alone(name, 0, 4),)),),
        prediction=Prediction(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            throughput_tok_per_s=throughput,
            memory_bytes=((name, 1),),
        ),
    )


QUICK = candidate("quick", 1.0, 0.10, 10.0)
MIDDLE = candidate("middle", 1.0, 0.12, 25.0)
WIDE = candidate("wide", 2.0, 0.40, 30.0)
FRONT = Front(points=(QUICK, MIDDLE, WIDE), best_single=None, no_single_because="", exact=True)


def test_each_preference_has_its_own_choice() -> None:
    assert choose(FRONT, "latency") == QUICK
    assert choose(FRONT, "throughput") == WIDE
    assert choose(FRONT, "balanced") == MIDDLE


def test_the_choice_costs_least() -> None:
    assert cost(QUICK.prediction, "latency") == pytest.approx((1 + 127 * 0.1) / 128)
    assert cost(WIDE.prediction, "throughput") == pytest.approx(1 / 30)


def test_within_limits_the_choice_costs_least() -> None:
    at_least = Limits(min_throughput=26.0)
    assert choose_within(FRONT, "latency", at_least).candidate == WIDE
    soon = Limits(max_ttft_s=1.5)
    assert choose_within(FRONT, "throughput", soon).candidate == MIDDLE
    assert choose_within(FRONT, "throughput", soon).is_met
    assert choose_within(FRONT, "latency", Limits()).candidate == QUICK


def test_limits_that_nothing_meets_give_the_nearest_and_say_so() -> None:
    choice = choose_within(FRONT, "latency", Limits(max_ttft_s=0.5))
    assert choice.candidate == QUICK
    assert choice.unmet == (
        "no plan within the limits begins to answer within 0.5 s: "
        "this one takes 1 s, the soonest 1 s",
    )
    choice = choose_within(FRONT, "latency", Limits(max_ttft_s=1.5, min_throughput=28.0))
    assert choice.candidate == MIDDLE  # a tenth short of the throughput; the wide one a third late
    assert not choice.is_met
    assert choice.unmet == (
        "no plan within the limits does 28 tokens/s: this one does 25, the most is 30",
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_limits_that_are_no_figures_are_refused(wrong: float) -> None:
    with pytest.raises(InvalidPlan):
        Limits(max_ttft_s=wrong)
    with pytest.raises(InvalidPlan):
        Limits(min_throughput=wrong)


def test_a_limit_of_nothing_at_all_chooses_the_nearest() -> None:
    assert choose_within(FRONT, "latency", Limits(max_ttft_s=0.0)).candidate == QUICK


def test_a_plan_is_priced_with_all_its_pipelines_and_codecs() -> None:
    pipelines = (
        Pipeline.of((StagePlan.alone("a", 0, 2), StagePlan.alone("b", 2, 4))),
        Pipeline.of((StagePlan.alone("c", 0, 4),)),
    )
    memory = tuple((peer, 1) for peer in "abc")
    both = replace(
        PLAN, pipelines=pipelines, prediction=replace(PLAN.prediction, memory_bytes=memory)
    )
    devices = {name: device(name) for name in "abc"}
    one = priced(PLAN, layout(), devices, [link("a", "b")])
    two = priced(both, layout(), devices, [link("a", "b")])
    assert one is not None
    assert two is not None
    assert two.throughput_tok_per_s > one.throughput_tok_per_s
    coded = Pipeline.of(pipelines[0].stages, codecs=("exact", "int4", "int4"))
    less = priced(replace(PLAN, pipelines=(coded,)), layout(), devices, [link("a", "b")])
    assert less is not None
    assert less.tpot_s < one.tpot_s


def test_a_score_does_not_look_at_what_the_plan_predicts() -> None:
    boast = plan(("a", 0, 2), ("b", 2, 4), tpot_s=1e-9)
    links = [link("a", "b")]
    assert score(boast, layout(), DEVICES, links) == score(PLAN, layout(), DEVICES, links)


def test_a_small_difference_between_profiles_keeps_the_score() -> None:
    middle = SCORE_STEP ** round(math.log(0.05, SCORE_STEP))  # of its step
    assert rounded(middle * 1.02) == rounded(middle / 1.02) == pytest.approx(middle)
    assert rounded(middle * 1.06) > rounded(middle)


@pytest.mark.parametrize("wrong", [plan(("a", 0, 2), ("stranger", 2, 4)), plan(("a", 0, 5)), PLAN])
def test_a_plan_that_cannot_be_priced_scores_worst(wrong: object) -> None:
    assert score(wrong, layout(), DEVICES, []) == math.inf  # type: ignore[arg-type]
