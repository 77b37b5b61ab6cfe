"""What a model's state is read from records, some of which lie."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest

from covey.node.planning_state import (
    AHEAD_S,
    EXPERIENCE_S,
    MAX_PROPOSALS,
    ModelState,
    device_record,
    link_record,
    plan_record,
    read_state,
)
from covey.partition.observed import slowed
from covey.partition.plan import LayerPlan, Pipeline, Prediction, make_plan
from covey.partition.profile import DeviceProfile
from covey.store.replica import Replica
from covey.store.schema import Experience, PlanRecord, ProfileRecord, Ready, Record, Seen
from covey.store.views import Views
from support.plans import device, link, stages
from support.swarm_keys import MEMBERS, replica_of

MODEL, OTHER = "0f" * 32, "1e" * 32
N_BLOCKS = 4
NOW = 1e9
READER, LIAR = "alice", "bob"


class Swarm:
    """Replicas that hear each other at once."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {author: replica_of(author) for author in MEMBERS}
        for writer in self.replicas.values():
            for reader in self.replicas.values():
                if reader is not writer:
                    writer.on_local(reader.apply)

    def publish(self, author: str, record: Record) -> None:
        self.replicas[author].set(record.key, record.to_value())

    def read(self) -> ModelState:
        return read_state(Views(self.replicas[READER]), MODEL, N_BLOCKS, unix_time=NOW)


def profile(peer_id: str, model: str = MODEL) -> DeviceProfile:
    return replace(device(peer_id), model_digest=model)


def plan(
    *spans: tuple[str, int, int], epoch: int = 1, proposer: str = "alice", model: str = MODEL
) -> LayerPlan:
    made = stages(*(spans or (("alice", 0, 2), ("bob", 2, 4))))
    return make_plan(
        [Pipeline.of(made)],
        Prediction(
            ttft_s=1.0,
            tpot_s=1.0,
            throughput_tok_per_s=1.0,
            memory_bytes=tuple((stage.hub, 1) for stage in made),
        ),
        model_digest=model,
        epoch=epoch,
        proposer=proposer,
        engine="fp32",
    )


def ready(of: LayerPlan, stage_idx: int) -> Ready:
    return Ready(plan_digest=of.digest, stage_idx=stage_idx, at=0.0)


def experience(
    at: float = NOW, n_sessions: int = 5, model: str = MODEL, **peers: float
) -> Experience:
    return Experience(
        model=model,
        peers={
            peer: Seen(decode_s_per_block=seconds, n_sessions=n_sessions, at=at)
            for peer, seconds in peers.items()
        },
    )


def test_a_device_that_others_find_slow_is_planned_as_slow_and_still_says_what_it_says() -> None:
    swarm = Swarm()
    for author in ("alice", LIAR):
        swarm.publish(author, device_record({MODEL: profile(author)}))
    swarm.publish("alice", experience(bob=0.1))
    state = swarm.read()
    assert state.claimed == {"alice": profile("alice"), LIAR: profile(LIAR)}
    assert state.devices["alice"] == profile("alice")
    assert state.devices[LIAR] == slowed(profile(LIAR), 10.0)


@pytest.mark.parametrize(
    "said",
    [
        experience(bob=0.1, at=NOW - EXPERIENCE_S - 1),
        experience(bob=0.1, at=NOW + AHEAD_S + 1),
        experience(bob=0.1, model=OTHER),
        experience(bob=0.1, n_sessions=1),
        experience(bob=1e-12),
        experience(dave=0.1),
    ],
)
def test_what_others_say_of_another_time_model_or_member_changes_nothing(said: Experience) -> None:
    swarm = Swarm()
    swarm.publish(LIAR, device_record({MODEL: profile(LIAR)}))
    swarm.publish("alice", said)
    assert swarm.read().devices == {LIAR: profile(LIAR)}


def test_honest_records_are_read_back() -> None:
    swarm, proposal = Swarm(), plan()
    for author in ("alice", "bob"):
        swarm.publish(author, device_record({MODEL: profile(author)}))
    swarm.publish("alice", link_record(link("alice", "bob")))
    swarm.publish("bob", link_record(link("bob", "alice")))
    swarm.publish("alice", plan_record(proposal))
    swarm.publish("bob", ready(proposal, 1))
    state = swarm.read()
    assert state.devices == {"alice": profile("alice"), "bob": profile("bob")}
    assert set(state.links) == {link("alice", "bob"), link("bob", "alice")}
    assert state.plans == (proposal,)
    assert state.ready == {proposal.digest: {"bob"}}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {MODEL: None},
        {MODEL: []},
        {MODEL: {"peer_id": LIAR}},
        {MODEL: {**profile(LIAR).to_value(), "memory_bytes": -1}},
        {MODEL: {**profile(LIAR).to_value(), "decode_s_per_block": "fast"}},
        {MODEL: profile("carol").to_value()},  # of another peer
        {MODEL: profile(LIAR, OTHER).to_value()},  # of another model
        {OTHER: profile(LIAR, OTHER).to_value()},
    ],
)
def test_a_device_profile_that_lies_is_left_out(value: dict[str, Any]) -> None:
    swarm = Swarm()
    swarm.publish("carol", device_record({MODEL: profile("carol")}))
    swarm.publish(LIAR, ProfileRecord(kind="device", value=value))
    assert swarm.read().devices == {"carol": profile("carol")}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {**link(LIAR, "carol").to_value(), "rtt_s": -1.0},
        {**link(LIAR, "carol").to_value(), "bandwidth_bytes_per_s": "lots"},
        link("alice", "carol").to_value(),  # measured by another
        link(LIAR, "dave").to_value(),  # to another than the record's key says
    ],
)
def test_a_link_profile_that_lies_is_left_out(value: dict[str, Any]) -> None:
    swarm = Swarm()
    swarm.publish("alice", link_record(link("alice", "bob")))
    swarm.publish(LIAR, ProfileRecord(kind="link", value=value, peer="carol"))
    assert swarm.read().links == (link("alice", "bob"),)


def record_of(of: LayerPlan, **changes: Any) -> PlanRecord:
    fields = {
        "plan": plan_record(of).plan,
        "digest": of.digest,
        "model": MODEL,
        "epoch": of.epoch,
        "proposer": of.proposer,
    }
    return PlanRecord(**{**fields, **changes})


LIE = plan(proposer=LIAR)
TEXT: str = plan_record(LIE).plan["msgpack"]


@pytest.mark.parametrize(
    "record",
    [
        record_of(LIE, digest="2d" * 32),
        record_of(LIE, epoch=2),
        record_of(plan(proposer="alice"), proposer=LIAR),
        record_of(plan(proposer=LIAR, model=OTHER)),
        record_of(plan((LIAR, 0, 3), proposer=LIAR)),  # too few blocks
        record_of(LIE, plan={}),
        record_of(LIE, plan={"msgpack": 7}),
        record_of(LIE, plan={"msgpack": ""}),
        record_of(LIE, plan={"msgpack": TEXT[:-1]}),
        record_of(LIE, plan={"msgpack": TEXT + "\n"}),
        record_of(LIE, plan={"msgpack": "é" + TEXT}),
        record_of(LIE, plan={"msgpack": base64.b64encode(b"\xc1").decode()}),
        record_of(LIE, plan={"msgpack": base64.b64encode(b"\x91" * 40_000).decode()}),
    ],
    ids=[
        *("digest", "epoch", "proposer", "model", "blocks", "nothing", "no text", "empty", "cut"),
        *("line end", "beyond ASCII", "no msgpack", "deep"),
    ],
)
def test_a_proposal_that_does_not_check_out_is_left_out(record: PlanRecord) -> None:
    swarm, honest = Swarm(), plan(epoch=2)
    swarm.publish("alice", plan_record(honest))
    swarm.publish(LIAR, record)
    assert swarm.read().plans == (honest,)


def test_the_same_proposal_without_the_lie_is_read() -> None:
    swarm = Swarm()
    swarm.publish(LIAR, record_of(LIE))
    assert swarm.read().plans == (LIE,)


def test_only_a_member_of_the_stage_can_say_that_it_is_ready() -> None:
    swarm, proposal = Swarm(), plan()
    swarm.publish("alice", plan_record(proposal))
    swarm.publish("carol", ready(proposal, 0))  # in no stage
    swarm.publish("bob", ready(proposal, 0))  # in the other stage
    swarm.publish("alice", ready(proposal, 2))  # beyond the last stage
    assert swarm.read().ready == {proposal.digest: frozenset()}
    swarm.publish("alice", ready(proposal, 0))
    assert swarm.read().ready == {proposal.digest: {"alice"}}


def test_a_member_that_floods_crowds_out_nobody() -> None:
    swarm, honest = Swarm(), plan(epoch=1)
    swarm.publish("alice", plan_record(honest))
    for epoch in range(2, 2 + 2 * MAX_PROPOSALS):
        swarm.publish(LIAR, plan_record(plan(epoch=epoch, proposer=LIAR)))
    plans = swarm.read().plans
    assert honest in plans
    assert [p.epoch for p in plans if p.proposer == LIAR] == list(
        range(1 + 2 * MAX_PROPOSALS, 1 + MAX_PROPOSALS, -1)
    )


def test_every_reader_sees_the_proposals_in_one_order() -> None:
    swarm = Swarm()
    for epoch, author in [(1, "carol"), (2, "bob"), (2, "alice")]:
        swarm.publish(author, plan_record(plan(epoch=epoch, proposer=author)))
    read = [
        read_state(Views(r), MODEL, N_BLOCKS, unix_time=NOW).plans for r in swarm.replicas.values()
    ]
    assert all(plans == read[0] for plans in read)
    assert [p.epoch for p in read[0]] == [2, 2, 1]
