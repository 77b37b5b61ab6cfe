"""The stages that this node serves: sessions in, hidden states through, results pushed on.

One task per session takes its frames in order, runs them on the worker and pushes the result to
the next peer of the pipeline; it never goes back through the head in between. A frame that
contradicts the session's plan ends its link, because a peer that sends one is broken or lying.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from covey.errors import CoveyError
from covey.transport.errors import ErrorCode, RefusedByPeer, TransportError
from covey.transport.frame import Tensor
from covey.transport.messages import (
    MAX_STAGES,
    CloseSession,
    Forward,
    OpenSession,
    SessionFailed,
    SessionOpened,
    StageTrace,
)
from covey.transport.tasks import Tasks

from .batching import Batcher
from .engine.errors import EngineError, LeaseExpired
from .engine.lease import LeaseTable
from .engine.stage import Stage, Step, StepResult
from .engine.tensors import HiddenStates
from .hidden import WrongTensor, pack, unpack
from .prefix import bound_to_head
from .refining import MAX_KEPT, Timing, Timings
from .route import Route
from .switch import Switch, WrongFrame, code_of
from .worker import Done, Worker

logger = logging.getLogger(__name__)

MAX_CHUNK_TOKENS = 1024  # rows of one Forward; heads send PREFILL_CHUNK, far below
MAX_QUEUED_FORWARDS = MAX_STAGES + 1  # per session; heads have one more in flight than stages
LEASE_TTL_S = 60.0  # how long the KV cache of a silent head is kept
MAX_SESSIONS = 256  # per node: a bound on tasks, memory is bounded by the leases


@dataclass(slots=True)
class LoadedStage:
    """One stage of one plan, in memory, with its KV-cache budget."""

    route: Route
    stage_idx: int
    engine: Stage
    leases: LeaseTable
    batcher: Batcher[Step, HiddenStates]
    n_forwards: int = 0
    received_bytes: int = 0
    compute_s: float = 0.0

    @property
    def spokes(self) -> Sequence[str]:
        """The other members of its group, if it is one."""
        stage = self.route.stages[self.stage_idx]
        return [peer_id for peer_id in stage.peers if peer_id != stage.hub]

    @property
    def taken_bytes(self) -> int:
        """Memory that the weights take, and the KV cache that is leased now."""
        return self.engine.weight_bytes + self.leases.capacity_bytes - self.leases.free_bytes


@dataclass(slots=True, eq=False)
class _Session:
    request: OpenSession
    head: str
    stage: LoadedStage
    forwards: asyncio.Queue[tuple[Forward, HiddenStates, int]]
    position: int = 0  # of the next row, counting what is queued
    step: int = -1  # the last one taken
    n_owed: int = 0  # forwards taken and not yet pushed on
    task: asyncio.Task[None] | None = field(default=None)  # none while it is being opened
    ended_by: ErrorCode | None = None
    holds: ExitStack = field(default_factory=ExitStack)


class StageServer:
    """Every stage and session of this node.

    Args:
        switch: that brings frames and takes results.
        worker: that computes.
        clock: monotonic seconds.
        hold: keeps the links to peers watched closely for as long as its context lasts.
    """

    def __init__(
        self,
        switch: Switch,
        worker: Worker,
        clock: Callable[[], float],
        hold: Callable[[Sequence[str]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._switch = switch
        self._worker = worker
        self._clock = clock
        self._hold = hold
        self._stages: dict[str, LoadedStage] = {}  # by plan digest
        self._sessions: dict[str, _Session] = {}
        self.timings: Timings = deque(maxlen=MAX_KEPT)  # for who wants to know
        self._is_refusing = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._tasks = Tasks()
        switch.on_request(OpenSession, self._open)
        switch.on_message(Forward, self.take_forward)
        switch.on_message(CloseSession, self._close_asked)

    @property
    def stages(self) -> Mapping[str, LoadedStage]:
        """What is loaded, by plan digest."""
        return self._stages

    @property
    def n_sessions(self) -> int:
        """Sessions that hold a lease here now."""
        return len(self._sessions)

    def add(self, route: Route, stage_idx: int, engine: Stage, leases: LeaseTable) -> LoadedStage:
        """Serve a stage of a plan from now on."""
        batcher: Batcher[Step, HiddenStates] = Batcher(
            self._worker, lambda steps: self._forward(stage, steps), n_groups=route.n_stages
        )
        stage = LoadedStage(route, stage_idx, engine, leases, batcher)
        self._stages[route.digest] = stage
        return stage

    def _forward(self, stage: LoadedStage, steps: Sequence[Step]) -> list[StepResult]:
        """On the worker's thread."""
        members = stage.route.stages[stage.stage_idx].members
        began_at = time.perf_counter()
        results = stage.engine.forward_batch(steps)
        is_whole = len(members) == 1 and not members[0].streamed_blocks
        if is_whole and not any(isinstance(result, EngineError) for result in results):
            start, end = stage.route.spans[stage.stage_idx]
            self.timings.append(
                Timing(
                    model_digest=stage.route.plan.model_digest,
                    n_blocks=end - start,
                    rows=tuple(len(step.hidden) for step in steps),
                    positions=tuple(step.position for step in steps),
                    seconds=time.perf_counter() - began_at,
                )
            )
        return results

    def sessions_of(self, plan: str) -> int:
        """How many sessions still use a plan; an old plan is unloaded when none does."""
        return sum(session.stage.route.digest == plan for session in self._sessions.values())

    def remove(self, plan: str, code: ErrorCode = ErrorCode.UNKNOWN_PLAN) -> None:
        """Unload a stage; its sessions, if any, end with `code`."""
        if self._stages.pop(plan, None) is None:
            return
        for session in list(self._sessions.values()):
            if session.stage.route.digest == plan:
                self._end(session, code)

    def peer_lost(self, peer_id: str) -> None:
        """End the sessions that cannot go on without a peer."""
        for session in list(self._sessions.values()):
            if session.head == peer_id:
                self._end(session, None)
            elif peer_id in (session.request.previous, session.request.next):
                self._end(session, ErrorCode.PEER_LOST)

    def expire(self) -> None:
        """End the sessions whose head has been silent for longer than it promised."""
        now = self._clock()
        for session in self._sessions.values():
            if session.n_owed:  # it is not the head who lets us wait
                with suppress(LeaseExpired):
                    session.stage.leases.renew(session.request.session, now=now)
        for stage in self._stages.values():
            for lease in stage.leases.expire(now=now):
                self._end(self._sessions[lease.session], ErrorCode.DEADLINE_EXCEEDED)

    def refuse_new(self) -> None:
        """Take no new sessions: the node is stopping."""
        self._is_refusing = True

    async def drained(self) -> None:
        """Until no session is left; the caller sets a deadline."""
        await self._is_idle.wait()

    async def aclose(self) -> None:
        """End every session, telling its head."""
        for session in list(self._sessions.values()):
            self._end(session, ErrorCode.SHUTTING_DOWN)
        await self._tasks.join(timeout_s=2.0)
        await self._tasks.aclose()

    def _open(self, head: str, request: OpenSession) -> Coroutine[Any, Any, SessionOpened]:
        """Admit a session here and now, so that a CloseSession right behind it finds it."""
        stage, name, n_tokens = self._admit(request), request.session, request.n_tokens
        keys = bound_to_head(request.prefix, head)
        stage.leases.grant(name, n_tokens=n_tokens, now=self._clock())
        session = _Session(request, head, stage, asyncio.Queue(MAX_QUEUED_FORWARDS))
        self._sessions[name] = session
        self._is_idle.clear()
        session.holds.enter_context(self._hold(stage.spokes))  # a silent one is noticed soon
        opened = self._worker.run(lambda: stage.engine.open_session(name, n_tokens, keys))
        return self._opened(session, opened)

    async def _opened(self, session: _Session, opened: Awaitable[Done[int]]) -> SessionOpened:
        name = session.request.session
        try:
            session.position = (await opened).value
        except BaseException:
            self._end(session, None)
            raise
        if self._sessions.get(name) is not session:
            raise RefusedByPeer(session.ended_by or ErrorCode.UNKNOWN_SESSION)
        session.task = self._tasks.spawn(self._run(session), f"session {name}")
        return SessionOpened(session=name, n_held=session.position)

    def _admit(self, request: OpenSession) -> LoadedStage:
        if self._is_refusing:
            raise RefusedByPeer(ErrorCode.SHUTTING_DOWN)
        stage = self._stages.get(request.plan)
        if stage is None:
            raise RefusedByPeer(ErrorCode.UNKNOWN_PLAN)
        if stage.route.epoch != request.epoch or stage.stage_idx != request.stage_idx:
            raise RefusedByPeer(ErrorCode.WRONG_EPOCH)
        if request.session in self._sessions or len(self._sessions) >= MAX_SESSIONS:
            raise RefusedByPeer(ErrorCode.TOO_MANY_SESSIONS)
        return stage

    def take_forward(self, sender: str, message: Forward, tensors: Mapping[str, Tensor]) -> None:
        """Queue the hidden states of one step.

        A frame may begin before the session's end, to replay what was lost further on: the rows
        behind its position are then forgotten. But each has a new step, and none leaves a gap.

        Raises:
            WrongFrame, WrongTensor: the frame contradicts the session; nothing of it is used.
        """
        session = self._sessions.get(message.session)
        if session is None:
            # Ordinary when a session was cancelled while frames were on their way.
            return
        request, stage = session.request, session.stage
        if message.stage_idx == stage.route.n_stages and session.head == self._switch.own_peer_id:
            return  # the same at the head, whose own stage has yet to hear of the end
        if sender != request.previous:
            raise WrongFrame(ErrorCode.NOT_A_MEMBER, "a frame from outside the session's pipeline")
        if message.epoch != request.epoch or message.stage_idx != request.stage_idx:
            raise WrongFrame(ErrorCode.WRONG_EPOCH, "a frame of another epoch or stage")
        if len(message.trace) != request.stage_idx:
            raise WrongFrame(ErrorCode.MALFORMED_FRAME, "a frame with a trace of other stages")
        border = stage.route.codecs[request.stage_idx]
        tensor = tensors.get("hidden")
        hidden = unpack(
            tensor,
            stage.route.dtype,
            border,
            hidden_size=stage.engine.hidden_size,
            max_tokens=MAX_CHUNK_TOKENS,
        )
        n_tokens = len(hidden)
        if message.codec != border or message.n_return > n_tokens:
            raise WrongTensor("a frame with another codec than the plan's, or too much to return")
        if message.step <= session.step or message.position > session.position:
            raise WrongFrame(ErrorCode.WRONG_POSITION, "a frame repeated, or beyond the session")
        if message.position + n_tokens > request.n_tokens or session.forwards.full():
            raise WrongFrame(ErrorCode.CACHE_FULL, "a frame beyond the session's lease")
        session.step, session.position = message.step, message.position + n_tokens
        session.n_owed += 1
        nbytes = len(tensor.data) if tensor is not None else 0
        session.forwards.put_nowait((message, hidden, nbytes))

    def _close_asked(self, sender: str, message: CloseSession, _: Mapping[str, Tensor]) -> None:
        session = self._sessions.get(message.session)
        if session is not None and session.head == sender:
            self._end(session, None)

    async def _run(self, session: _Session) -> None:
        name, leases = session.request.session, session.stage.leases
        code = ErrorCode.INTERNAL  # of a bug, which `Tasks` logs
        try:
            while True:
                message, hidden, nbytes = await session.forwards.get()
                leases.renew(name, now=self._clock())
                await self._step(session, message, hidden, nbytes)
                session.n_owed -= 1
                leases.renew(name, now=self._clock())
        except CoveyError as error:
            logger.warning("session failed: %s", error, extra={"session": name})
            code = code_of(error)
        finally:
            self._end(session, code)

    async def _step(
        self, session: _Session, message: Forward, hidden: HiddenStates, nbytes: int
    ) -> None:
        stage, request = session.stage, session.request
        route = stage.route
        done = await stage.batcher.submit(
            request.session,
            Step(request.session, message.position, hidden),
            # A group's step waits for other machines, and the event loop must not.
            is_short=len(hidden) == 1 and not route.stages[request.stage_idx].is_group,
        )
        is_last = request.stage_idx == route.n_stages - 1
        result = done.value
        if is_last:
            result = result[len(result) - message.n_return :]
        tensors: dict[str, Tensor] = {}
        if len(result):
            tensors["hidden"] = pack(result, route.dtype, route.codecs[request.stage_idx + 1])
        trace = StageTrace(int(done.compute_s * 1e6), int(done.queue_s * 1e6), nbytes)
        stage.n_forwards += 1
        stage.received_bytes += nbytes
        stage.compute_s += done.compute_s
        onward = Forward(
            session=message.session,
            epoch=message.epoch,
            stage_idx=request.stage_idx + 1,
            step=message.step,
            position=message.position,
            n_return=message.n_return,
            codec=route.codecs[request.stage_idx + 1],
            trace=[*message.trace, trace],
        )
        await self._switch.send(request.next, onward, tensors)

    def _end(self, session: _Session, code: ErrorCode | None) -> None:
        """Forget a session and free its lease; with a code, its head is told."""
        name, engine = session.request.session, session.stage.engine
        if self._sessions.get(name) is not session:
            return
        del self._sessions[name]
        session.ended_by = code
        if not self._sessions:
            self._is_idle.set()
        session.holds.close()
        session.stage.leases.release(name)
        session.stage.batcher.forget(name)
        if session.task is not None and session.task is not asyncio.current_task():
            session.task.cancel()
        # Queued at once: behind the forward that runs, before whatever is opened from now on, so
        # that the memory is free by then and a new session of this name keeps its own.
        self._worker.run(lambda: engine.close_session(name))
        if code is not None:
            self._tasks.spawn(self._tell_head(session, code), "end of session")

    async def _tell_head(self, session: _Session, code: ErrorCode) -> None:
        name = session.request.session
        failed = SessionFailed(session=name, stage_idx=session.request.stage_idx, code=code)
        try:
            await self._switch.send(session.head, failed)
        except TransportError:
            logger.debug("the head left before its session failed", extra={"session": name})
