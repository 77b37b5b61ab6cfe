"""Gossip among several nodes on in-memory links and virtual time: what one writes, all read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.gossip import AWARENESS_TTL_S, Allowance, Gossip
from covey.node.switch import Switch
from covey.store.awareness import Awareness
from covey.store.replica import Replica
from covey.transport.errors import LinkBroken, ProtocolViolation
from covey.transport.mesh import Mesh
from covey.transport.messages import AnyMessage, StoreSync
from support.swarm_keys import signer, verify
from support.virtual_time import VirtualTimeLoop

SWARM = "meadow2026"
DELAY_S = 0.005


class Wire:
    """What `Gossip` uses of a mesh and its peers: `peers` and `send`, over links that may drop."""

    def __init__(self) -> None:
        self.switches: dict[str, Switch] = {}
        self.links: set[tuple[str, str]] = set()
        self.drops: Callable[[AnyMessage], bool] = lambda _: False
        self.violations: list[ProtocolViolation] = []

    def mesh_of(self, own: str) -> Mesh:
        wire = self

        class View:
            @property
            def peers(self) -> dict[str, Any]:
                return {b: wire.peer(own, b) for a, b in wire.links if a == own}

        return cast("Mesh", View())

    def peer(self, sender: str, receiver: str) -> Any:
        async def send(message: AnyMessage) -> None:
            if (sender, receiver) not in self.links:
                raise LinkBroken("cut")
            if not self.drops(message):
                asyncio.get_running_loop().call_later(
                    DELAY_S, self.deliver, sender, receiver, message
                )

        return SimpleNamespace(peer_id=receiver, send=send)

    def deliver(self, sender: str, receiver: str, message: AnyMessage) -> None:
        frame = SimpleNamespace(message=message, request=None, tensors={})
        try:
            peer = SimpleNamespace(peer_id=sender)
            self.switches[receiver].receive(cast("Any", peer), cast("Any", frame))
        except ProtocolViolation as error:
            self.violations.append(error)


class Member:
    def __init__(self, name: str, wire: Wire, members: set[str]) -> None:
        self.name = name
        clock = asyncio.get_running_loop().time
        common: Any = {"swarm": SWARM, "sign": signer(name), "verify": verify}
        self.replica = Replica(
            name, is_member=members.__contains__, disk=None, started_ms=1, **common
        )
        self.awareness = Awareness(
            name, is_member=members.__contains__, ttl_s=AWARENESS_TTL_S, started_ms=1, **common
        )
        self.switch = wire.switches[name] = Switch(name, cast("Any", None))
        self.gossip = Gossip(
            wire.mesh_of(name), self.switch, self.replica, self.awareness, clock, random.Random(7)
        )


@asynccontextmanager
async def line_of(names: str, wire: Wire) -> AsyncIterator[dict[str, Member]]:
    """Members that are linked like pearls on a string."""
    members = {name: Member(name, wire, set(names)) for name in names}
    runs = [asyncio.create_task(member.gossip.run()) for member in members.values()]
    for a, b in pairwise(names):
        wire.links |= {(a, b), (b, a)}
        members[a].gossip.link_up(b)
        members[b].gossip.link_up(a)
    try:
        yield members
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        for member in members.values():
            await member.gossip.aclose()


def simulate(scenario: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(cast("Any", scenario()))


def test_a_change_reaches_the_far_end_within_a_second() -> None:
    async def scenario() -> None:
        async with line_of("abcde", Wire()) as members:
            await asyncio.sleep(1)
            members["a"].replica.set("key", {"n": 1})
            await asyncio.sleep(1)
            assert members["e"].replica.get("a", "key") == {"n": 1}

    simulate(scenario)


def test_what_was_lost_is_repaired_by_a_later_hello() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with line_of("ab", wire) as members:
            await asyncio.sleep(1)
            wire.drops = lambda message: isinstance(message, StoreSync)
            members["a"].replica.set("key", {"n": 1})
            await asyncio.sleep(5)
            assert members["b"].replica.get("a", "key") is None
            wire.drops = lambda _: False
            await asyncio.sleep(25)
            assert members["b"].replica.get("a", "key") == {"n": 1}

    simulate(scenario)


def test_members_that_never_met_know_that_the_other_lives_and_when_it_does_not() -> None:
    async def scenario() -> None:
        wire = Wire()
        clock = asyncio.get_running_loop().time
        async with line_of("abc", wire) as members:
            await asyncio.sleep(3)
            assert set(members["a"].awareness.live(clock())) >= {"b", "c"}
            wire.links -= {("b", "c"), ("c", "b")}
            await asyncio.sleep(AWARENESS_TTL_S + 2)
            assert "c" not in members["a"].awareness.live(clock())
            assert "b" in members["a"].awareness.live(clock())

    simulate(scenario)


def test_a_malformed_store_message_ends_its_link_and_nothing_else() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with line_of("ab", wire) as members:
            wire.deliver("a", "b", StoreSync(body=b"\xff\x00"))
            assert [violation.code.value for violation in wire.violations] == ["malformed_frame"]
            members["b"].replica.set("key", {"n": 1})
            await asyncio.sleep(1)
            assert members["a"].replica.get("b", "key") == {"n": 1}

    simulate(scenario)


@pytest.mark.parametrize(("gap_s", "n_taken"), [(0.0, 10), (0.1, 20), (1.0, 20)])
def test_an_allowance_holds_on_average(gap_s: float, n_taken: int) -> None:
    allowance = Allowance(per_s=10)
    assert sum(allowance.take(now=gap_s * k) for k in range(20)) == n_taken
