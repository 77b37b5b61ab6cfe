"""The twenty labs as data, and what is saved of them."""

from __future__ import annotations

from testbed.cases import CASES
from testbed.figures import Figures, Tried
from testbed.fleet import MAX_LOAD
from testbed.labs.plan import saved

from covey.cli.plan_plot import measured_points


def test_there_are_twenty_labs_of_their_own_and_both_published_settings_are_among_them() -> None:
    assert len({case.name for case in CASES}) == 20
    links = {member.link for case in CASES for member in case.members}
    assert {"tpi-llm", "paretopipe"} <= links


def test_the_devices_of_each_lab_may_all_compute_at_once() -> None:
    for case in CASES:
        assert sum(member.speed for member in case.members) <= MAX_LOAD, case.name


def test_what_is_saved_can_be_drawn() -> None:
    figures = Figures(ttft_s=1.0, tpot_s=0.1, tokens_per_s=12.0)
    tried = Tried(lab="a", plan="b", rules=("c", "d"), predicted=figures, measured=figures)
    (point,) = measured_points([saved(tried)], "here")
    assert (point.label, point.ttft_s, point.tpot_s) == ("c", 1.0, 0.1)
    assert point.throughput_tok_per_s == 12.0
