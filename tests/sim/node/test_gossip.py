"""Gossip among several nodes on in-memory links and virtual time: what one writes, all read."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.gossip import (
    ANSWER_S,
    DENIAL_S,
    Allowance,
    Gossip,
    beat_period_s,
    beat_ttl_s,
)
from covey.node.switch import Switch
from covey.store.awareness import MAX_TTL_S, Awareness, News, Suspicion
from covey.store.replica import Replica
from covey.transport.errors import LinkBroken, LinkTimeout, ProtocolViolation
from covey.transport.mesh import Mesh
from covey.transport.messages import AnyMessage, Beat, StoreSync
from support.swarm_keys import signer, verify
from support.virtual_time import VirtualTimeLoop

SWARM = "meadow2026"
DELAY_S = 0.005


class Wire:
    """What `Gossip` uses of a mesh and its peers, over links that may drop."""

    def __init__(self) -> None:
        self.switches: dict[str, Switch] = {}
        self.links: set[tuple[str, str]] = set()
        self.drops: Callable[[AnyMessage], bool] = lambda _: False
        self.violations: list[ProtocolViolation] = []
        self.sent: Counter[str] = Counter()  # messages, by sender

    def mesh_of(self, own: str) -> Mesh:
        wire = self

        class View:
            @property
            def peers(self) -> dict[str, Any]:
                return {b: wire.peer(own, b) for a, b in wire.links if a == own}

            async def peer(self, peer_id: str) -> Any:
                return wire.peer(own, peer_id)

        return cast("Mesh", View())

    def peer(self, sender: str, receiver: str) -> Any:
        def post(message: AnyMessage) -> None:
            if (sender, receiver) not in self.links:
                raise LinkBroken("cut")
            self.sent[sender] += 1
            if not self.drops(message):
                asyncio.get_running_loop().call_later(
                    DELAY_S, self.deliver, sender, receiver, message
                )

        async def send(message: AnyMessage) -> None:
            post(message)

        async def ping(*, timeout_s: float) -> float:
            self.sent[sender] += 1
            self.sent[receiver] += 1
            if (sender, receiver) not in self.links:
                await asyncio.sleep(timeout_s)
                raise LinkTimeout("Ping", timeout_s)
            await asyncio.sleep(2 * DELAY_S)
            return 2 * DELAY_S

        return SimpleNamespace(peer_id=receiver, rtt_s=None, send=send, post=post, ping=ping)

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
        self.watched: set[str] = set()
        clock = self._clock = asyncio.get_running_loop().time
        common: Any = {"swarm": SWARM, "sign": signer(name), "verify": verify}
        self.replica = Replica(
            name, is_member=members.__contains__, disk=None, started_ms=1, **common
        )
        self.awareness = Awareness(name, is_member=members.__contains__, started_ms=1, **common)
        self.switch = wire.switches[name] = Switch(name, cast("Any", None))
        self.gossip = Gossip(
            wire.mesh_of(name),
            self.switch,
            self.replica,
            self.awareness,
            clock,
            random.Random(name),
            watched=lambda: self.watched,
        )

    @property
    def live(self) -> set[str]:
        return set(self.awareness.live(self._clock()))


def line_of(names: str, wire: Wire) -> AbstractAsyncContextManager[dict[str, Member]]:
    """Members that are linked like pearls on a string."""
    return linked(names, pairwise(names), wire)


def ring_of(names: str, wire: Wire) -> AbstractAsyncContextManager[dict[str, Member]]:
    """Members that are each linked with the next two of a circle."""
    pairs = [(names[i], names[(i + n) % len(names)]) for i in range(len(names)) for n in (1, 2)]
    return linked(names, [(a, b) for a, b in pairs if a != b], wire)


@asynccontextmanager
async def linked(
    names: str, pairs: Iterable[tuple[str, str]], wire: Wire
) -> AsyncIterator[dict[str, Member]]:
    members = {name: Member(name, wire, set(names)) for name in names}
    runs = [asyncio.create_task(member.gossip.run()) for member in members.values()]
    for a, b in pairs:
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
        async with line_of("abc", wire) as members:
            await asyncio.sleep(3)
            assert members["a"].live == {"a", "b", "c"}
            wire.links -= {("b", "c"), ("c", "b")}
            await asyncio.sleep(7)
            assert members["a"].live == {"a", "b"}

    simulate(scenario)


MANY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"


def test_in_a_large_swarm_a_silent_death_is_noticed_within_moments_too() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with ring_of(MANY, wire) as members:
            await asyncio.sleep(120)
            assert all(member.live == set(MANY) for member in members.values())
            wire.links = {(a, b) for a, b in wire.links if "k" not in (a, b)}
            await asyncio.sleep(15)
            assert all(m.live == set(MANY) - {"k"} for m in members.values() if m.name != "k")

    simulate(scenario)


def test_who_is_watched_is_missed_within_five_seconds_in_a_swarm_of_any_size() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with ring_of(MANY, wire) as members:
            await asyncio.sleep(120)
            members["A"].watched = {"k"}
            wire.links |= {("A", "k"), ("k", "A")}
            await asyncio.sleep(5)
            wire.links = {(a, b) for a, b in wire.links if "k" not in (a, b)}
            await asyncio.sleep(1 + ANSWER_S + DENIAL_S)
            assert "k" not in members["A"].live

    simulate(scenario)


def test_who_is_suspected_over_one_link_denies_it_over_another() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with ring_of("abcde", wire) as members:
            await asyncio.sleep(5)
            wire.links -= {("a", "c"), ("c", "a")}
            for _ in range(100):
                await asyncio.sleep(0.2)
                assert all(member.live == set("abcde") for member in members.values())

    simulate(scenario)


def test_a_link_that_breaks_makes_its_peer_suspect_and_one_that_is_closed_does_not() -> None:
    async def scenario(is_failure: bool) -> set[str]:
        wire = Wire()
        async with line_of("abc", wire) as members:
            await asyncio.sleep(3)
            wire.links -= {("b", "c"), ("c", "b")}
            members["b"].gossip.link_down("c", is_failure=is_failure)
            await asyncio.sleep(0.5 + DENIAL_S)
            return members["a"].live

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(scenario(True)) == {"a", "b"}
        assert runner.run(scenario(False)) == {"a", "b", "c"}


def test_a_member_that_leaves_is_gone_at_once() -> None:
    async def scenario() -> None:
        async with line_of("abc", Wire()) as members:
            await asyncio.sleep(3)
            await members["c"].gossip.aclose()
            await asyncio.sleep(0.1)
            assert members["a"].live == {"a", "b"}

    simulate(scenario)


def test_a_member_that_all_took_for_dead_is_back_when_somebody_hears_of_it() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with line_of("abc", wire) as members:
            await asyncio.sleep(3)
            wire.drops = lambda message: isinstance(message, Beat)
            await asyncio.sleep(30)
            assert members["a"].live == {"a"}
            wire.drops = lambda _: False
            await asyncio.sleep(5)
            assert members["a"].live == {"a", "b", "c"}

    simulate(scenario)


def test_what_an_idle_member_says_does_not_grow_with_the_swarm() -> None:
    async def scenario(names: str) -> float:
        wire = Wire()
        async with ring_of(names, wire):
            await asyncio.sleep(400)
            wire.sent.clear()
            await asyncio.sleep(200)
            return max(wire.sent.values()) / 200

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        of_few, of_many = runner.run(scenario(MANY[:6])), runner.run(scenario(MANY[:30]))
    assert of_many < of_few < 8
    assert of_many < 2


def test_a_beat_outlives_the_wait_for_the_next_two() -> None:
    for n_live in range(1, 2000):
        period_s = beat_period_s(n_live)
        assert 3 * period_s - 1 <= beat_ttl_s(period_s) <= MAX_TTL_S


@pytest.mark.parametrize("n_liars", [1, 3])
def test_false_suspicions_cost_a_bounded_number_of_beats(n_liars: int) -> None:
    async def scenario() -> None:
        wire = Wire()
        async with ring_of("abcdef", wire) as members:
            await asyncio.sleep(60)
            wire.sent.clear()
            for _ in range(200):
                for liar in "bcd"[:n_liars]:
                    lie = News((), (Suspicion("a", 2**53),)).encode()
                    wire.deliver(liar, "a", Beat(body=lie))
                    wire.deliver(liar, "e", Beat(body=lie))
                await asyncio.sleep(0.05)
                assert "a" in members["f"].live
            assert wire.sent["a"] < 10 * (2 * 4 + 4)  # ten seconds: beats and probes

    simulate(scenario)


def test_malformed_news_end_their_link() -> None:
    async def scenario() -> None:
        wire = Wire()
        async with line_of("ab", wire):
            wire.deliver("a", "b", Beat(body=b"\x02\xff"))
            assert [violation.code.value for violation in wire.violations] == ["malformed_frame"]

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
