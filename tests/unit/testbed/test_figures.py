"""Rows of the plan lab, and speeds of sessions, against figures worked out by hand."""

from __future__ import annotations

import pytest
from testbed.asker import tokens_per_s
from testbed.figures import (
    Figures,
    Tried,
    errors,
    ordered_pairs,
    percentile_90,
    prediction_rows,
    ratio_rows,
    ratios,
)

from covey.errors import CoveyError


def figures(ttft_s: float, tpot_s: float, tokens_per_s: float) -> Figures:
    return Figures(ttft_s=ttft_s, tpot_s=tpot_s, tokens_per_s=tokens_per_s)


def tried(lab: str, rule: str, predicted: Figures, measured: Figures) -> Tried:
    return Tried(lab=lab, plan=rule, rules=(rule,), predicted=predicted, measured=measured)


OURS = tried("one", "ours", figures(1.0, 0.1, 10.0), figures(1.25, 0.1, 8.0))
THEIRS = tried("one", "theirs", figures(2.0, 0.2, 10.1), figures(2.0, 0.15, 9.0))
OTHERS = tried("one", "others", figures(2.0, 0.3, 5.0), figures(1.0, 0.3, 4.0))
ELSEWHERE = tried("two", "ours", figures(1.0, 0.1, 10.0), figures(1.0, 0.1, 10.0))


def test_errors_are_shares_of_what_was_measured() -> None:
    assert errors([OURS], "TTFT") == [pytest.approx(0.2)]
    assert errors([OURS], "TPOT") == [0.0]
    assert errors([OURS], "throughput") == [pytest.approx(0.25)]


def test_pairs_are_compared_in_each_figure_but_for_ties_and_only_in_one_lab() -> None:
    # TTFT and TPOT as predicted; the throughputs were predicted to tie.
    assert ordered_pairs([OURS, THEIRS]) == [True, True]
    assert ordered_pairs([OURS, OTHERS]) == [False, True, True]
    assert ordered_pairs([OURS, ELSEWHERE]) == []


def test_ratios_are_over_the_best_rival_of_the_same_lab() -> None:
    everything = [OURS, THEIRS, OTHERS, ELSEWHERE]
    assert ratios(everything, "ours", ["theirs", "others"]) == {"one": pytest.approx(1.5)}
    assert ratios(everything, "ours", ["others"]) == {"one": pytest.approx(3.0)}


def test_a_plan_that_is_also_a_rivals_is_as_fast_as_it() -> None:
    both = Tried(
        lab="three",
        plan="",
        rules=("ours", "theirs"),
        predicted=OURS.predicted,
        measured=OURS.measured,
    )
    assert ratios([both], "ours", ["theirs"]) == {"three": 1.0}


def test_rows_have_the_targets() -> None:
    rows = {row.figure: row for row in prediction_rows([OURS, THEIRS, OTHERS])}
    assert rows["predicted over measured, all figures: median error"].target == 0.10
    assert rows["pairs of plans in the predicted order, of 7"].value == pytest.approx(6 / 7)
    worst, middle, over = ratio_rows([OURS, THEIRS], "ours", ["theirs"])
    assert (worst.target, middle.target, over.target) == (0.97, 1.25, None)
    assert worst.value == middle.value == over.value == pytest.approx(1.5)


def test_a_percentile_of_one_value_is_that() -> None:
    assert percentile_90([0.3]) == 0.3
    assert percentile_90([0.0, 1.0]) == pytest.approx(0.9)


def test_speed_is_taken_while_all_sessions_decode() -> None:
    # From 3 to 6: three pieces of one, and two of the other.
    steady = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    late = (3.0, 4.5, 6.0, 7.5)
    assert tokens_per_s([steady, late], 1.0) == pytest.approx(5 / 3)
    assert tokens_per_s([steady, late], 1.2) == pytest.approx(2.0)


def test_sessions_that_never_decode_together_have_no_speed() -> None:
    with pytest.raises(CoveyError, match="too short"):
        tokens_per_s([(1.0, 2.0), (3.0, 4.0)], 1.0)
