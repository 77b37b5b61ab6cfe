"""Who in a group is slow, by the clock of whoever adds the partial sums."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.group.all_reduce import Round
from covey.node.group_watch import SUM_SLACK_S, WAY_SLACK, GroupWatch, later_than_said
from covey.node.observing import MIN_STEPS
from covey.node.planning_state import ModelState
from covey.partition.memory import weight_share
from covey.partition.plan import Member, Span, StagePlan
from support.node_core import MODEL_DIGEST
from support.plans import device, layout, link

OWN, OTHER = "alice", "bob"
N_BLOCKS = 4
WAY_S = 0.002
HALF_S = 0.010  # that each should take between two sums
LAYOUT = replace(
    layout(N_BLOCKS), digest=MODEL_DIGEST, n_kv_heads=2, mlp_columns=64, attention_share=0.5
)
STAGE = StagePlan(Span(0, N_BLOCKS), (Member(OWN, 1, 32), Member(OTHER, 1, 32)))
NBYTES = 2 * LAYOUT.hidden_size


def sums(
    arrived_s: float, word_s: float = HALF_S, *, n_steps: int = MIN_STEPS, nbytes: int = NBYTES
) -> list[Round]:
    return [
        Round("direct", 0, number, nbytes, (HALF_S, word_s), (0.0, arrived_s), 0.0)
        for number in range(n_steps * 2 * N_BLOCKS)
    ]


def judged(rounds: list[Round]) -> dict[int, float]:
    return later_than_said(rounds, 0, N_BLOCKS, (2 * HALF_S,) * 2, (0.0, WAY_S))


def test_a_member_whose_parts_come_as_soon_as_ours_is_what_it_says() -> None:
    assert judged(sums(0.0)) == {1: pytest.approx(1.0)}
    assert judged(sums(WAY_S)) == {1: pytest.approx(1.0)}


def test_a_member_that_is_late_is_slow_whatever_it_says() -> None:
    late_s = 9 * HALF_S + WAY_SLACK * WAY_S + SUM_SLACK_S
    assert judged(sums(late_s)) == {1: pytest.approx(10.0)}


def test_a_word_counts_as_far_as_our_clock_allows() -> None:
    assert judged(sums(0.0, word_s=99.0)) == {1: pytest.approx(1.0)}
    assert judged(sums(0.0, word_s=HALF_S / 2)) == {1: pytest.approx(0.5)}


def test_a_step_in_which_it_was_late_is_none() -> None:
    rounds = sums(0.0) + sums(1.0, n_steps=2)
    assert judged(rounds) == {1: pytest.approx(1.0)}


def test_who_has_no_part_and_we_ourselves_are_not_judged() -> None:
    assert later_than_said(sums(1.0), 0, N_BLOCKS, (HALF_S, 0.0), (0.0, WAY_S)) == {}
    assert later_than_said([], 0, N_BLOCKS, (HALF_S, HALF_S), (0.0, WAY_S)) == {}


@dataclass
class Hub:
    """A hub with its group, and what it says of the other."""

    rounds: deque[Round] = field(default_factory=deque)
    said: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        devices = {
            name: replace(device(name, decode_s=4 * HALF_S), model_digest=MODEL_DIGEST)
            for name in (OWN, OTHER)
        }
        links = (link(OWN, OTHER, bandwidth=1e9), link(OTHER, OWN, bandwidth=1e9))
        plan = SimpleNamespace(model_digest=MODEL_DIGEST)
        held = SimpleNamespace(
            route=SimpleNamespace(plan=plan, digest="plan"), stage=STAGE, rounds=self.rounds
        )
        model = SimpleNamespace(digest=MODEL_DIGEST, layout=LAYOUT)
        self.watch = GroupWatch(
            OWN,
            cast("Any", [held]),
            cast("Any", SimpleNamespace(by_digest=lambda _: model)),
            cast("Any", SimpleNamespace(found=lambda _, __, ratios: self.said.append(ratios))),
            lambda _: ModelState({}, links, (), {}, None, devices),
        )


def test_a_hub_looks_at_each_sum_once_and_at_steps_of_one_row_only() -> None:
    assert weight_share(LAYOUT, STAGE.members[1]) == 0.5
    hub = Hub()
    hub.rounds.extend(sums(0.0, nbytes=128 * NBYTES))
    hub.watch.look()
    assert hub.said == []
    hub.rounds.extend(sums(9 * HALF_S, n_steps=MIN_STEPS + 1))
    hub.watch.look()
    hub.watch.look()
    assert [dict(ratios) for ratios in hub.said] == [{OTHER: pytest.approx(10.0, rel=0.05)}]
    hub.rounds.clear()  # the group is formed anew
    hub.rounds.extend(sums(9 * HALF_S))
    hub.watch.look()
    assert len(hub.said) == 2
