"""A member that claims ten times its speed loses its place, by what others measure of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from covey.node.catalog import LocalModel, open_model
from covey.node.config import NodeConfig
from covey.node.engines import Engines
from covey.node.home import Home
from covey.node.model.sampling import SamplingParams
from covey.node.runtime import Node, running_node
from covey.node.service import Finished, GenerationRequest
from covey.partition.profile import DeviceProfile
from covey.transport.peer import Peer
from support.members import until
from support.swarm import MODEL, PLAN_S

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(180)]

HEAD, LIAR, HONEST = "head", "liar", "honest"
#: Of this machine's speed; the liar is the slowest.
SPEEDS = {HEAD: 1.0, LIAR: 0.05, HONEST: 0.3}
CAPS = {HEAD: 10, LIAR: 20, HONEST: 20}  # of 30 blocks: the head needs one of the others
CLAIMS = 10.0
MAX_SESSIONS = 3
CALM = (1e-3, 1e8)  # round trip in seconds, bytes per second
N_STEPS = 12


def seconds_per_block(speed: float) -> float:
    """What a block takes on an engine that keeps to `speed`."""
    model = open_model(MODEL, Engines("native", 1, speed=speed))
    stage = model.load_stage((0, 2))
    stage.open_session("timed", N_STEPS)
    row = np.ones((1, stage.hidden_size), np.float32)
    took = []
    for position in range(N_STEPS):
        began_at = time.perf_counter()
        stage.forward("timed", position, row)
        took.append(time.perf_counter() - began_at)
    return sorted(took)[N_STEPS // 2] / 2


async def calm(_: Peer) -> tuple[float, float]:
    """What a quiet machine would find of a link to itself, or a little less."""
    return CALM


@pytest.fixture(autouse=True)
def claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles as their owners would publish them; one of them lies."""
    slowest_s = seconds_per_block(SPEEDS[LIAR])

    def profile(
        model: LocalModel, config: NodeConfig, peer_id: str, _: Home, *, progress: object
    ) -> DeviceProfile:
        seconds = slowest_s * SPEEDS[LIAR] / SPEEDS[config.name]
        if config.name == LIAR:
            seconds /= CLAIMS
        return DeviceProfile(
            peer_id=peer_id,
            model_digest=model.digest,
            engine=model.engine,
            decode_s_per_block=seconds,
            prefill_s_per_token_per_block=seconds / 4,
            head_s=seconds,
            memory_bytes=1 << 30,
            disk_bytes_per_s=1e9,
            max_blocks=config.max_blocks,
        )

    monkeypatch.setattr("covey.node.planning.device_profile", profile)
    # A liar does not correct itself by what its own steps take, as our software would.
    monkeypatch.setattr("covey.node.refining.Refining.look", lambda _: None)
    # Three nodes that start in one process would see links as slow, and plan around them.
    monkeypatch.setattr("covey.transport.peer.Peer.measure", calm)
    monkeypatch.setattr("covey.node.links.LinkMeter._note_changes", lambda _: None)


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[dict[str, Node]]:
    usual = NodeConfig(
        home=tmp_path,
        name=HEAD,
        models=(MODEL,),
        host="127.0.0.1",
        threads=1,
        engine="native",
        mdns=False,
        map_port=False,
        prefer="latency",
        grace_s=1.0,
    )
    async with AsyncExitStack() as stack:
        running: dict[str, Node] = {}
        for name, speed in SPEEDS.items():
            config = replace(
                usual, home=tmp_path / name, name=name, speed=speed, max_blocks=CAPS[name]
            )
            invite = running[HEAD].desk.invite(ttl_s=60, uses=1) if running else None
            running[name] = await stack.enter_async_context(
                running_node(config, invite=invite, may_found=invite is None)
            )
        yield running


async def session(node: Node) -> None:
    request = GenerationRequest(
        model=MODEL, prompt="The sky is", params=SamplingParams(max_tokens=16)
    )
    async with aclosing(node.generator.generate(request)) as events:
        assert isinstance([event async for event in events][-1], Finished)


async def test_a_member_that_claims_ten_times_its_speed_loses_its_place(
    nodes: dict[str, Node],
) -> None:
    head, liar = nodes[HEAD], nodes[LIAR].peer_id
    (model,) = head.catalog

    def serving() -> set[str]:
        routes = head.planning.routes(model.digest)
        return {peer for route in routes for peer in route.members}

    def are_linked() -> bool:
        return len(head.planning.state(model).links) == len(nodes) * (len(nodes) - 1)

    await until(are_linked, PLAN_S)
    await until(lambda: liar in serving(), PLAN_S)  # it is believed to begin with
    for _ in range(MAX_SESSIONS):
        await session(head)
    await until(lambda: liar not in serving() and bool(serving()), PLAN_S)
    assert serving() == {head.peer_id, nodes[HONEST].peer_id}
    state = nodes[HONEST].planning.state(model)  # another member sees it so, too
    assert state.claimed[liar].decode_s_per_block < state.devices[liar].decode_s_per_block / 5
    await session(head)
