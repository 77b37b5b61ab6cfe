"""Discovery on virtual time: what is announced and when, whom it asks, whom it dials."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from covey.node.discovery import ANNOUNCE_S, CALM_SEARCH_S, SEEN_FILE, Discovery
from covey.node.home import Home
from covey.transport.control_records import ControlError, PeerRecord, RecordOutdated
from covey.transport.errors import PeerUnreachable
from covey.transport.messages import MemberEntry
from support.node_core import PEERS, in_virtual_time

OWN, *OTHERS = PEERS
SWARM = "meadow2026"


def way_to(peer_id: str) -> str:
    return f"/ip4/192.0.2.1/tcp/7000/p2p/{peer_id}"


def record_of(peer_id: str, *, sequence: int = 1) -> PeerRecord:
    return PeerRecord(
        peer_id=peer_id,
        swarm=SWARM,
        addresses=("192.0.2.1:7070",),
        control_addresses=(way_to(peer_id),),
        sequence=sequence,
        expires_at=int(time.time()) + 3600,
        relays=(OTHERS[-1],),
    )


class World:
    """What surrounds a `Discovery`: control plane, mesh, views, in as much as it uses them."""

    addresses: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.answering: set[str] = set()  # control planes
        self.reachable: set[str] = set()  # for links
        self.records: list[PeerRecord] = []  # in the DHT
        self.outdated: list[RecordOutdated] = []  # what announcing raises, once each
        self.cards: dict[str, Any] = {}
        self.live: set[str] = {OWN}
        self.peers: dict[str, object] = {}
        self.announced: list[PeerRecord] = []
        self.is_reachable: list[bool] = []
        self.bootstrapped: list[str] = []
        self.known: list[set[str]] = []  # what each search passed over
        self.dialled: list[str] = []
        self.learnt: dict[str, tuple[Sequence[str], Sequence[str]]] = {}

    # as a control plane

    def on_discovered(self, callback: object) -> None:
        pass

    async def set_reachable(self, *, is_reachable: bool) -> None:
        self.is_reachable.append(is_reachable)

    async def bootstrap(self, addresses: Sequence[str]) -> int:
        self.bootstrapped += addresses
        return len({a for a in addresses if a.rsplit("/", 1)[1] in self.answering})

    async def announce(self, record: PeerRecord) -> None:
        if self.outdated:
            raise self.outdated.pop()
        self.announced.append(record)

    async def discover(self, known: Collection[str]) -> list[PeerRecord]:
        self.known.append(set(known))
        return self.records

    # as a mesh

    def learn(
        self,
        peer_id: str,
        addresses: Sequence[str],
        *,
        mapped: Sequence[str] = (),
        relays: Sequence[str] = (),
    ) -> None:
        self.learnt[peer_id] = (tuple(addresses), tuple(relays))

    async def peer(self, peer_id: str) -> object:
        self.dialled.append(peer_id)
        if peer_id not in self.reachable:
            raise PeerUnreachable(peer_id, "nobody is there")
        return self.peers.setdefault(peer_id, object())

    # as views

    def members(self) -> dict[str, Any]:
        return self.cards

    def add_card(self, peer_id: str) -> None:
        self.cards[peer_id] = SimpleNamespace(
            addresses=("192.0.2.1:7070",),
            control_addresses=(way_to(peer_id),),
            mapped=(),
            relays=(),
        )


@asynccontextmanager
async def discovering(
    world: World, home: Home, known: Sequence[MemberEntry] = ()
) -> AsyncIterator[Discovery]:
    discovery = Discovery(
        control=cast("Any", world),
        mesh=cast("Any", world),
        views=cast("Any", world),
        home=home,
        swarm=SWARM,
        own_peer_id=OWN,
        known=known,
        is_allowed=lambda _: True,
        live=lambda: frozenset(world.live),
        rng=random.Random(1),
        on_failed=lambda _, __: None,
    )
    run = asyncio.create_task(discovery.run())
    try:
        yield discovery
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await discovery.aclose()


@pytest.fixture(name="home")
def _home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "home") as home:
        yield home


def entry(peer_id: str) -> MemberEntry:
    return MemberEntry(
        peer_id=peer_id, addresses=["192.0.2.1:7070"], control_addresses=[way_to(peer_id)]
    )


@in_virtual_time
async def test_our_record_is_announced_again_long_before_it_expires(home: Home) -> None:
    world = World()
    async with discovering(world, home) as discovery:
        await discovery.announced.wait()
        await asyncio.sleep(3600)
        assert len(world.announced) in (3, 4)
        sequences = [record.sequence for record in world.announced]
        assert sequences == sorted(set(sequences))


@in_virtual_time
async def test_a_change_of_how_we_are_reached_is_announced_at_once(home: Home) -> None:
    world = World()
    async with discovering(world, home) as discovery:
        await asyncio.sleep(1)
        assert (world.announced[-1].is_reachable, world.announced[-1].relays) == (None, ())
        for _ in range(2):  # saying it again changes nothing
            discovery.update_reach(is_reachable=False, relays=OTHERS[:1])
            await asyncio.sleep(1)
        assert len(world.announced) == 2
        assert world.announced[-1].is_reachable is False
        assert world.announced[-1].relays == tuple(OTHERS[:1])
        assert world.is_reachable == [True, False]


@in_virtual_time
async def test_a_record_of_an_earlier_life_with_a_faster_clock_is_outdone(home: Home) -> None:
    world = World()
    world.outdated = [RecordOutdated(1 << 50)]
    async with discovering(world, home) as discovery:
        await discovery.announced.wait()
        discovery.update_reach(is_reachable=True)
        await asyncio.sleep(1)
        assert [record.sequence for record in world.announced] == [(1 << 50) + 1, (1 << 50) + 2]


@in_virtual_time
async def test_it_announces_anew_when_the_swarm_has_doubled(home: Home) -> None:
    world = World()
    async with discovering(world, home):
        await asyncio.sleep(5)
        world.add_card(OTHERS[0])
        await asyncio.sleep(10)
        assert len(world.announced) == 2  # soon: nobody held the first
        for peer_id in OTHERS[1:]:
            world.add_card(peer_id)
            await asyncio.sleep(5)
        assert len(world.announced) == 2
        await asyncio.sleep(100)
        assert len(world.announced) == 3  # once for all of them


@in_virtual_time
async def test_a_control_plane_that_fails_is_tried_again_soon(home: Home) -> None:
    world = World()
    failing = [ControlError("no"), ControlError("no")]

    async def announce(record: PeerRecord) -> None:
        if failing:
            raise failing.pop()
        world.announced.append(record)

    world.announce = announce  # type: ignore[method-assign]
    async with discovering(world, home) as discovery:
        async with asyncio.timeout(25):
            await discovery.announced.wait()


@in_virtual_time
async def test_who_has_links_leaves_the_dht_in_peace(home: Home) -> None:
    world = World()
    world.live |= set(OTHERS)
    world.reachable |= set(OTHERS)
    for peer_id in OTHERS:
        world.add_card(peer_id)
    async with discovering(world, home):
        await asyncio.sleep(CALM_SEARCH_S - 60)
        assert set(world.peers) == set(OTHERS)
        assert world.known == []
        await asyncio.sleep(120)
        assert world.known == [set(OTHERS)]


@in_virtual_time
async def test_who_is_alone_searches_and_dials_whom_it_finds(home: Home) -> None:
    world = World()
    async with discovering(world, home) as discovery:
        await asyncio.sleep(60)
        assert 4 <= len(world.known) <= 8
        world.records = [record_of(OTHERS[0])]
        world.reachable = {OTHERS[0]}
        await asyncio.sleep(70)
        assert discovery.n_found_by_dht == 1
        assert set(world.peers) == {OTHERS[0]}
        assert world.learnt[OTHERS[0]] == (("192.0.2.1:7070",), (OTHERS[-1],))


@in_virtual_time
async def test_those_whom_the_inviter_named_are_dialled_without_asking_anybody(home: Home) -> None:
    world = World()
    world.reachable = set(OTHERS)
    world.answering = set(OTHERS)
    async with discovering(world, home, [entry(peer_id) for peer_id in OTHERS]) as discovery:
        await discovery.announced.wait()
        await asyncio.sleep(0.1)
        assert set(world.peers) == set(OTHERS)
        assert world.bootstrapped == [way_to(peer_id) for peer_id in OTHERS]


@in_virtual_time
async def test_the_dead_are_dialled_ever_more_seldom_and_who_beats_at_once(home: Home) -> None:
    world = World()
    world.add_card(OTHERS[0])
    async with discovering(world, home):
        await asyncio.sleep(600)
        assert 8 < len(world.dialled) < 25
        world.reachable, world.live = {OTHERS[0]}, {OWN, OTHERS[0]}
        await asyncio.sleep(3.1)
        assert set(world.peers) == {OTHERS[0]}


@in_virtual_time
async def test_whom_it_has_met_is_a_way_in_when_the_inviter_is_gone(home: Home) -> None:
    world = World()
    inviter, friend = OTHERS[:2]
    world.reachable = {inviter, friend}
    world.add_card(friend)
    async with discovering(world, home, [entry(inviter)]):
        await asyncio.sleep(60)
    assert home.load(SEEN_FILE) is not None
    later = World()  # a store that was lost, and an invite long used
    later.answering = {friend}
    async with discovering(later, home) as discovery:
        await discovery.announced.wait()
        assert later.bootstrapped == [way_to(friend)]


@in_virtual_time
async def test_a_damaged_memory_of_ways_is_no_obstacle(home: Home) -> None:
    (home.path / SEEN_FILE).write_text("{")
    world = World()
    async with discovering(world, home) as discovery:
        async with asyncio.timeout(ANNOUNCE_S):
            await discovery.announced.wait()
