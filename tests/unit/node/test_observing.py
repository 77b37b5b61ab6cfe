"""What a head holds against the others: only what its own clock proves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.observing import (
    FEW_SESSIONS,
    MIN_STEPS,
    NOTE_EVERY_S,
    Observing,
    SeenStep,
    slower_than_said,
)
from covey.node.planning_state import EXPERIENCE_S, ModelState
from covey.partition.cost import Network, Terms, price
from covey.partition.plan import Member, Span, StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.store.schema import Experience
from covey.transport.messages import StageTrace
from support.node_core import MODEL_DIGEST, route_of
from support.plans import device, layout, link, stages
from support.swarm_keys import replica_of

OWN, OTHER, THIRD = "alice", "bob", "carol"
LAYOUT = replace(layout(12), digest=MODEL_DIGEST)
DEVICES = {
    name: replace(device(name, decode_s=0.01), model_digest=MODEL_DIGEST)
    for name in (OWN, OTHER, THIRD)
}
LINKS = tuple(link(a, b, bandwidth=1e9) for a in DEVICES for b in DEVICES if a != b)
TWO = ((OWN, 0, 4), (OTHER, 4, 12))
THREE = ((OWN, 0, 4), (OTHER, 4, 8), (THIRD, 8, 12))


def terms_of(made: Sequence[StagePlan], of: ModelLayout = LAYOUT) -> Terms:
    request = Workload(n_sessions=1)
    return price(made, of, DEVICES, Network(LINKS), request=request, head=OWN)


def step(took_s: float, *words: tuple[float, float]) -> SeenStep:
    """Words are (compute, queue) of each stage, in seconds."""
    trace = [StageTrace(int(c * 1e6), int(q * 1e6), 0) for c, q in words]
    return SeenStep(took_s, trace)


def judged(spans: Sequence[tuple[str, int, int]], *steps: SeenStep) -> dict[str, float]:
    return slower_than_said(terms_of(stages(*spans)), OWN, steps)


def test_an_honest_stage_is_about_what_it_says() -> None:
    found = judged(TWO, step(0.123, (0.04, 0), (0.08, 0)))
    assert found == {OTHER: pytest.approx(1.0)}


def test_a_stage_that_lies_about_what_it_took_is_given_away_by_our_clock() -> None:
    found = judged(TWO, step(0.043 + 0.8, (0.04, 0), (0.08, 0)))
    assert found[OTHER] == pytest.approx(10.0, rel=0.01)


def test_a_stage_that_owns_up_is_taken_at_its_word() -> None:
    assert judged(TWO, step(0.843, (0.04, 0), (0.8, 0)))[OTHER] == pytest.approx(10.0)


def test_our_own_work_and_our_own_queue_are_not_held_against_others() -> None:
    assert judged(TWO, step(2.123, (1.04, 1.0), (0.08, 0)))[OTHER] == pytest.approx(1.0)


def test_waiting_behind_others_is_believed_for_a_step_and_no_longer() -> None:
    assert judged(TWO, step(0.203, (0.04, 0), (0.08, 0.08)))[OTHER] == pytest.approx(1.0)
    lying = judged(TWO, step(0.843, (0.04, 0), (0.08, 0.72)))[OTHER]
    assert lying == pytest.approx(9.0, rel=0.01)


def test_a_link_that_is_slower_than_it_was_measured_is_not_the_stage_s_fault() -> None:
    slow = tuple(replace(each, rtt_s=0.2) for each in LINKS)
    terms = price(
        stages(*TWO), LAYOUT, DEVICES, Network(slow), request=Workload(n_sessions=1), head=OWN
    )
    assert slower_than_said(terms, OWN, [step(0.42, (0.04, 0), (0.08, 0))])[OTHER] == pytest.approx(
        1.0
    )


def test_what_no_stage_owns_up_to_is_shared_out_by_blocks() -> None:
    found = judged(THREE, step(0.124 + 0.36, (0.04, 0), (0.04, 0), (0.04, 0)))
    assert found == {OTHER: pytest.approx(5.5, rel=0.02), THIRD: pytest.approx(5.5, rel=0.02)}


def test_a_few_slow_steps_say_nothing() -> None:
    usual, slow = step(0.123, (0.04, 0), (0.08, 0)), step(9.0, (0.04, 0), (0.08, 0))
    assert judged(TWO, *[usual, slow, slow] * 4)[OTHER] == pytest.approx(1.0)


def test_a_member_that_runs_all_of_it_for_us_is_judged_too() -> None:
    found = judged(((OTHER, 0, 12),), step(1.204, (0.12, 0)))
    assert found == {OTHER: pytest.approx(10.0, rel=0.01)}


def test_a_head_that_is_slow_itself_takes_more_off() -> None:
    head = Head()
    head.session(2.0)
    head.devices[OWN] = replace(DEVICES[OWN], step_s=0.02)
    head.session(2.0)  # of the 0.08 s too much it may have been all but nothing itself
    assert head.said.peers[OTHER].decode_s_per_block < 0.02 * 0.9


def test_groups_are_left_out() -> None:
    of = replace(LAYOUT, n_kv_heads=2, mlp_columns=64)
    group = StagePlan(Span(4, 12), (Member(OTHER, 1, 32), Member(THIRD, 1, 32)))
    terms = terms_of((StagePlan.alone(OWN, 0, 4), group), of)
    assert slower_than_said(terms, OWN, [step(9.0, (0.04, 0), (0.08, 0))]) == {}


@dataclass
class Head:
    """A head with a replica and clocks that are set by hand."""

    devices: dict[str, DeviceProfile] = field(default_factory=lambda: dict(DEVICES))
    links: tuple[LinkProfile, ...] = LINKS
    now: float = 0.0

    def __post_init__(self) -> None:
        self.replica = replica_of(OWN)
        self.n_published = 0
        self.replica.on_local(self._count)
        self.observing = self.awake()

    def awake(self) -> Observing:
        return Observing(
            self.replica,
            OWN,
            lambda _: ModelState({}, self.links, (), {}, None, self.devices),
            clock=lambda: self.now,
            unix_clock=lambda: 1e9 + self.now,
        )

    def _count(self, _: bytes) -> None:
        self.n_published += 1

    def session(self, ratio: float, n_steps: int = MIN_STEPS) -> None:
        model: Any = SimpleNamespace(digest=MODEL_DIGEST, layout=LAYOUT)
        route = route_of(OWN, OTHER, spans=[(0, 4), (4, 12)], model_digest=MODEL_DIGEST)
        seen = step(0.043 + 0.08 * ratio, (0.04, 0), (0.08, 0))
        self.observing.saw(model, route, 128, [seen] * n_steps)

    @property
    def said(self) -> Experience:
        value = self.replica.get(OWN, f"experience/{MODEL_DIGEST}")
        return Experience.from_value(value)


def test_sessions_make_a_moving_average_that_is_published() -> None:
    head = Head()
    for ratio in (1.0, 1.0, 10.0):
        head.session(ratio)
    seen = head.said.peers[OTHER]
    assert seen.n_sessions == 3
    assert seen.decode_s_per_block == pytest.approx(0.055, rel=0.01)


def test_many_sessions_that_say_the_same_are_published_few_times() -> None:
    head = Head()
    for _ in range(100):
        head.session(1.0)
        head.now += 1.0
    assert head.n_published == FEW_SESSIONS
    for _ in range(100):
        head.session(3.0)
        head.now += 1.0
    assert head.n_published <= FEW_SESSIONS + 1 + 100 / NOTE_EVERY_S


def test_a_short_session_and_one_of_our_own_stages_say_nothing() -> None:
    head = Head()
    head.session(10.0, n_steps=MIN_STEPS - 1)
    model: Any = SimpleNamespace(digest=MODEL_DIGEST, layout=LAYOUT)
    alone = route_of(OWN, spans=[(0, 12)], model_digest=MODEL_DIGEST)
    head.observing.saw(model, alone, 128, [step(9.0, (0.04, 0))] * MIN_STEPS)
    assert head.n_published == 0


@pytest.mark.parametrize("what", ["links", "devices"])
def test_where_profiles_are_missing_nothing_is_said(what: str) -> None:
    head = Head()
    if what == "links":
        head.links = ()
    else:
        del head.devices[OTHER]
    head.session(10.0)
    assert head.n_published == 0


def test_what_was_seen_is_known_after_a_restart_and_forgotten_in_time() -> None:
    head = Head()
    head.session(10.0)
    head.observing = head.awake()
    head.session(10.0)
    assert head.said.peers[OTHER].n_sessions == 2
    head.now += EXPERIENCE_S + 1
    head.session(1.0)
    assert head.said.peers[OTHER].n_sessions == 1
    assert head.said.peers[OTHER].decode_s_per_block == pytest.approx(0.01, rel=0.01)


def test_a_record_of_ours_that_is_broken_is_written_anew() -> None:
    head = Head()
    head.replica.set(f"experience/{MODEL_DIGEST}", cast("Any", {"model": 7}))
    head.session(10.0)
    assert head.said.peers[OTHER].n_sessions == 1
