"""A steady link loses, doubles and reorders nothing, whenever its carriers change or break."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.transport.errors import LinkBroken, TransportError
from covey.transport.frame import Frame, Tensor
from covey.transport.handshake import hear_hello, introduce
from covey.transport.identity import Identity
from covey.transport.memory import Conditions, MemoryLink, memory_link_pair
from covey.transport.messages import Admitted, Forward, Hello
from covey.transport.steady.link import SteadyLink
from support.virtual_time import VirtualTimeLoop

A, B = Identity(bytes(32)).peer_id, Identity(bytes([1] * 32)).peer_id
N_SESSIONS = 3


class Weather:
    """Two ends of a steady link, and the carriers that come and go below them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.carriers: list[MemoryLink] = []
        carrier_a, carrier_b = self.new_carriers()
        self.at_a, self.at_b = SteadyLink(carrier_a, bytes(16)), SteadyLink(carrier_b, bytes(16))
        self.mending: asyncio.Task[None] | None = None
        self.n_moves = 0
        for link in (self.at_a, self.at_b):
            link.on_lost = self.mend_soon

    def new_carriers(self) -> tuple[MemoryLink, MemoryLink]:
        conditions = Conditions(
            delay_s=self.rng.choice((0.0, 0.001, 0.05)),
            jitter_s=0.02,
            loss=self.rng.choice((0.0, 0.2)),
            retransmit_s=0.05,
        )
        pair = memory_link_pair(A, B, conditions=conditions, seed=self.rng.getrandbits(32))
        self.carriers += pair
        return pair

    def mend_soon(self) -> None:
        if self.mending is None or self.mending.done():
            self.mending = asyncio.create_task(self.mend())

    def move_soon(self) -> None:
        if self.mending is None or self.mending.done():
            self.mending = asyncio.create_task(self.mend(at_least=1))

    async def mend(self, at_least: int = 0) -> None:
        while at_least > 0 or self.at_a.needs_carrier or self.at_b.needs_carrier:
            at_least -= 1
            await self.move()

    async def move(self) -> None:
        """As a mesh does: either end dials, says hello and is admitted; any of it may fail."""
        dialler, listener = self.at_a, self.at_b
        out, in_ = self.new_carriers()
        if self.rng.random() < 0.5:
            dialler, listener, out, in_ = listener, dialler, in_, out

        async def admit() -> None:
            hello = await hear_hello(in_)
            in_.post(Frame(message=Admitted(received=listener.receipt)))
            listener.attach(in_, hello.received)

        admitting = asyncio.create_task(admit())
        hello = Hello(link=dialler.id, is_new=False, received=dialler.receipt)
        with suppress(TransportError):
            received = await introduce(out, hello)
            dialler.attach(out, received)
            self.n_moves += 1
        await asyncio.gather(admitting, return_exceptions=True)

    def break_one(self) -> None:
        carrier = self.rng.choice(self.carriers[-4:])
        carrier.break_()

    async def disturb(self, n_times: int, every_s: float) -> None:
        for _ in range(n_times):
            await asyncio.sleep(self.rng.uniform(0, every_s))
            if self.rng.random() < 0.6:
                self.move_soon()
            else:
                self.break_one()

    async def close(self) -> None:
        if self.mending is not None:
            await self.mending
        for link in (self.at_a, self.at_b):
            link.abort(LinkBroken("the test is over"))
            await link.aclose()


def frame(session: int, step: int, nbytes: int = 0) -> Frame:
    message = Forward(
        session=f"s{session}", epoch=0, stage_idx=0, step=step, position=0, n_return=1
    )
    data = bytes([step % 251]) * nbytes
    return Frame(message=message, tensors={"x": Tensor("u8", (nbytes,), data)})


async def send_all(
    link: SteadyLink, n_steps: int, sizes: Sequence[int], rng: random.Random
) -> None:
    for step in range(n_steps):
        for session in range(N_SESSIONS):
            if rng.random() < 0.2:
                link.post(frame(session, step))
            else:
                await link.send(frame(session, step, rng.choice(sizes)))
        await asyncio.sleep(rng.uniform(0, 0.02))


async def receive_all(link: SteadyLink, n_steps: int, done: asyncio.Barrier) -> None:
    """All of it; and then go on reading, as a peer does, until the other end has all too."""
    seen = dict.fromkeys((f"s{session}" for session in range(N_SESSIONS)), 0)
    while set(seen.values()) != {n_steps}:
        got = await link.receive()
        assert isinstance(got.message, Forward)
        assert got.message.step == seen[got.message.session]
        data = bytes(got.tensors["x"].data)
        assert data == bytes([got.message.step % 251]) * len(data)
        seen[got.message.session] += 1
    waiting = asyncio.ensure_future(done.wait())
    extra = asyncio.ensure_future(link.receive())
    await asyncio.wait({waiting, extra}, return_when=asyncio.FIRST_COMPLETED)
    assert not extra.done()
    extra.cancel()


async def talk_through(
    seed: int, *, n_steps: int, n_disturbances: int, every_s: float, sizes: Sequence[int]
) -> int:
    rng = random.Random(seed)
    weather = Weather(rng)
    disturbing = asyncio.create_task(weather.disturb(n_disturbances, every_s))
    ends, done = (weather.at_a, weather.at_b), asyncio.Barrier(2)
    try:
        async with asyncio.timeout(3600):
            await asyncio.gather(
                *(send_all(link, n_steps, sizes, rng) for link in ends),
                *(receive_all(link, n_steps, done) for link in ends),
            )
            await disturbing
    finally:
        disturbing.cancel()
        await weather.close()
    return weather.n_moves


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_to_carriers_all_arrives_once_in_order(seed: int) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(
            talk_through(
                seed,
                n_steps=20,
                n_disturbances=15,
                every_s=0.05,
                sizes=(0, 10, 5_000, 700_000),
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("n_wanted", [150, pytest.param(1000, marks=pytest.mark.lab)])
def test_moves_at_random_moments_lose_and_double_nothing(n_wanted: int) -> None:
    n_moves = 0
    for seed in itertools.count():
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            n_moves += runner.run(
                talk_through(
                    seed, n_steps=300, n_disturbances=100, every_s=0.1, sizes=(0, 10, 5_000, 70_000)
                )
            )
        if n_moves >= n_wanted:
            break
