"""Members that load their parts of a plan with a group, form it, lose each other and come again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from covey.node.catalog import LocalModel
from covey.node.engine.stage import Stage
from covey.node.engines import Engines
from covey.node.group.errors import GroupBroken
from covey.node.group.stage import GroupStage
from covey.node.loading import Held, Loading
from covey.node.model.checkpoint import open_checkpoint
from covey.node.serving import StageServer
from covey.node.switch import Switch
from covey.node.worker import Worker
from covey.partition.plan import (
    LayerPlan,
    Member,
    Pipeline,
    Prediction,
    Span,
    StagePlan,
    make_plan,
)
from covey.partition.profile import DeviceProfile, LinkProfile
from covey.store.replica import Replica
from covey.store.schema import Ready
from covey.transport.errors import LinkBroken, RefusedByPeer, TransportError
from covey.transport.frame import Frame
from covey.transport.identity import Identity
from covey.transport.lane.opening import Lanes
from covey.transport.membership import Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import JoinGroup
from covey.transport.peer import Peer
from support.swarm_keys import signer, verify
from support.tiny_models import TINY, write_tiny_gguf

pytestmark = pytest.mark.network

N_BLOCKS = TINY.n_blocks
HIDDEN = np.random.default_rng(1).standard_normal((9, TINY.hidden_size), np.float32)


class LoadingNode:
    """A node reduced to what `Loading` needs."""

    def __init__(self, identity: Identity, swarm: Swarm) -> None:
        self.peer_id = identity.peer_id
        self.spoilt: list[LocalModel] = []
        self.links: tuple[LinkProfile, ...] = ()
        self.switch = Switch(self.peer_id, lambda peer_id: self.mesh.peer(peer_id))
        self.mesh = Mesh(identity, swarm, handler=self._receive, on_down=self._lost)
        self.lanes = Lanes(self.mesh)
        self.worker, self.loader = Worker("engine"), Worker("loader")
        self.server = StageServer(self.switch, self.worker, asyncio.get_running_loop().time)
        self.replica = Replica(
            self.peer_id,
            swarm=swarm.id,
            sign=signer(self.peer_id),
            verify=verify,
            is_member=lambda _: True,
            disk=None,
            started_ms=1,
        )
        self.loading = Loading(self, self.spoilt.append)

    @property
    def is_ready(self) -> bool:
        return any(True for _ in self.replica.items(Ready.prefix))

    @property
    def held(self) -> Held:
        (held,) = self.loading
        return held

    async def step(self, model: LocalModel, *plans: LayerPlan) -> None:
        device = DeviceProfile(
            peer_id=self.peer_id,
            model_digest=model.digest,
            engine=model.engine,
            decode_s_per_block=1e-3,
            prefill_s_per_token_per_block=1e-4,
            head_s=1e-3,
            memory_bytes=1 << 24,
            disk_bytes_per_s=1e9,
        )
        ready = {plan.digest: frozenset[str]() for plan in plans}
        state = cast("Any", SimpleNamespace(ready=ready, links=self.links))
        await self.loading.step(model, plans, state, device)

    async def compute(self, engine: Stage, session: str = "s") -> Any:
        """A prompt and a token, as the server has them computed."""

        def run() -> Any:
            engine.open_session(session, len(HIDDEN))
            parts = [engine.forward(session, 0, HIDDEN[:-1])]
            parts.append(engine.forward(session, len(HIDDEN) - 1, HIDDEN[-1:]))
            engine.close_session(session)
            return np.concatenate(parts)

        return (await self.worker.run(run)).value

    async def aclose(self) -> None:
        await self.server.aclose()
        await self.loading.aclose()
        await self.lanes.aclose()
        await self.switch.aclose()

    def _receive(self, peer: Peer, frame: Frame) -> None:
        self.switch.receive(peer, frame)

    def _lost(self, peer_id: str, _: TransportError) -> None:
        self.loading.peer_lost(peer_id)
        self.server.peer_lost(peer_id)


@dataclass
class Group:
    """Two nodes, the first of which is the hub of a stage of the whole model, and a stranger."""

    hub: LoadingNode
    spoke: LoadingNode
    other: LoadingNode
    model: LocalModel
    plan: LayerPlan
    expected: Any

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10.0):
            while not condition():  # noqa: ASYNC110  what brings it about has no event
                await asyncio.sleep(0.01)

    async def serve(self) -> Stage:
        """Load both parts; the hub's stage once it is formed."""
        for node in (self.spoke, self.hub):
            await node.step(self.model, self.plan)
        return await self.served()

    async def served(self) -> Stage:
        await self.until(lambda: self.plan.digest in self.hub.server.stages)
        return self.hub.server.stages[self.plan.digest].engine

    async def check(self, engine: Stage) -> None:
        found = await self.hub.compute(engine)
        np.testing.assert_allclose(found, self.expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    model = LocalModel("tiny", open_checkpoint(path, cache_dir=tmp_path), Engines("fp32", 1))
    identities = [Identity(bytes([n] * 32)) for n in range(1, 4)]
    swarm = Swarm.create(identities[0].peer_id)
    async with AsyncExitStack() as stack:
        nodes = [LoadingNode(identity, swarm) for identity in identities]
        for node in nodes:
            stack.callback(node.worker.close)
            stack.callback(node.loader.close)
            await stack.enter_async_context(node.mesh)
            stack.push_async_callback(node.aclose)
        for node in nodes:
            for other in nodes:
                node.mesh.learn(other.peer_id, other.mesh.addresses)
        expected = await nodes[0].compute(model.load_stage((0, N_BLOCKS)))
        plan = plan_of(model, [node.peer_id for node in nodes[:2]])
        hub, spoke, other = nodes
        yield Group(hub, spoke, other, model, plan, expected)


def plan_of(model: LocalModel, peers: Sequence[str], epoch: int = 1) -> LayerPlan:
    shares = [(1, 32), (1, 32)] if len(peers) == 2 else [(1, 32), (1, 0), (0, 32)]
    members = tuple(Member(peer, *share) for peer, share in zip(peers, shares, strict=True))
    stage = StagePlan(Span(0, N_BLOCKS), members, sum_codec="exact")
    prediction = Prediction(
        ttft_s=1.0,
        tpot_s=1.0,
        throughput_tok_per_s=1.0,
        memory_bytes=tuple((peer_id, 1) for peer_id in peers),
    )
    return make_plan(
        [Pipeline.of([stage])],
        prediction,
        model_digest=model.digest,
        epoch=epoch,
        proposer=peers[0],
        engine=model.engine,
    )


async def test_a_group_serves_once_all_have_their_parts(group: Group) -> None:
    await group.hub.step(group.model, group.plan)
    assert (group.hub.held.role, group.hub.held.is_serving) == ("hub", False)
    assert not list(group.hub.replica.items(Ready.prefix))
    await group.spoke.step(group.model, group.plan)
    assert group.spoke.is_ready
    engine = await group.served()
    assert group.hub.is_ready
    assert group.spoke.held.role == "spoke"
    await group.check(engine)
    assert group.spoke.held.spoke is not None
    assert group.spoke.held.spoke.n_runs == 2
    # What is said already is said once more only if it was lost.
    await group.hub.step(group.model, group.plan)
    assert len(list(group.hub.loading)) == 1


async def test_a_lane_that_is_lost_is_opened_again_within_the_step(group: Group) -> None:
    engine = await group.serve()
    await group.check(engine)
    group.spoke.lanes.drop(group.hub.peer_id)
    await group.check(engine)
    assert group.hub.server.stages[group.plan.digest].engine is engine


async def test_a_lost_peer_ends_the_service_until_the_group_is_formed_again(group: Group) -> None:
    engine = await group.serve()
    digest, stages = group.plan.digest, group.hub.server.stages
    before = stages[digest]
    group.hub.mesh.peers[group.spoke.peer_id].abort(LinkBroken("a test"))
    await group.until(lambda: stages.get(digest) not in (None, before))
    await group.check(stages[digest].engine)
    assert stages[digest].engine is engine


async def test_a_hub_that_cannot_form_its_group_takes_back_its_word(group: Group) -> None:
    await group.serve()
    await group.spoke.step(group.model)  # it has another plan now
    with pytest.raises(GroupBroken):
        await group.hub.compute(group.hub.server.stages[group.plan.digest].engine)
    await group.until(lambda: not group.hub.is_ready)
    assert not group.hub.server.stages
    await group.spoke.step(group.model, group.plan)
    await group.check(await group.served())
    assert group.hub.is_ready


async def test_a_ring_is_made_where_links_are_measured(group: Group) -> None:
    peers = [node.peer_id for node in (group.hub, group.spoke, group.other)]
    plan = group.plan = plan_of(group.model, peers)
    group.hub.links = tuple(
        LinkProfile(a=a, b=b, rtt_s=1e-5, bandwidth_bytes_per_s=1e4)
        for a, b in itertools.combinations(peers, 2)
    )
    await group.other.step(group.model, plan)
    engine = await group.serve()
    await group.check(engine)
    assert isinstance(engine, GroupStage)
    assert engine.spread() is None  # nobody adds up what goes round
    # A lane between two spokes is as dear as one to the hub.
    group.spoke.lanes.drop(group.other.peer_id)
    await group.check(engine)


async def test_what_is_no_longer_wanted_is_left(group: Group) -> None:
    engine = await group.serve()
    successor = plan_of(group.model, [group.hub.peer_id, group.other.peer_id], epoch=2)
    for node in (group.hub, group.other):
        await node.step(group.model, successor, group.plan)
    await group.until(lambda: len(group.hub.server.stages) == 2)
    await group.check(engine)
    await group.check(group.hub.server.stages[successor.digest].engine)
    await group.spoke.step(group.model)
    assert not group.spoke.is_ready
    assert not list(group.spoke.loading)
    await group.hub.step(group.model, successor)
    assert list(group.hub.server.stages) == [successor.digest]
    with pytest.raises(GroupBroken):
        await group.hub.compute(engine)
    await group.check(group.hub.server.stages[successor.digest].engine)


async def test_a_shard_stays_while_a_session_of_the_group_needs_it(group: Group) -> None:
    engine = await group.serve()
    await group.hub.worker.run(lambda: engine.open_session("s", 4))
    await group.spoke.step(group.model)
    draining = asyncio.create_task(group.spoke.loading.drained())
    done = await group.hub.worker.run(lambda: engine.forward("s", 0, HIDDEN[:1]))
    assert done.value.shape == (1, TINY.hidden_size)
    assert not draining.done()
    await group.hub.worker.run(lambda: engine.close_session("s"))
    async with asyncio.timeout(10.0):
        await draining
    await group.spoke.step(group.model)
    assert not list(group.spoke.loading)


async def test_only_the_hub_calls_a_group_together(group: Group) -> None:
    await group.spoke.step(group.model, group.plan)
    request = JoinGroup(plan=group.plan.digest, stage_idx=0, call=bytes(16))
    unknown = JoinGroup(plan="0" * 64, stage_idx=0, call=bytes(16))
    elsewhere = JoinGroup(plan=group.plan.digest, stage_idx=1, call=bytes(16))
    for asking, asked in ((group.other, request), (group.hub, unknown), (group.hub, elsewhere)):
        with pytest.raises(RefusedByPeer):
            await asking.switch.request(group.spoke.peer_id, asked, timeout_s=5.0)
    await group.check(await group.serve())


async def test_a_plan_that_cannot_run_here_is_not_tried_again(
    group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = replace(group.plan, engine="bf16")
    for _ in range(2):
        await group.spoke.step(group.model, wrong)
    assert not list(group.spoke.loading)
    assert not group.spoke.is_ready
    assert caplog.text.count("cannot run here") == 1
