"""The head's end of a session: opens it on every stage, sends hidden states, gets them back.

A `PipelineSession` knows no tokens: hidden states in, hidden states out. Whatever ends it (a
stage that fails, a peer that is lost, a deadline) fails the step that waits, at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from covey.errors import CoveyError
from covey.transport.errors import ErrorCode, LinkTimeout, RefusedByPeer, TransportError
from covey.transport.frame import Tensor
from covey.transport.messages import (
    CloseSession,
    Forward,
    OpenSession,
    SessionFailed,
    SessionOpened,
    StageTrace,
)
from covey.transport.tasks import Tasks

from .engine.stage import PAGE_TOKENS
from .engine.tensors import HiddenStates
from .errors import Busy, NotReady
from .errors import SessionFailed as Failed
from .hidden import WrongTensor, is_finite, pack, unpack
from .route import Route
from .switch import Switch, UnexpectedMessage, WrongFrame, code_of

OPEN_TIMEOUT_S = 10.0  # a stage only allocates KV cache; includes dialling it
STEP_TIMEOUT_S = 120.0  # one prefill chunk on the slowest machine we know takes seconds

#: Codes with which a stage says "not now" rather than "never".
_BUSY = frozenset({ErrorCode.CACHE_FULL, ErrorCode.TOO_MANY_SESSIONS})


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came back of one step."""

    hidden: HiddenStates | None  # [n_return, hidden_size]
    trace: Sequence[StageTrace]
    returned_bytes: int
    took_s: float  # from sending it to having it back, by the head's clock


@dataclass(slots=True)
class _Waiting:
    position: int
    n_return: int
    future: asyncio.Future[StepResult]
    sent_at: float


class PipelineSession:
    """One session along a plan's stages; made by `Pipelines.open`."""

    def __init__(
        self,
        name: str,
        route: Route,
        hidden_size: int,
        switch: Switch,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.route = route
        self.n_held = 0  # leading positions that every stage holds already
        self._hidden_size = hidden_size
        self._switch = switch
        self._clock = clock
        self._next_step = 0
        self._waiting: dict[int, _Waiting] = {}
        self._failure: Failed | None = None

    async def send(
        self, hidden: HiddenStates, *, position: int, n_return: int
    ) -> asyncio.Future[StepResult]:
        """Send the rows [n_tokens, hidden_size] that begin at `position` to the first stage.

        Returns:
            A future of the last `n_return` rows; it fails with `Failed` if the session does.

        Raises:
            Failed: the session is over, or the first stage cannot be reached.
        """
        if self._failure is not None:
            raise self._failure
        route = self.route
        step, self._next_step = self._next_step, self._next_step + 1
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._waiting[step] = _Waiting(position, n_return, future, self._clock())
        message = Forward(
            session=self.name,
            epoch=route.epoch,
            stage_idx=0,
            step=step,
            position=position,
            n_return=n_return,
            codec=route.codecs[0],
        )
        try:
            tensor = pack(hidden, route.dtype, route.codecs[0])
            await self._switch.send(route.peers[0], message, {"hidden": tensor})
        except CoveyError as error:
            text = f"hidden states cannot be sent to stage 0 on {route.peers[0][-8:]}: {error}"
            raise self.fail(code_of(error), text) from error
        return future

    async def wait(self, future: asyncio.Future[StepResult]) -> StepResult:
        """Wait for a step under the step's deadline; raises Failed."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            text = f"no answer within {STEP_TIMEOUT_S:g} s"
            raise self.fail(ErrorCode.DEADLINE_EXCEEDED, text) from error

    def returned(self, sender: str, message: Forward, tensors: Mapping[str, Tensor]) -> None:
        """Take what the last stage pushed back.

        Raises:
            WrongFrame, WrongTensor: the stage is broken; nothing of it is used.
        """
        if self._failure is not None:
            return  # what was on its way when the session ended
        if sender != self.route.peers[-1]:
            raise WrongFrame(ErrorCode.NOT_A_MEMBER, "hidden states from outside the pipeline")
        if message.epoch != self.route.epoch:
            raise WrongFrame(ErrorCode.WRONG_EPOCH, "hidden states of another epoch")
        if len(message.trace) != self.route.n_stages:
            raise WrongFrame(ErrorCode.MALFORMED_FRAME, "hidden states with a trace too short")
        waiting = self._waiting.get(message.step)
        if waiting is None or message.position != waiting.position:
            raise WrongFrame(ErrorCode.WRONG_POSITION, "hidden states that nobody waits for")
        tensor = tensors.get("hidden")
        hidden = self._hidden_of(tensor, message, waiting.n_return)
        del self._waiting[message.step]
        if not waiting.future.done():
            nbytes = len(tensor.data) if tensor is not None else 0
            took_s = self._clock() - waiting.sent_at
            waiting.future.set_result(StepResult(hidden, message.trace, nbytes, took_s))

    def _hidden_of(
        self, tensor: Tensor | None, message: Forward, n_return: int
    ) -> HiddenStates | None:
        codec, dtype = self.route.codecs[-1], self.route.dtype
        if message.codec != codec or message.n_return != n_return:
            raise WrongTensor("hidden states of another codec or number than was asked for")
        if not n_return:
            if tensor is not None:
                raise WrongTensor("hidden states that nobody asked for")
            return None
        hidden = unpack(
            tensor, dtype, codec, hidden_size=self._hidden_size, max_tokens=message.n_return
        )
        if len(hidden) != n_return:
            raise WrongTensor("fewer hidden states than were asked for")
        if not is_finite(hidden, dtype):
            raise WrongTensor("hidden states with NaN or infinity")
        return hidden

    def fail(self, code: ErrorCode, detail: str) -> Failed:
        """End the session for everyone who waits in it; returns why it ended first."""
        if self._failure is None:
            self._failure = Failed(code.value, detail)
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(self._failure)
                waiting.future.exception()  # seen: of several in flight only one is waited for
        self._waiting.clear()
        return self._failure


class Pipelines:
    """The sessions that this node is the head of."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch
        self._sessions: dict[str, PipelineSession] = {}
        self._tasks = Tasks()
        switch.on_message(SessionFailed, self._stage_failed)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[PipelineSession]:
        return iter(list(self._sessions.values()))

    def pick(self, routes: Sequence[Route], linked: Collection[str]) -> Route:
        """Of the pipelines of a plan, the one for the next session.

        First one whose hubs we have links to, ourselves included; then the one that is soonest
        through with a token of each of our sessions, this one included; then one that begins here,
        so that no border is in front of it.
        """

        def how_taken(route: Route) -> tuple[int, float, bool, int]:
            n_sessions = sum(
                (session.route.digest, session.route.pipeline_idx)
                == (route.digest, route.pipeline_idx)
                for session in self
            )
            return (
                len(set(route.peers).difference(linked)),
                (n_sessions + 1) * route.token_s,
                route.peers[0] != self._switch.own_peer_id,
                route.pipeline_idx,
            )

        return min(routes, key=how_taken)

    async def open(
        self,
        name: str,
        route: Route,
        *,
        hidden_size: int,
        n_tokens: int,
        prefix: Sequence[bytes] = (),
    ) -> PipelineSession:
        """Open a session on every stage at once; all or none of them keeps a lease.

        Args:
            name: of the session.
            route: whose stages it runs on.
            hidden_size: columns of the hidden states.
            n_tokens: positions to lease.
            prefix: see `node/prefix.py`.

        Raises:
            Busy: a stage has no room now.
            NotReady: a stage cannot be reached or no longer serves the plan.
        """
        if name in self._sessions:
            raise ValueError(f"a session {name!r} is open already")
        session = PipelineSession(name, route, hidden_size, self._switch)
        self._sessions[name] = session
        try:
            await self._open_stages(session, n_tokens, list(prefix))
        except BaseException:  # a cancelled one too leaves no lease behind
            self.close(session)
            raise
        return session

    def close(self, session: PipelineSession) -> None:
        """Forget a session and free its leases, without waiting for the stages."""
        if self._sessions.get(session.name) is not session:
            return
        del self._sessions[session.name]
        session.fail(ErrorCode.UNKNOWN_SESSION, "the session was closed")
        for peer in session.route.peers:
            self._tasks.spawn(self._close_stage(session.name, peer), "close session")

    def take_return(self, sender: str, message: Forward, tensors: Mapping[str, Tensor]) -> bool:
        """Hand a frame that came back to its session; False if it is not for a head here."""
        session = self._sessions.get(message.session)
        if session is None or message.stage_idx != session.route.n_stages:
            return False
        session.returned(sender, message, tensors)
        return True

    def peer_lost(self, peer_id: str) -> None:
        """Fail the sessions that run over a peer."""
        for session in self:
            if peer_id in session.route.peers:
                idx = session.route.peers.index(peer_id)
                session.fail(
                    ErrorCode.PEER_LOST, f"the peer of stage {idx}, {peer_id[-8:]}, was lost"
                )

    async def aclose(self) -> None:
        """Close every session and give the stages a moment to hear of it."""
        for session in self:
            session.fail(ErrorCode.SHUTTING_DOWN, "this node is stopping")
            self.close(session)
        await self._tasks.join(timeout_s=1.0)
        await self._tasks.aclose()

    async def _open_stages(
        self, session: PipelineSession, n_tokens: int, prefix: list[bytes]
    ) -> None:
        results = await asyncio.gather(
            *(
                self._open_stage(session, idx, n_tokens, prefix)
                for idx in range(session.route.n_stages)
            ),
            return_exceptions=True,
        )
        errors = [result for result in results if isinstance(result, BaseException)]
        if not errors:
            session.n_held = min(held for held in results if isinstance(held, int))
            return
        for error in errors:
            if not isinstance(error, TransportError):
                raise error
        if all(isinstance(e, RefusedByPeer) and e.code in _BUSY for e in errors):
            raise Busy("a stage has no room for another session") from errors[0]
        model = session.route.plan.model_digest[:8]
        raise NotReady(model, f"a stage did not open the session: {errors[0]}") from errors[0]

    async def _open_stage(
        self, session: PipelineSession, idx: int, n_tokens: int, prefix: list[bytes]
    ) -> int:
        peers = session.route.peers
        own = self._switch.own_peer_id
        request = OpenSession(
            session=session.name,
            plan=session.route.digest,
            epoch=session.route.epoch,
            stage_idx=idx,
            n_tokens=n_tokens,
            previous=peers[idx - 1] if idx else own,
            next=peers[idx + 1] if idx + 1 < len(peers) else own,
            prefix=prefix,
        )
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                answer = await self._switch.request(peers[idx], request, timeout_s=OPEN_TIMEOUT_S)
        except TimeoutError as error:
            raise LinkTimeout("open session", OPEN_TIMEOUT_S) from error
        if not isinstance(answer, SessionOpened) or answer.session != session.name:
            raise UnexpectedMessage(f"a stage answers with a {type(answer).__name__}")
        if answer.n_held > PAGE_TOKENS * len(prefix):
            raise UnexpectedMessage("a stage holds more of a prompt than it was told of")
        return answer.n_held

    async def _close_stage(self, name: str, peer: str) -> None:
        # A stage that cannot be told ends the session by its idle time-out.
        with contextlib.suppress(TransportError):
            await self._switch.send(peer, CloseSession(session=name))

    def _stage_failed(self, sender: str, message: SessionFailed, _: Mapping[str, Tensor]) -> None:
        session = self._sessions.get(message.session)
        if session is not None and sender in session.route.peers:
            idx = session.route.peers.index(sender)
            session.fail(message.code, f"stage {idx} on {sender[-8:]} gave the session up")
