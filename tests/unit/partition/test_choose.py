"""Choosing and scoring."""

from __future__ import annotations

import math

import pytest

from covey.partition.choose import SCORE_STEP, choose, cost, rounded, score
from covey.partition.plan import Pipeline, Prediction, StagePlan
from covey.partition.search import Candidate, Front
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
