"""Shares of a group are made anew when they are out of balance, and only then."""

from __future__ import annotations

from dataclasses import replace

from covey.partition.balance import rebalanced
from covey.partition.cost import Network
from covey.partition.group import group_term
from covey.partition.plan import Pipeline, Span, StagePlan
from covey.partition.profile import DeviceProfile, Workload
from support.plans import device, layout, link

MODEL = replace(
    layout(4, block_bytes=(1000,) * 4, kv_bytes=10),
    n_kv_heads=4,
    mlp_columns=1024,
    attention_share=0.25,
)
NEAR = Network([link("a", "b", rtt_s=0.0, bandwidth=1e15)])
ONE = Workload(prompt_tokens=1, n_sessions=1)


def pipeline(*devices: DeviceProfile) -> Pipeline:
    term = group_term(MODEL, devices, NEAR, ONE, hub="a")
    assert term is not None
    return Pipeline.of([StagePlan(Span(0, 4), term.members)])


def again(running: Pipeline, *devices: DeviceProfile, network: Network = NEAR) -> Pipeline:
    return rebalanced(running, MODEL, {one.peer_id: one for one in devices}, network, ONE)


def test_noise_moves_no_share() -> None:
    running = pipeline(device("a"), device("b"))
    assert again(running, device("a"), device("b", decode_s=0.0105)) is running


def test_a_member_twice_as_slow_gets_less() -> None:
    running = pipeline(device("a"), device("b"))
    slower = device("a"), device("b", decode_s=0.02)
    moved = again(running, *slower)
    assert moved.stages[0].members[1].mlp_columns < running.stages[0].members[1].mlp_columns
    assert again(moved, *slower) is moved  # and that settles it


def test_what_streams_from_disk_stays() -> None:
    stage = pipeline(device("a"), device("b")).stages[0]
    members = tuple(replace(member, streamed_blocks=2) for member in stage.members)
    running = Pipeline.of([replace(stage, members=members)])
    moved = again(running, device("a"), device("b", decode_s=0.02))
    assert [member.streamed_blocks for member in moved.stages[0].members] == [2, 2]


def test_unknown_members_and_lost_links_leave_it_alone() -> None:
    running = pipeline(device("a"), device("b"))
    assert again(running, device("a")) is running
    slower = device("a"), device("b", decode_s=0.02)
    assert again(running, *slower, network=Network([])) is running


def test_a_stage_of_one_is_left_alone() -> None:
    running = Pipeline.of([StagePlan.alone("a", 0, 4)])
    assert again(running, device("a", decode_s=1.0)) is running
