"""The control plane follows the swarm's secret: members meet again with the next pre-shared key."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

import pytest

from covey.node import control
from covey.node.control import Control
from covey.transport.control import ControlPlane, PeerRecord
from covey.transport.identity import Identity
from covey.transport.membership import Swarm

pytestmark = [pytest.mark.network, pytest.mark.slow]


class Host:
    """A member's control plane and the secret that it should use."""

    def __init__(self, swarm: Swarm) -> None:
        self.identity = Identity.generate()
        self.swarm = swarm
        self.replaced: asyncio.Queue[ControlPlane] = asyncio.Queue()
        self.control = Control(self._make, on_new=self.replaced.put_nowait, rng=random.Random(1))

    async def announce(self) -> None:
        record = PeerRecord(
            peer_id=self.identity.peer_id,
            swarm=self.swarm.id,
            addresses=("127.0.0.1:7070",),
            control_addresses=self.control.addresses,
            sequence=int(time.time() * 1000),
            expires_at=int(time.time()) + 3600,
        )
        await self.control.plane.announce(record)

    def _make(self) -> ControlPlane:
        return ControlPlane(
            private_key=self.identity.seed, psk=self.swarm.libp2p_psk, swarm=self.swarm.id
        )


async def test_members_meet_again_under_the_next_secret_and_who_has_it_not_stays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "LEISURE_S", (0.0, 0.1))
    swarm = Swarm.create(Identity.generate().peer_id)
    first, second, removed = hosts = [Host(swarm) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for host in hosts:
            await host.control.start()
            stack.push_async_callback(host.control.aclose)
        loops = [asyncio.create_task(host.control.run()) for host in hosts]
        later = swarm.next_epoch()
        for host in (first, second):
            host.swarm = later
            host.control.follow()
        for host in (first, second):
            assert await asyncio.wait_for(host.replaced.get(), 20) is host.control.plane
        assert await second.control.plane.bootstrap(first.control.addresses) == 1
        await first.announce()
        await second.announce()
        found = await second.control.plane.discover()
        assert [record.peer_id for record in found] == [first.identity.peer_id]
        assert await removed.control.plane.bootstrap(first.control.addresses) == 0
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
