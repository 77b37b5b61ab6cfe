"""A plan that runs is adjusted where its links or members ask for it, and else left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from covey.partition.cost import Network
from covey.partition.evaluate import World, adjusted
from covey.partition.group import group_term
from covey.partition.plan import Pipeline, Span, StagePlan
from covey.partition.profile import DeviceProfile, LinkProfile, Workload
from support.plans import device, layout, link

MODEL = replace(
    layout(4, block_bytes=(1000,) * 4, kv_bytes=0),
    n_kv_heads=4,
    mlp_columns=1024,
    attention_share=0.25,
)
REQUEST = Workload(prompt_tokens=16, n_sessions=1)
CHAIN = (StagePlan.alone("a", 0, 2), StagePlan.alone("b", 2, 4))


def world(
    *links: LinkProfile, devices: tuple[DeviceProfile, ...] = (device("a"), device("b"))
) -> World:
    by_peer = {one.peer_id: one for one in devices}
    return World(layout=MODEL, devices=by_peer, links=links, request=REQUEST)


def near(bandwidth: float = 1e12) -> LinkProfile:
    return link("a", "b", rtt_s=0.0, bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("codecs", "bandwidth"),
    [(("exact",) * 3, 1e5), (("exact", "int8", "int8"), 1e9)],
    ids=["a link that became slow", "a link that became fast"],
)
def test_codecs_follow_the_links_both_ways(codecs: tuple[str, ...], bandwidth: float) -> None:
    running = Pipeline.of(CHAIN, codecs=codecs)
    after = adjusted([running], world(near(bandwidth)))
    assert after is not None
    assert after.stages == running.stages
    assert after.pipelines[0].codecs != codecs
    assert adjusted(after.pipelines, world(near(bandwidth))) is None  # and that settles it


def test_a_plan_as_it_should_be_is_left_alone() -> None:
    assert adjusted([Pipeline.of(CHAIN)], world(near())) is None


def test_without_figures_nothing_is_adjusted() -> None:
    assert adjusted([Pipeline.of(CHAIN, codecs=("exact", "int8", "int8"))], world()) is None


def group_of_two(*devices: DeviceProfile) -> Pipeline:
    term = group_term(MODEL, devices, Network([near()]), REQUEST, hub="a")
    assert term is not None
    return Pipeline.of([StagePlan(Span(0, 4), term.members)])


def test_shares_follow_the_members_speed_as_far_as_memory_goes() -> None:
    running = group_of_two(device("a"), device("b"))
    slower = device("a"), device("b", decode_s=0.03)
    after = adjusted([running], world(near(), devices=slower))
    assert after is not None
    assert after.stages[0].members[0].mlp_columns > running.stages[0].members[0].mlp_columns
    full = device("a", memory=2100), device("b", decode_s=0.03)
    assert adjusted([running], world(near(), devices=full)) is None
