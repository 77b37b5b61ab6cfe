"""A plan that a person pins: read, checked, stored, and whether it can run now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from covey.node.errors import InvalidRequest
from covey.node.pins import (
    next_pin,
    pinned,
    pipelines_value,
    read_pipelines,
    why_infeasible,
)
from covey.partition.evaluate import World
from covey.partition.plan import Member, Pipeline, Span, StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.store.schema import MAX_VERSION, Pin
from covey.store.views import Views
from support.plans import device, layout, link, stages
from support.swarm_keys import replica_of

NAMES = {"alice": "attic", "bob": "barn", "carol": "cellar", "dave": "cellar"}
LAYOUT = layout(4)
SPLIT = replace(LAYOUT, n_kv_heads=3, mlp_columns=96)


def world(
    of: ModelLayout = LAYOUT,
    devices: Iterable[DeviceProfile] = (),
    links: Sequence[LinkProfile] = (),
) -> World:
    by_peer = {one.peer_id: one for one in devices}
    return World(layout=of, devices=by_peer, links=tuple(links), request=Workload())


CHAIN = (Pipeline.of(stages(("alice", 0, 1), ("bob", 1, 4))),)
GROUP = (
    Pipeline.of(
        [
            StagePlan(Span(0, 3), (Member("alice", 1, 32), Member("bob", 2, 64)), 1, "int8"),
            StagePlan.alone("carol", 3, 4, streamed_blocks=1),
        ],
        codecs=("exact", "int8", "fp16"),
    ),
)


def find(text: str) -> str:
    found = [peer for peer, name in NAMES.items() if text in (peer, name)]
    if len(found) != 1:
        raise InvalidRequest("member", f"nobody is called {text!r}")
    return found[0]


def asked(*stages: dict[str, Any], **pipeline: object) -> dict[str, Any]:
    return {"pipelines": [{"stages": list(stages), **pipeline}]}


def alone(name: str, start: int, end: int, **stage: object) -> dict[str, Any]:
    return {"span": [start, end], "members": [{"name": name}], **stage}


@pytest.mark.parametrize(
    ("pipelines", "of"), [(CHAIN, LAYOUT), (GROUP, SPLIT), ((*CHAIN,), LAYOUT)]
)
@pytest.mark.parametrize("names", [None, NAMES])
def test_what_is_shown_of_a_plan_can_be_given_back(
    pipelines: tuple[Pipeline, ...], of: ModelLayout, names: dict[str, str] | None
) -> None:
    text = json.dumps(pipelines_value(pipelines, names))
    assert read_pipelines(json.loads(text), world(of), find) == pipelines


def test_a_name_is_enough() -> None:
    assert read_pipelines(asked(alone("attic", 0, 1), alone("barn", 1, 4)), world(), find) == CHAIN


def test_members_of_a_group_may_be_listed_in_any_order() -> None:
    members = [
        {"name": "barn", "kv_heads": 2, "mlp_columns": 64},
        {"name": "attic", "kv_heads": 1, "mlp_columns": 32},
    ]
    value = asked({"span": [0, 4], "members": members, "hub": "barn"})
    (pipeline,) = read_pipelines(value, world(SPLIT), find)
    assert pipeline.stages[0].peers == ("alice", "bob")
    assert pipeline.stages[0].hub == "bob"


@pytest.mark.parametrize(
    ("value", "field", "why"),
    [
        ([], "plan", "expected `object`"),
        ({}, "plan", "pipelines"),
        ({"pipelines": []}, "plan.pipelines", "length >= 1"),
        ({**asked(alone("attic", 0, 4)), "x": 1}, "plan", "unknown field `x`"),
        (asked(alone("attic", 0, 4, kv=1)), "plan.pipelines[0].stages[0]", "`kv`"),
        (asked({"span": [0, 4], "members": [{}]}), "plan.pipelines[0].stages[0].members[0]", "n"),
        (asked(alone("nobody", 0, 4)), "member", "'nobody'"),
        (asked(alone("cellar", 0, 4)), "member", "'cellar'"),
        (asked(alone("attic", 0, 3)), "plan.pipelines", "all 4 blocks"),
        (asked(alone("attic", 1, 4)), "plan.pipelines[0]", "cover block 0"),
        (asked(alone("attic", 3, 3)), "plan.pipelines[0].stages[0]", "span.end"),
        (asked(alone("attic", 0, 2), alone("barn", 3, 4)), "plan.pipelines[0]", "block 2"),
        (asked(alone("attic", 0, 2), alone("alice", 2, 4)), "plan.pipelines[0]", "twice"),
        (asked(alone("attic", 0, 4), codecs=["exact"]), "plan.pipelines[0]", "per border"),
        (asked(alone("attic", 0, 4), codecs=["zip"] * 2), "plan.pipelines[0]", "int8"),
        (asked(alone("attic", 0, 4, hub="barn")), "plan.pipelines[0].stages[0].hub", "'barn'"),
        (asked(alone("attic", 0, 4, sum_codec="zip")), "plan.pipelines[0].stages[0]", "fp16"),
        (
            {"pipelines": asked(alone("attic", 0, 4))["pipelines"] * 2},
            "plan.pipelines",
            "twice",
        ),
        (
            asked({"span": [0, 4], "members": [{"name": "attic"}, {"name": "barn"}]}),
            "plan.pipelines[0].stages[0]",
            "shares",
        ),
        (
            asked({"span": [0, 4], "members": [{"name": "attic", "kv_heads": -1}]}),
            "plan.pipelines[0].stages[0].members[0].kv_heads",
            ">= 0",
        ),
        (
            asked({"span": [0, 4], "members": [{"name": "attic", "streamed_blocks": 5}]}),
            "plan.pipelines[0].stages[0]",
            "streamed_blocks",
        ),
    ],
)
def test_what_is_wrong_with_a_plan_is_named_in_one_line(
    value: object, field: str, why: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_pipelines(value, world(), find)
    assert caught.value.field == field
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_open_is_as_the_planner_would_have_it() -> None:
    here = world(SPLIT, [device("alice"), device("bob")], [link("alice", "bob", rtt_s=1e-5)])
    members = [{"name": "attic"}, {"name": "barn"}]
    value = asked({"span": [0, 4], "members": members, "hub": "barn"})
    (pipeline,) = read_pipelines(value, here, find)
    assert sum(member.kv_heads for member in pipeline.stages[0].members) == 3
    assert pipeline.stages[0].hub == "bob"
    slow = world(LAYOUT, here.devices.values(), [link("alice", "bob", bandwidth=1e4)])
    (pipeline,) = read_pipelines(asked(alone("attic", 0, 1), alone("barn", 1, 4)), slow, find)
    assert pipeline.codecs[0] == "exact"
    assert "exact" not in pipeline.codecs[1:]


def test_shares_of_a_group_must_be_all_of_a_block() -> None:
    members = [{"name": "attic", "kv_heads": 1}, {"name": "barn", "mlp_columns": 96}]
    with pytest.raises(InvalidRequest, match="3 KV heads"):
        read_pipelines(asked({"span": [0, 4], "members": members}), world(SPLIT), find)


def test_the_newest_pin_counts_whoever_made_it() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.on_local(bob.apply)
    bob.on_local(alice.apply)
    wishes = ((alice, CHAIN), (bob, GROUP), (alice, None))
    for version, (replica, pipelines) in enumerate(wishes, start=1):
        pin = next_pin(Views(replica), "0f" * 32, pipelines, at=7.0)
        assert pin.version == version
        replica.set(pin.key, pin.to_value())
        for reader in (alice, bob):
            newest = Views(reader).newest_pin("0f" * 32)
            assert newest is not None
            assert newest.record == pin
    assert Views(alice).newest_pin("1e" * 32) is None


def test_a_pin_after_the_last_version_there_is_does_not_fail() -> None:
    alice = replica_of("alice")
    last = Pin(model="0f" * 32, version=MAX_VERSION, at=0.0, plan=None)
    alice.set(last.key, last.to_value())
    assert next_pin(Views(alice), "0f" * 32, CHAIN, at=1.0).to_value()["version"] == MAX_VERSION


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ([device("alice")], "bob is not there"),
        ([device("alice"), device("bob", max_blocks=2)], "bob takes at most 2 blocks, not 3"),
        ([device("alice"), device("bob", memory=299)], "bob lacks"),
    ],
)
def test_a_pin_that_cannot_run_says_why(devices: list[Any], why: str) -> None:
    assert why in (why_infeasible(CHAIN, world(devices=devices)) or "")
    state = _pinned(devices)
    assert state is not None
    assert state.candidate is None
    assert why in (state.why_not or "")


def test_a_pin_without_a_link_cannot_run() -> None:
    state = _pinned([device("alice"), device("bob")], has_link=False)
    assert state is not None
    assert "no measured link joins" in (state.why_not or "")


def test_a_pin_that_can_run_has_its_prediction() -> None:
    state = _pinned([device("alice"), device("bob")])
    assert state is not None
    assert state.why_not is None
    assert state.candidate is not None
    assert state.candidate.pipelines == CHAIN
    assert state.candidate.prediction.tpot_s > 0.04


@pytest.mark.parametrize("plan", [{}, {"pipelines": 7}, asked(alone("alice", 0, 3))])
def test_a_pin_that_is_no_plan_pins_nothing(plan: dict[str, Any]) -> None:
    replica = replica_of("bob")
    pin = Pin(model="0f" * 32, version=9, at=1.0, plan=plan)
    replica.set(pin.key, pin.to_value())
    entry = Views(replica).newest_pin("0f" * 32)
    assert entry is not None
    assert pinned(entry, world()) is None


def _pinned(devices: list[Any], *, has_link: bool = True) -> Any:
    replica = replica_of("alice")
    pin = next_pin(Views(replica), "0f" * 32, CHAIN, at=7.0)
    replica.set(pin.key, pin.to_value())
    links = [link("alice", "bob")] if has_link else []
    return pinned(Views(replica).newest_pin("0f" * 32), world(LAYOUT, devices, links))
