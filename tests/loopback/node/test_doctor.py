"""What `covey doctor` and `covey ping` find out, on meshes that reach each other on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from covey.node.doctor import doctor_facts, ping_facts
from covey.transport.identity import Identity
from covey.transport.reach import Reach
from support.meshes import Node, swarm_of

pytestmark = pytest.mark.network


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def reach_of(node: Node, stack: AsyncExitStack) -> Reach:
    assert node.swarm is not None
    reach = Reach(node.mesh, node.swarm, maps_ports=False, is_outside=lambda _: False)
    return await stack.enter_async_context(reach)


async def test_the_doctor_dials_who_has_no_link_and_says_why_it_failed(
    stack: AsyncExitStack,
) -> None:
    a, b = await swarm_of(stack, 2)
    reach = await reach_of(a, stack)
    gone = Identity.generate().peer_id
    a.mesh.learn(gone, ["127.0.0.1:1"])
    facts = await doctor_facts(reach, a.mesh, {b.id: "kitchen", gone: "attic"})
    found, lost = facts["members"]
    assert (found["name"], found["link"]["kind"], found["error"]) == ("kitchen", "direct", None)
    assert found["link"]["address"] == b.mesh.addresses[0]
    assert lost["link"] is None
    assert "127.0.0.1:1 refused" in lost["error"]
    assert facts["nat"]["udp"] == "unknown"
    assert "this machine only" in facts["findings"][0]["says"]


async def test_a_ping_tells_round_trips_and_throughput(stack: AsyncExitStack) -> None:
    a, b = await swarm_of(stack, 2)
    facts = await ping_facts(await a.mesh.peer(b.id), "kitchen", count=3)
    assert (facts["sent"], facts["answered"], facts["link"]["kind"]) == (3, 3, "direct")
    assert 0 < facts["rtt_min_s"] <= facts["rtt_median_s"] <= facts["rtt_max_s"] < 1
    assert facts["bandwidth_bytes_per_s"] > 1e6


async def test_pings_that_take_too_long_are_counted_and_end(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await swarm_of(stack, 2)
    peer = await a.mesh.peer(b.id)
    monkeypatch.setattr("covey.node.doctor.PING_S", 0.0)
    facts = await ping_facts(peer, "kitchen", count=2)
    assert (facts["sent"], facts["answered"]) == (2, 0)
    assert facts["bandwidth_bytes_per_s"] is None
