"""What a node says of its links: measured once, refined quietly, anew when the way is another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from covey.node.links import (
    LOSS_PACKETS,
    NOTABLE_BUSY_RTT_S,
    NOTE_EVERY_S,
    REMEASURE_CHANGED_S,
    SETTLE_S,
    LinkMeter,
    LossMeter,
)
from covey.transport.errors import LinkTimeout
from covey.transport.link import LinkKind, Packets
from support.virtual_time import VirtualTimeLoop


class Peer:
    """What the meter sees of a link."""

    def __init__(self) -> None:
        self.is_needed = False
        self.rtt_s: float | None = 0.010
        self.least_rtt_s: float | None = None
        self.kind = LinkKind.RELAYED
        self.packets: Packets | None = None
        self.found: tuple[float, float] | None = (0.010, 1e6)
        self.n_probes = 0

    async def measure(self) -> tuple[float, float]:
        self.n_probes += 1
        if self.found is None:
            raise LinkTimeout("measurement", 10.0)
        return self.found


class Mesh:
    def __init__(self, peer: Peer) -> None:
        self.peers = {"b": peer}

    async def peer(self, peer_id: str) -> Peer:
        return self.peers[peer_id]


class Replica:
    """Counts what is published."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []

    def set(self, _: str, value: dict[str, Any]) -> None:
        self.values.append(value["value"])


def simulate(scenario: Callable[[Peer, Replica], Awaitable[None]]) -> None:
    async def run() -> None:
        peer, replica = Peer(), Replica()
        meter = LinkMeter(
            cast("Any", Mesh(peer)),
            cast("Any", replica),
            "a",
            lambda: frozenset({"a", "b"}),
            asyncio.get_running_loop().time,
        )
        task = asyncio.create_task(meter.run())
        try:
            await scenario(peer, replica)
        finally:
            task.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())


N_PROBES = 1 + len(SETTLE_S)
SETTLED_S = sum(SETTLE_S) + 5


def test_a_link_is_measured_while_it_settles_and_noise_is_not_published() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        for rtt_s in (0.011, 0.009, 0.014, 0.008):
            await asyncio.sleep(2 * NOTE_EVERY_S)
            peer.rtt_s = rtt_s
        assert peer.n_probes == N_PROBES
        assert [value["rtt_s"] for value in replica.values] == [0.010]

    simulate(scenario)


def test_of_the_first_probes_the_best_figures_count() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        peer.found = (0.030, 1e6)  # while the member joins
        await asyncio.sleep(SETTLE_S[0] / 2)
        peer.found = (0.012, 3e6)
        await asyncio.sleep(SETTLE_S[0])
        peer.found = (0.040, 2e6)  # while it loads its blocks
        peer.rtt_s = 0.014
        await asyncio.sleep(SETTLED_S)
        assert [(value["rtt_s"], value["bandwidth_bytes_per_s"]) for value in replica.values] == [
            (0.030, 1e6),
            (0.012, 3e6),
        ]

    simulate(scenario)


def test_a_heartbeat_that_waits_for_a_session_says_nothing_of_the_way() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        await asyncio.sleep(SETTLED_S)
        peer.is_needed = True
        peer.rtt_s = 0.010 + 0.9 * NOTABLE_BUSY_RTT_S
        await asyncio.sleep(2 * NOTE_EVERY_S)
        assert len(replica.values) == 1
        peer.rtt_s = 0.010 + 10 * NOTABLE_BUSY_RTT_S
        peer.least_rtt_s = 0.010  # one of the last that found the way free
        await asyncio.sleep(2 * NOTE_EVERY_S)
        assert len(replica.values) == 1
        peer.least_rtt_s = 0.010 + 1.1 * NOTABLE_BUSY_RTT_S
        await asyncio.sleep(2 * NOTE_EVERY_S)
        assert replica.values[-1]["rtt_s"] == peer.least_rtt_s

    simulate(scenario)


def test_a_link_that_a_session_needs_is_not_probed_again_until_it_is_over() -> None:
    async def scenario(peer: Peer, _: Replica) -> None:
        peer.is_needed = True  # the first probe is taken all the same: without it there is no plan
        await asyncio.sleep(SETTLED_S)
        assert peer.n_probes == 1
        peer.is_needed = False
        await asyncio.sleep(SETTLED_S)
        assert peer.n_probes == N_PROBES

    simulate(scenario)


def test_another_round_trip_time_is_published_and_then_probed_without_a_flood() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        await asyncio.sleep(SETTLED_S)
        for n in range(60):  # it flaps each second
            peer.rtt_s = 0.05 if n % 2 else 0.010
            await asyncio.sleep(1)
        assert len(replica.values) <= 1 + 60 / NOTE_EVERY_S
        peer.rtt_s, peer.found = 0.05, (0.05, 2e5)
        await asyncio.sleep(REMEASURE_CHANGED_S + NOTE_EVERY_S)
        assert peer.n_probes == N_PROBES + 1
        assert replica.values[-1]["bandwidth_bytes_per_s"] == 2e5

    simulate(scenario)


def test_a_link_that_goes_another_way_is_measured_anew_at_once() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        await asyncio.sleep(2)
        peer.kind, peer.found = LinkKind.PUNCHED, (0.002, 1e7)
        await asyncio.sleep(3)
        assert [value["kind"] for value in replica.values] == ["relayed", "punched"]
        assert replica.values[-1]["rtt_s"] == 0.002

    simulate(scenario)


def test_a_link_that_cannot_be_measured_is_tried_again_and_says_nothing() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        peer.found = None
        await asyncio.sleep(40)
        assert 2 <= peer.n_probes <= 4
        assert not replica.values

    simulate(scenario)


def test_loss_that_matters_is_published() -> None:
    async def scenario(peer: Peer, replica: Replica) -> None:
        peer.packets = Packets(n_sent=0, n_resent=0)
        for n in range(1, 40):
            peer.packets = Packets(n_sent=n * 300, n_resent=n * 15)
            await asyncio.sleep(2)
        assert len(replica.values) == 2
        assert abs(replica.values[-1]["loss"] - 0.05) < 0.01

    simulate(scenario)


def test_loss_is_a_moving_average_that_no_probe_and_no_new_carrier_spoils() -> None:
    meter = LossMeter()
    meter.look(None)
    meter.look(Packets(n_sent=LOSS_PACKETS - 1, n_resent=50))  # too few
    meter.skip(Packets(n_sent=5000, n_resent=400))
    meter.look(Packets(n_sent=5000 + LOSS_PACKETS, n_resent=400))
    assert meter.loss == 0.0
    meter.look(Packets(n_sent=10, n_resent=0))
    meter.look(Packets(n_sent=10 + LOSS_PACKETS, n_resent=LOSS_PACKETS // 10))
    assert meter.loss is not None
    assert 0 < meter.loss < 0.1


def test_what_turns_out_to_have_arrived_was_not_lost_and_is_no_new_carrier() -> None:
    meter = LossMeter()
    meter.look(Packets(n_sent=LOSS_PACKETS, n_resent=10))
    before = meter.loss
    assert before is not None
    meter.look(Packets(n_sent=2 * LOSS_PACKETS, n_resent=4))
    assert meter.loss is not None
    assert 0 < meter.loss < before
