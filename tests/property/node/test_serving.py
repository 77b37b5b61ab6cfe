"""A stage under any order of honest and hostile calls keeps its books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from covey.errors import CoveyError
from covey.node.engine.tensors import HiddenStates
from covey.node.serving import LEASE_TTL_S
from covey.transport.errors import ProtocolViolation
from covey.transport.messages import CloseSession, Forward, OpenSession
from support.node_core import (
    PEERS,
    AddingStage,
    CoreLoop,
    CoreNode,
    Net,
    route_of,
    rows,
    settled,
    wire,
)

ME, HEAD, OTHER = PEERS[:3]
ROUTES = (route_of(ME), route_of(ME, OTHER, epoch=4))
CAPACITY = 12
NAMES = ("a", "b", "c")


class StrictStage(AddingStage):
    """An engine that notes what a real one would crash on or waste memory for."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.lengths: dict[str, int] = {}

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        super().open_session(session, n_tokens, prefix)
        self.lengths[session] = 0
        if sum(self.open.values()) > CAPACITY:
            self.faults.append("more memory than was leased out")
        return 0

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        if not 0 <= position <= self.lengths[session]:
            self.faults.append("a gap")
        if position + len(hidden) > self.open.get(session, 0):
            self.faults.append("beyond the cache, or after its end")
        self.lengths[session] = position + len(hidden)
        return super().forward(session, position, hidden)


Tasks = set[asyncio.Task[None]]
Call = Callable[[CoreNode, Tasks], None]


async def _open(node: CoreNode, head: str, message: OpenSession) -> None:
    with suppress(CoveyError):
        await node.switch._requests[OpenSession](head, message)


def opening(head: str, route: int, name: str, n_tokens: int) -> Call:
    message = OpenSession(
        session=name,
        plan=ROUTES[route].digest,
        epoch=ROUTES[route].epoch,
        stage_idx=0,
        n_tokens=n_tokens,
        previous=head,
        next=head,
    )
    return lambda node, tasks: tasks.add(asyncio.create_task(_open(node, head, message)))


def forwarding(sender: str, name: str, epoch: int, step: int, position: int, n_tokens: int) -> Call:
    message = Forward(
        session=name, epoch=epoch, stage_idx=0, step=step, position=position, n_return=0
    )

    def run(node: CoreNode, _: Tasks) -> None:
        with suppress(ProtocolViolation):
            node.server.take_forward(sender, message, wire(rows(n_tokens)))

    return run


def closing(head: str, name: str) -> Call:
    message = CloseSession(session=name)
    return lambda node, _: node.server._close_asked(head, message, {})


def losing(head: str) -> Call:
    return lambda node, _: node.server.peer_lost(head)


def working(n_jobs: int | None) -> Call:
    return lambda node, _: node.worker.release(n_jobs)


def expiring(node: CoreNode, _: Tasks) -> None:
    node.server.expire()


def cancelling(_: CoreNode, tasks: Tasks) -> None:
    for task in tasks:
        task.cancel()


HEADS = st.sampled_from([HEAD, OTHER])
NAME = st.sampled_from(NAMES)
CALLS = st.one_of(
    st.builds(opening, HEADS, st.integers(0, 1), NAME, st.integers(1, 8)),
    st.builds(
        forwarding,
        HEADS,
        NAME,
        st.integers(3, 4),
        st.integers(0, 30),
        st.integers(0, 8),
        st.integers(1, 4),
    ),
    st.builds(closing, HEADS, NAME),
    st.builds(losing, HEADS),
    st.builds(working, st.sampled_from([0, 1, 2, None])),
    st.sampled_from([expiring, cancelling]),
    st.none(),  # everything that can happen happens
    st.sampled_from([1.0, LEASE_TTL_S]),  # time passes
)


def balance(node: CoreNode) -> None:
    sessions = node.server._sessions.values()
    for stage in node.server.stages.values():
        leased = sum(s.request.n_tokens for s in sessions if s.stage is stage)
        assert stage.leases.free_bytes == CAPACITY - leased


async def _scenario(calls: list[Any]) -> None:
    async with Net(3) as (node, *_):
        node.switch.on_message(Forward, node.server.take_forward)
        engines = [StrictStage() for _ in ROUTES]
        for route, engine in zip(ROUTES, engines, strict=True):
            node.load(route, engine=engine, capacity_tokens=CAPACITY)
        tasks: Tasks = set()
        for call in calls:
            if call is None:
                await settled()
            elif isinstance(call, float):
                await asyncio.sleep(call)
            else:
                call(node, tasks)
            balance(node)
        node.worker.release()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
        await asyncio.sleep(LEASE_TTL_S)
        await settled()
        node.server.expire()
        await settled()
        balance(node)
        assert node.server.n_sessions == 0
        assert [engine.open for engine in engines] == [{}, {}]
        assert [engine.faults for engine in engines] == [[], []]


@given(st.lists(CALLS, max_size=25))
def test_leases_memory_and_sessions_always_agree_and_nothing_outlives_its_time(
    calls: list[Any],
) -> None:
    escaped: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=CoreLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: escaped.append(context))
        runner.run(_scenario(calls))
    assert not escaped
