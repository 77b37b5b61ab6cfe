"""A stage's sessions: who may open, send, rewind and close, and what is left after each end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from covey.node.engine.errors import CacheOverflow, NonFiniteValues
from covey.node.hidden import WrongTensor
from covey.node.serving import (
    LEASE_TTL_S,
    MAX_CHUNK_TOKENS,
    MAX_QUEUED_FORWARDS,
    MAX_SESSIONS,
    LoadedStage,
)
from covey.node.switch import WrongFrame
from covey.transport.errors import ErrorCode, RefusedByPeer
from covey.transport.frame import Tensor
from covey.transport.messages import (
    CloseSession,
    Forward,
    OpenSession,
    SessionFailed,
    SessionOpened,
    StageTrace,
)
from support.node_core import (
    HIDDEN,
    LINK_S,
    PEERS,
    AddingStage,
    CoreNode,
    Net,
    in_virtual_time,
    route_of,
    rows,
    settled,
    wire,
)

HEAD, STAGE, STRANGER = PEERS[:3]
ROUTE = route_of(STAGE)
TRACE = StageTrace(1, 1, 1)


@dataclass
class Bench:
    """A head that only speaks the protocol, and one stage."""

    head: CoreNode
    stage: CoreNode
    loaded: LoadedStage
    engine: AddingStage
    returns: list[Forward]
    failures: list[SessionFailed]

    async def open(self, **changes: Any) -> None:
        answer = await self.head.switch.request(STAGE, opening(**changes), timeout_s=1)
        assert answer == SessionOpened(session=changes.get("session", "s"))

    async def refusal(self, **changes: Any) -> ErrorCode:
        with pytest.raises(RefusedByPeer) as caught:
            await self.open(**changes)
        return caught.value.code

    def take(self, hidden: Any = None, sender: str = HEAD, **changes: Any) -> None:
        tensors = wire(rows(2)) if hidden is None else hidden
        self.stage.server.take_forward(sender, forward(**changes), tensors)

    @property
    def free(self) -> int:
        return self.loaded.leases.free_bytes

    @property
    def is_empty(self) -> bool:
        return (self.stage.server.n_sessions, self.free, self.engine.open) == (0, 100, {})


def opening(**changes: Any) -> OpenSession:
    plain = OpenSession(
        session="s",
        plan=ROUTE.digest,
        epoch=ROUTE.epoch,
        stage_idx=0,
        n_tokens=10,
        previous=HEAD,
        next=HEAD,
    )
    return msgspec.structs.replace(plain, **changes)


def forward(**changes: Any) -> Forward:
    plain = Forward(
        session="s", epoch=ROUTE.epoch, stage_idx=0, step=0, position=0, n_return=1, codec="exact"
    )
    return msgspec.structs.replace(plain, **changes)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with Net(3) as (head, stage, _):
        engine = AddingStage()
        loaded = stage.load(ROUTE, engine=engine, capacity_tokens=100)
        it = Bench(head, stage, loaded, engine, [], [])
        head.switch.on_message(Forward, lambda _, message, __: it.returns.append(message))
        head.switch.on_message(SessionFailed, lambda _, message, __: it.failures.append(message))
        head.peers[STAGE].hold()  # as heads do, or the idle link would be closed
        yield it


@in_virtual_time
async def test_a_session_leases_memory_and_gives_it_back_when_its_head_closes_it() -> None:
    async with bench() as it:
        await it.open()
        assert (it.free, it.engine.open, it.stage.server.n_sessions) == (90, {"s": 10}, 1)
        await it.head.switch.send(STAGE, CloseSession(session="s"))
        await asyncio.sleep(2 * LINK_S)
        assert it.is_empty
        assert it.failures == []
        await it.stage.server.drained()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"plan": "f" * 64}, ErrorCode.UNKNOWN_PLAN),
        ({"epoch": 4}, ErrorCode.WRONG_EPOCH),
        ({"stage_idx": 1}, ErrorCode.WRONG_EPOCH),
        ({"n_tokens": 101}, ErrorCode.CACHE_FULL),
    ],
)
@in_virtual_time
async def test_a_wrong_open_is_refused_with_its_code(
    changes: dict[str, Any], code: ErrorCode
) -> None:
    async with bench() as it:
        assert await it.refusal(**changes) is code
        assert it.is_empty
        assert it.engine.calls == []


@in_virtual_time
async def test_a_name_in_use_is_refused_and_its_session_lives_on() -> None:
    async with bench() as it:
        await it.open()
        assert await it.refusal(n_tokens=5) is ErrorCode.TOO_MANY_SESSIONS
        assert (it.free, it.engine.open) == (90, {"s": 10})


@in_virtual_time
async def test_there_is_a_limit_of_sessions() -> None:
    async with bench() as it:
        it.loaded.leases.free_bytes = it.loaded.leases.capacity_bytes = MAX_SESSIONS + 1
        for n in range(MAX_SESSIONS):
            await it.open(session=f"s{n}", n_tokens=1)
        assert await it.refusal(session="more", n_tokens=1) is ErrorCode.TOO_MANY_SESSIONS


@in_virtual_time
async def test_a_stopping_node_refuses_and_is_drained_when_the_last_session_ends() -> None:
    async with bench() as it:
        await it.open()
        it.stage.server.refuse_new()
        assert await it.refusal(session="t") is ErrorCode.SHUTTING_DOWN
        drained = asyncio.create_task(it.stage.server.drained())
        await asyncio.sleep(1)
        assert not drained.done()
        await it.head.switch.send(STAGE, CloseSession(session="s"))
        await asyncio.wait_for(drained, 1)


@pytest.mark.parametrize(
    "error", [CacheOverflow(session="s", needed_tokens=2, capacity_tokens=1), RuntimeError("bug")]
)
@in_virtual_time
async def test_an_open_that_fails_in_the_engine_leaves_no_lease_and_is_answered_at_once(
    error: Exception,
) -> None:
    async with bench() as it:
        it.engine.error = error
        began_at = it.head.clock()
        assert await it.refusal() is ErrorCode.INTERNAL
        assert it.head.clock() - began_at < 3 * LINK_S
        assert it.is_empty
        await it.open()  # the name is free again


@in_virtual_time
async def test_a_close_right_behind_the_open_still_ends_the_session() -> None:
    # Both frames are read before any task begins: the open must have been admitted by then.
    async with bench() as it:
        request = asyncio.create_task(it.open())
        await asyncio.sleep(0)
        await it.head.switch.send(STAGE, CloseSession(session="s"))
        with pytest.raises(RefusedByPeer) as caught:
            await request
        assert caught.value.code is ErrorCode.UNKNOWN_SESSION
        assert it.is_empty


@in_virtual_time
async def test_a_session_that_ends_while_it_is_opened_is_refused_with_the_reason() -> None:
    async with bench() as it:
        it.stage.worker.is_held = True
        refusal = asyncio.create_task(it.refusal())
        await asyncio.sleep(2 * LINK_S)
        assert it.free == 90
        it.stage.server.remove(ROUTE.digest)
        assert it.free == 100
        it.stage.worker.release()
        assert await refusal is ErrorCode.UNKNOWN_PLAN
        assert it.is_empty


@in_virtual_time
async def test_a_reused_name_is_not_hit_by_the_end_of_its_predecessor() -> None:
    async with bench() as it:
        await it.open()
        it.stage.worker.is_held = True
        await it.head.switch.send(STAGE, CloseSession(session="s"))
        second = asyncio.create_task(it.open(n_tokens=20))
        await asyncio.sleep(2 * LINK_S)
        it.stage.worker.release()
        await second
        await settled()
        assert (it.free, it.engine.open, it.stage.server.n_sessions) == (80, {"s": 20}, 1)
        it.take()
        await settled()
        assert it.engine.forwards == [(0, 2)]


@in_virtual_time
async def test_an_open_that_fails_late_does_not_end_the_next_session_of_its_name() -> None:
    async with bench() as it:
        it.stage.worker.is_held = True
        it.engine.error = RuntimeError("bug")
        first = asyncio.create_task(it.refusal())
        await asyncio.sleep(2 * LINK_S)
        await it.head.switch.send(STAGE, CloseSession(session="s"))
        second = asyncio.create_task(it.open(n_tokens=20))
        await asyncio.sleep(2 * LINK_S)
        it.stage.worker.release()
        assert await first is ErrorCode.INTERNAL
        await second
        assert (it.free, it.engine.open) == (80, {"s": 20})


@in_virtual_time
async def test_only_the_head_may_close() -> None:
    async with bench() as it:
        await it.open()
        it.stage.server._close_asked(STRANGER, CloseSession(session="s"), {})
        assert it.stage.server.n_sessions == 1


@in_virtual_time
async def test_the_last_stage_returns_the_rows_that_are_asked_for() -> None:
    async with bench() as it:
        received: list[tuple[Forward, Any]] = []
        it.head.switch.on_message(Forward, lambda _, m, tensors: received.append((m, tensors)))
        await it.open()
        it.take(wire(rows(3)), n_return=0)
        it.take(wire(rows(3, first=3)), step=1, position=3, n_return=2)
        await asyncio.sleep(2 * LINK_S)
        (first, nothing), (second, tensors) = received
        assert nothing == {}
        assert (first.stage_idx, first.step, second.position) == (1, 0, 3)
        values = np.frombuffer(tensors["hidden"].data, np.float32).reshape(2, HIDDEN)
        assert np.array_equal(values, rows(2, first=5))
        [trace] = second.trace
        assert (trace.compute_us, trace.received_bytes) == (2000, 3 * HIDDEN * 4)
        assert 1000 <= trace.queue_us < 10_000
        assert (it.loaded.n_forwards, it.loaded.received_bytes) == (2, 6 * HIDDEN * 4)


WRONG_FRAMES: dict[str, tuple[dict[str, Any], ErrorCode]] = {
    "sender": ({"sender": STRANGER}, ErrorCode.NOT_A_MEMBER),
    "epoch": ({"epoch": 4}, ErrorCode.WRONG_EPOCH),
    "stage": ({"stage_idx": 1}, ErrorCode.WRONG_EPOCH),
    "trace": ({"trace": [TRACE]}, ErrorCode.MALFORMED_FRAME),
    "step before": ({"step": 0}, ErrorCode.WRONG_POSITION),
    "gap": ({"position": 3}, ErrorCode.WRONG_POSITION),
    "beyond the lease": ({"hidden": wire(rows(9)), "n_return": 0}, ErrorCode.CACHE_FULL),
    "too much to return": ({"n_return": 3}, ErrorCode.WRONG_TENSOR),
    "codec": ({"codec": "fp16"}, ErrorCode.WRONG_TENSOR),
    "no tensor": ({"hidden": {}}, ErrorCode.WRONG_TENSOR),
    "name of the tensor": ({"hidden": {"x": wire(rows(2))["hidden"]}}, ErrorCode.WRONG_TENSOR),
    "dtype": (
        {"hidden": {"hidden": Tensor("bf16", (2, HIDDEN), bytes(4 * HIDDEN))}},
        ErrorCode.WRONG_TENSOR,
    ),
    "width": (
        {"hidden": {"hidden": Tensor("fp32", (2, HIDDEN + 1), bytes(8 * (HIDDEN + 1)))}},
        ErrorCode.WRONG_TENSOR,
    ),
    "dimensions": (
        {"hidden": {"hidden": Tensor("fp32", (2 * HIDDEN,), bytes(8 * HIDDEN))}},
        ErrorCode.WRONG_TENSOR,
    ),
    "no rows": (
        {"hidden": {"hidden": Tensor("fp32", (0, HIDDEN), b"")}, "n_return": 0},
        ErrorCode.WRONG_TENSOR,
    ),
    "too many rows": (
        {"hidden": wire(rows(MAX_CHUNK_TOKENS + 1)), "n_return": 0},
        ErrorCode.WRONG_TENSOR,
    ),
}


@pytest.mark.parametrize("what", WRONG_FRAMES)
@in_virtual_time
async def test_a_wrong_frame_is_coded_and_nothing_of_it_is_used(what: str) -> None:
    changes, code = WRONG_FRAMES[what]
    async with bench() as it:
        await it.open()
        it.take()
        await settled()
        with pytest.raises((WrongFrame, WrongTensor)) as caught:
            it.take(**{"step": 1, "position": 2, **changes})
        assert caught.value.code is code
        await settled()
        assert it.engine.forwards == [(0, 2)]
        it.take(step=1, position=2)  # the session stands where it stood
        await settled()
        assert it.engine.forwards == [(0, 2), (2, 2)]


@in_virtual_time
async def test_a_peer_that_sends_a_wrong_frame_loses_its_link_and_its_sessions() -> None:
    async with bench() as it:
        await it.open()
        await it.head.switch.send(STAGE, forward(position=1), wire(rows(2)))
        await asyncio.sleep(3 * LINK_S)
        [(_, error)] = it.head.lost
        assert isinstance(error, RefusedByPeer)
        assert error.code is ErrorCode.WRONG_POSITION
        assert it.is_empty


@in_virtual_time
async def test_a_frame_may_rewind_under_a_new_step() -> None:
    async with bench() as it:
        await it.open()
        it.take()
        it.take(step=1, position=2)
        it.take(step=5, position=1)
        await settled()
        assert it.engine.forwards == [(0, 2), (2, 2), (1, 2)]
        with pytest.raises(WrongFrame) as caught:
            it.take(step=6, position=4)  # what was behind position 3 is gone
        assert caught.value.code is ErrorCode.WRONG_POSITION


@in_virtual_time
async def test_frames_of_an_unknown_session_are_dropped() -> None:
    async with bench() as it:
        it.take()
        await settled()
        assert it.engine.calls == []


@in_virtual_time
async def test_a_late_return_for_the_head_here_does_not_offend_its_own_stage() -> None:
    # Head and stage 0 are one node: between the head's end of the session and the stage's, what
    # the last stage returns is nobody's fault.
    async with Net(2) as (head, other):
        route = route_of(head.peer_id, other.peer_id)
        head.load(route)
        other.load(route)
        session = await head.pipelines.open("s", route, hidden_size=HIDDEN, n_tokens=4)
        head.pipelines.close(session)
        late = forward(stage_idx=2, trace=[TRACE, TRACE])
        head._take_forward(other.peer_id, late, wire(rows(1)))
        with pytest.raises(WrongFrame):
            other._take_forward(head.peer_id, late, wire(rows(1)))  # no head there


@in_virtual_time
async def test_more_frames_than_any_head_has_in_flight_are_refused() -> None:
    async with bench() as it:
        await it.open()
        it.stage.worker.is_held = True
        it.take(step=0)
        await settled()  # the task has taken it
        for step in range(1, MAX_QUEUED_FORWARDS + 1):
            it.take(step=step)
        with pytest.raises(WrongFrame) as caught:
            it.take(step=MAX_QUEUED_FORWARDS + 1)
        assert caught.value.code is ErrorCode.CACHE_FULL


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteValues(session="s", position=0, is_received=False), ErrorCode.INTERNAL),
        (RuntimeError("a bug, of /home/alice"), ErrorCode.INTERNAL),
    ],
)
@in_virtual_time
async def test_an_engine_that_raises_ends_the_session_and_the_head_hears_at_once(
    error: Exception, code: ErrorCode
) -> None:
    async with bench() as it:
        await it.open()
        it.engine.error = error
        it.take()
        await asyncio.sleep(2 * LINK_S)
        assert it.failures == [SessionFailed(session="s", stage_idx=0, code=code)]
        assert it.is_empty


@in_virtual_time
async def test_a_bug_in_the_engine_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with bench() as it:
        await it.open()
        it.engine.error = RuntimeError("a bug")
        it.take()
        await settled()
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[0] is RuntimeError


@in_virtual_time
async def test_the_lease_of_a_silent_head_runs_out() -> None:
    async with bench() as it:
        await it.open()
        await asyncio.sleep(LEASE_TTL_S - 2)
        it.stage.server.expire()
        assert it.stage.server.n_sessions == 1
        await asyncio.sleep(2)
        it.stage.server.expire()
        await asyncio.sleep(2 * LINK_S)
        assert it.failures == [
            SessionFailed(session="s", stage_idx=0, code=ErrorCode.DEADLINE_EXCEEDED)
        ]
        assert it.is_empty


@in_virtual_time
async def test_each_frame_renews_the_lease() -> None:
    async with bench() as it:
        await it.open()
        await asyncio.sleep(LEASE_TTL_S - 2)
        it.take()
        await asyncio.sleep(LEASE_TTL_S - 2)
        it.stage.server.expire()
        assert it.stage.server.n_sessions == 1


@in_virtual_time
async def test_a_frame_past_the_lease_is_too_late_even_if_nobody_looked_yet() -> None:
    async with bench() as it:
        await it.open()
        await asyncio.sleep(LEASE_TTL_S)
        it.take()
        await asyncio.sleep(2 * LINK_S)
        assert [failure.code for failure in it.failures] == [ErrorCode.DEADLINE_EXCEEDED]
        assert it.is_empty
        assert it.engine.forwards == []


@in_virtual_time
async def test_a_head_that_waits_for_a_slow_stage_keeps_its_lease() -> None:
    async with bench() as it:
        await it.open()
        it.stage.worker.is_held = True
        it.take()
        for _ in range(3):
            await asyncio.sleep(LEASE_TTL_S / 2)
            it.stage.server.expire()
        assert it.stage.server.n_sessions == 1
        it.stage.worker.release()
        await asyncio.sleep(LEASE_TTL_S - 2)  # and its time begins when it has its answer
        it.stage.server.expire()
        assert it.stage.server.n_sessions == 1
        await asyncio.sleep(2)
        it.stage.server.expire()
        assert it.is_empty


@in_virtual_time
async def test_a_machine_that_slept_expires_even_what_it_owed() -> None:
    async with bench() as it:
        await it.open()
        it.stage.worker.is_held = True
        it.take()
        await asyncio.sleep(2 * LEASE_TTL_S)
        it.stage.server.expire()
        it.stage.worker.release()
        assert it.is_empty


@in_virtual_time
async def test_a_lost_head_ends_its_sessions_and_nobody_is_told() -> None:
    async with bench() as it:
        await it.open()
        it.head.links[STAGE].break_()
        await settled()
        assert it.is_empty


@pytest.mark.parametrize("place", ["previous", "next"])
@in_virtual_time
async def test_a_lost_neighbour_ends_the_session_and_the_head_is_told(place: str) -> None:
    async with bench() as it:
        await it.open(**{place: STRANGER})
        it.stage.links[STRANGER].break_()
        await asyncio.sleep(2 * LINK_S)
        assert [failure.code for failure in it.failures] == [ErrorCode.PEER_LOST]
        assert it.is_empty


@in_virtual_time
async def test_a_next_stage_that_cannot_be_reached_ends_the_session() -> None:
    async with bench() as it:
        await it.open(next=PEERS[4])
        it.take()
        await asyncio.sleep(2 * LINK_S)
        assert [failure.code for failure in it.failures] == [ErrorCode.PEER_LOST]
        assert it.is_empty


@in_virtual_time
async def test_the_cache_is_closed_behind_the_forward_that_runs_and_queued_ones_are_dropped() -> (
    None
):
    async with bench() as it:
        await it.open()
        it.stage.worker.is_held = True
        it.take()
        await settled()
        it.take(step=1, position=2)
        it.stage.server._close_asked(HEAD, CloseSession(session="s"), {})
        it.stage.worker.release()
        await settled()
        assert [call[0] for call in it.engine.calls] == ["open", "close"]
        assert it.returns == []


@in_virtual_time
async def test_closing_the_node_tells_every_head() -> None:
    async with bench() as it:
        await it.open(session="a")
        await it.open(session="b")
        it.stage.server.refuse_new()
        await it.stage.server.aclose()
        await asyncio.sleep(2 * LINK_S)
        assert {(failure.session, failure.code) for failure in it.failures} == {
            ("a", ErrorCode.SHUTTING_DOWN),
            ("b", ErrorCode.SHUTTING_DOWN),
        }
        assert it.is_empty


@in_virtual_time
async def test_removing_a_plan_ends_its_sessions_only() -> None:
    async with bench() as it:
        other = route_of(STAGE, epoch=4)
        it.stage.load(other)
        await it.open(session="a")
        await it.open(session="b", plan=other.digest, epoch=4)
        assert it.stage.server.sessions_of(ROUTE.digest) == 1
        it.stage.server.remove(ROUTE.digest)
        it.stage.server.remove(ROUTE.digest)
        await asyncio.sleep(2 * LINK_S)
        assert [(f.session, f.code) for f in it.failures] == [("a", ErrorCode.UNKNOWN_PLAN)]
        assert list(it.stage.server.stages) == [other.digest]
        assert it.stage.server.sessions_of(other.digest) == 1


def test_no_text_can_cross_with_an_error() -> None:
    assert set(SessionFailed.__struct_fields__) == {"session", "stage_idx", "code"}
