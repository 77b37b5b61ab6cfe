"""What is shown of the plan that runs."""

from __future__ import annotations

from dataclasses import replace

from covey.node.plan_facts import active_facts
from covey.node.route import Route
from covey.partition.evaluate import World, evaluate
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
