"""What is shown of the plan that runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.plan_facts import Question, active_facts, plan_facts
from covey.node.planning_state import ModelState, Outlook
from covey.node.route import Route
from covey.node.service import PlanQuery
from covey.partition.evaluate import World, evaluate, front_or_reason
from covey.partition.observed import slowed
from covey.partition.profile import Workload
from support.plans import device, layout, link, plan

NAMES = {"alice": "attic", "bob": "barn"}
PLAN = plan(("alice", 0, 1), ("bob", 1, 4), tpot_s=1.0)
WORLD = World(
    layout=layout(4),
    devices={peer: device(peer) for peer in NAMES},
    links=(link("alice", "bob"),),
    request=Workload(),
)


def test_the_plan_that_runs_is_shown_with_what_it_should_do_now() -> None:
    facts = active_facts(Route.of(PLAN), WORLD, NAMES)
    assert facts is not None
    assert facts["tpot_s"] == evaluate(PLAN.pipelines, WORLD).prediction.tpot_s != 1.0
    assert [stage["name"] for stage in facts["stages"]] == ["attic", "barn"]


def test_without_a_members_profile_it_is_shown_with_what_its_proposer_said() -> None:
    world = replace(WORLD, devices={"alice": WORLD.devices["alice"]})
    facts = active_facts(Route.of(PLAN), world, NAMES)
    assert facts is not None
    assert facts["tpot_s"] == 1.0


def test_of_a_member_that_others_find_slow_it_is_said_by_how_much() -> None:
    claimed = {peer: device(peer) for peer in NAMES}
    devices = {**claimed, "bob": slowed(claimed["bob"], 10.0)}
    world, model = replace(WORLD, devices=devices), SimpleNamespace(name="m", digest="d")
    outlook = Outlook(
        model=cast("Any", model),
        state=ModelState(devices, world.links, (), {}, None, claimed),
        world=world,
        front=front_or_reason(world),
        active=None,
        why_not="it is a test",
        pinned=None,
    )

    def why(peer: str) -> dict[str, Any]:
        question = Question(query=PlanQuery(model="m"), prefer="latency", names=NAMES, why=peer)
        found: dict[str, Any] = plan_facts(outlook, question)["why"]
        return found

    assert why("bob")["slower_than_said"] == pytest.approx(10.0)
    assert "10.0 times slower than it says" in why("bob")["text"]
    assert why("alice")["slower_than_said"] == 1.0
    assert "than it says" not in why("alice")["text"]
