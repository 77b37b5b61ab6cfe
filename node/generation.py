"""From a request to text: tokenise, open a session along the active plan, prefill, decode.

What is computed, and in which chunks, equals `engine/generate.py` in one process, so the text
does too. Prompt, tokens, embedding and output head never leave this node.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from covey.transport.messages import StageTrace

from .catalog import LocalModel
from .engine.errors import EngineError
from .engine.generate import prefill_chunks
from .engine.tensors import HiddenStates
from .errors import Busy, NotReady, PromptTooLong, SessionFailed
from .head_batch import HeadBatches, NextToken, Sampled
from .model.errors import ModelError
from .model.sampling import SampledToken, Sampler, StopMatcher
from .observing import MAX_STEPS, SeenStep
from .pipeline import Pipelines, PipelineSession, StepResult
from .prefix import prefix_keys
from .prompt import chat_tokens, prompt_tokens
from .refining import Timings
from .route import Route
from .service import (
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    StageTiming,
    Started,
    StepTiming,
    TokenLogprob,
)
from .switch import code_of
from .worker import Done, Worker, WorkerClosed

T = TypeVar("T")

#: Finds the model and the plan of a request, or raises UnknownModel or NotReady.
FindRoute = Callable[[str], tuple[LocalModel, Route]]
#: Is told of the decode steps of each session, and how many tokens its prompt had.
Observe = Callable[[LocalModel, Route, int, Sequence[SeenStep]], None]
#: Keeps the links to these peers watched closely for as long as the context lasts.
Hold = Callable[[Sequence[str]], AbstractContextManager[None]]


@dataclass(slots=True)
class _Totals:
    """What a generation adds up; becomes its `Finished` event."""

    n_stages: int
    compute_us: list[int] = field(init=False)
    queue_us: list[int] = field(init=False)
    received_bytes: list[int] = field(init=False)
    returned_bytes: int = 0

    def __post_init__(self) -> None:
        self.compute_us = [0] * self.n_stages
        self.queue_us = [0] * self.n_stages
        self.received_bytes = [0] * self.n_stages

    def add(self, result: StepResult) -> None:
        self.returned_bytes += result.returned_bytes
        for idx, trace in enumerate(result.trace):
            self.compute_us[idx] += trace.compute_us
            self.queue_us[idx] += trace.queue_us
            self.received_bytes[idx] += trace.received_bytes


class Generator:
    """Runs the generations of this node as their head."""

    def __init__(
        self,
        *,
        find_route: FindRoute,
        hold: Hold,
        pipelines: Pipelines,
        worker: Worker,
        context_tokens: int,
        max_sessions: int,
        observe: Observe = lambda *_: None,
        timings: Timings | None = None,
    ) -> None:
        self.observe = observe
        self.find_route = find_route
        self.hold = hold
        self.pipelines = pipelines
        self.worker = worker
        self.head_batches = HeadBatches(worker, deque(maxlen=0) if timings is None else timings)
        self.prefix_secret = secrets.token_bytes(32)
        self._context_tokens = context_tokens
        self._max_sessions = max_sessions
        self._is_refusing = False
        self.n_active = 0
        self.n_tokens = 0  # generated since the start
        self.tok_per_s: float | None = None  # of the last generation that ended well

    def refuse_new(self) -> None:
        """Begin no more generations: the node is stopping."""
        self._is_refusing = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `Service.generate`."""
        began_at, loop = time.perf_counter(), asyncio.get_running_loop()
        deadline_at = None if request.deadline_s is None else loop.time() + request.deadline_s
        model, _ = self.find_route(request.model)
        if self._is_refusing:
            raise NotReady(request.model, "this node is stopping")
        if self.n_active >= self._max_sessions:
            raise Busy(f"this node runs {self.n_active} generations, its limit")
        self.n_active += 1
        try:
            async with _deadline(deadline_at):
                prompt = await asyncio.to_thread(_tokens_of, request, model)
            limit = min(self._context_tokens, model.checkpoint.config.context_length)
            if len(prompt) >= limit:
                raise PromptTooLong(len(prompt), limit)
            max_tokens = min(request.params.max_tokens, limit - len(prompt))
            run = _Run(self, request, model, prompt, max_tokens, began_at, deadline_at)
            async with aclosing(run.events()) as events:
                async for event in events:
                    yield event
        finally:
            self.n_active -= 1


class _Run:
    """One generation from its first frame to its last."""

    def __init__(
        self,
        owner: Generator,
        request: GenerationRequest,
        model: LocalModel,
        prompt: list[int],
        max_tokens: int,
        began_at: float,
        deadline_at: float | None,
    ) -> None:
        self._owner = owner
        self._called = request.model
        self._params = request.params
        self._deadline_at = deadline_at
        self._model = model
        self._n_prompt = len(prompt)
        self._tokens = prompt  # the journal: all that a replay needs
        self._max_tokens = max_tokens
        self._began_at = began_at
        self._n_held = 0
        self._seen: deque[SeenStep] = deque(maxlen=MAX_STEPS)

    async def events(self) -> AsyncGenerator[Event, None]:
        model = self._model
        head = (await self._on_worker(lambda: model.head)).value
        self._sampler = Sampler(self._params, head.vocab_size)
        # Only now: of several pipelines, others may have taken the one that was free before.
        _, self._route = self._owner.find_route(self._called)
        self._totals = _Totals(self._route.n_stages)
        session = await self._open()
        self._n_held = session.n_held
        try:
            yield Started(
                session=session.name, prompt_tokens=self._n_prompt, stages=self._route.spans
            )
            with self._owner.hold(self._route.peers):
                async with aclosing(self._decode(session)) as events:
                    async for event in events:
                        yield event
        finally:
            self._owner.pipelines.close(session)
            self._owner.head_batches.forget(session.name)
            self._owner.observe(self._model, self._route, self._n_prompt, self._seen)

    async def _open(self) -> PipelineSession:
        try:
            return await self._within(
                self._owner.pipelines.open(
                    secrets.token_hex(16),
                    self._route,
                    hidden_size=self._model.checkpoint.config.hidden_size,
                    # The last token is never fed back, so its position needs no room.
                    n_tokens=self._n_prompt + self._max_tokens - 1,
                    prefix=prefix_keys(
                        self._tokens,
                        model_digest=self._model.digest,
                        secret=self._owner.prefix_secret,
                    ),
                )
            )
        except NotReady as error:  # a pipeline knows the model's digest only
            raise NotReady(self._model.name, error.reason) from error

    async def _decode(self, session: PipelineSession) -> AsyncGenerator[Event, None]:
        stream, matcher = self._model.tokenizer.stream(), StopMatcher(self._params.stop)
        result = await self._prefill(session)
        first_at = last_at = time.perf_counter()
        reason: FinishReason = "length"
        n_generated, stopped = 0, False
        while True:
            is_last = n_generated + 1 == self._max_tokens
            sampled, fed_back, head_s = await self._sample(session, result.hidden, is_last=is_last)
            began_at, last_at = last_at, time.perf_counter()
            if sampled.id in self._model.tokenizer.eos_ids:
                reason = "stop"
                break
            self._tokens.append(sampled.id)
            n_generated += 1
            self._owner.n_tokens += 1
            timing = None
            if n_generated == 1:
                first_at = last_at
            else:
                timing = _step_timing(last_at - began_at, result.trace, head_s)
            # The stages work on the next token while this one is decoded, sent and read.
            ahead = None if fed_back is None else await self._send_ahead(session, fed_back)
            await asyncio.sleep(0)  # a first stage of our own begins before that
            text, stopped = matcher.push(stream.push(sampled.id))
            logprob = self._logprob(sampled)
            yield Delta(text=text, token_id=sampled.id, logprob=logprob, timing=timing)
            if stopped:
                reason = "stop"
            if stopped or ahead is None:
                break
            result = await self._within(session.wait(ahead))
            self._totals.add(result)
            if self._owner.n_active == 1:  # or what it took would be partly other sessions'
                self._seen.append(SeenStep(result.took_s, result.trace))
        tail = ""
        if not stopped:
            tail, stopped = matcher.push(stream.flush())
            tail += "" if stopped else matcher.flush()
            reason = "stop" if stopped else reason
        if n_generated > 1:
            self._owner.tok_per_s = (n_generated - 1) / (last_at - first_at)
        yield self._finished(reason, tail, n_generated, first_at, last_at)

    async def _send_ahead(
        self, session: PipelineSession, hidden: HiddenStates
    ) -> asyncio.Future[StepResult]:
        """Send the newest token; a failure is for whoever waits, the token before it is good."""
        position = len(self._tokens) - 1
        try:
            return await self._within(session.send(hidden, position=position, n_return=1))
        except SessionFailed as error:
            failed: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            failed.exception()  # seen: a stop text may end the generation before anybody waits
            return failed

    async def _prefill(self, session: PipelineSession) -> StepResult:
        """Send the prompt in chunks, a few in flight so that no stage waits; returns the last."""
        head = self._model.head
        in_flight: deque[asyncio.Future[StepResult]] = deque()
        prompt, n_held = self._tokens, session.n_held
        for begin, end in prefill_chunks(len(prompt), start=n_held):
            if len(in_flight) > self._route.n_stages:
                self._totals.add(await self._within(session.wait(in_flight.popleft())))
            chunk = prompt[begin:end]
            hidden = (await self._on_worker(partial(head.embed, chunk))).value
            n_return = 1 if end == len(prompt) else 0
            in_flight.append(
                await self._within(session.send(hidden, position=begin, n_return=n_return))
            )
        while True:
            result = await self._within(session.wait(in_flight.popleft()))
            self._totals.add(result)
            if not in_flight:
                return result

    async def _sample(
        self, session: PipelineSession, hidden: HiddenStates | None, *, is_last: bool
    ) -> tuple[SampledToken, HiddenStates | None, float]:
        """The next token, its embedding unless it is the last, and the seconds it took."""
        if hidden is None:
            raise SessionFailed("wrong_tensor", "the last stage returned no hidden states")
        wish = NextToken(hidden[-1:], self._sampler, self._tokens, is_last)
        done: Done[Sampled] = await self._outcome(
            self._owner.head_batches.submit(self._model, self._route.n_stages, session.name, wish)
        )
        return (*done.value, done.compute_s)

    async def _on_worker(self, job: Callable[[], T]) -> Done[T]:
        return await self._outcome(self._owner.worker.run(job))

    async def _outcome(self, work: Awaitable[T]) -> T:
        try:
            return await self._within(work)
        except (EngineError, ModelError, WorkerClosed) as error:
            raise SessionFailed(code_of(error).value, str(error)) from error

    async def _within(self, work: Awaitable[T]) -> T:
        """Wait for `work` until the request's deadline; raises SessionFailed past it."""
        if self._deadline_at is None:  # the common case, twice for every token
            return await work
        async with _deadline(self._deadline_at):
            return await work

    def _logprob(self, sampled: SampledToken) -> TokenLogprob | None:
        if not self._params.logprobs:
            return None
        top = tuple(self._one_logprob(token, logprob) for token, logprob in sampled.top)
        return self._one_logprob(sampled.id, sampled.logprob, top)

    def _one_logprob(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        data = self._model.tokenizer.piece(token)
        text = data.decode(errors="replace") or self._model.tokenizer.token_text(token)
        return TokenLogprob(token_id=token, text=text, data=data, logprob=logprob, top=top)

    def _finished(
        self, reason: FinishReason, text: str, n_generated: int, first_at: float, last_at: float
    ) -> Finished:
        totals = self._totals
        stages = tuple(
            StageTiming(
                peer_id=peer_id,
                span=span,
                compute_s=totals.compute_us[idx] / 1e6,
                queue_s=totals.queue_us[idx] / 1e6,
                received_bytes=totals.received_bytes[idx],
            )
            for idx, (peer_id, span) in enumerate(
                zip(self._route.peers, self._route.spans, strict=True)
            )
        )
        return Finished(
            reason=reason,
            text=text,
            prompt_tokens=self._n_prompt,
            completion_tokens=n_generated,
            cached_tokens=self._n_held,
            ttft_s=first_at - self._began_at,
            decode_s=last_at - first_at,
            stages=stages,
            returned_bytes=totals.returned_bytes,
        )


@asynccontextmanager
async def _deadline(at: float | None) -> AsyncGenerator[None, None]:
    """Cancel the body at loop time `at`; raises SessionFailed then. Never around a `yield`."""
    try:
        async with asyncio.timeout_at(at):
            yield
    except TimeoutError as error:
        raise SessionFailed("deadline_exceeded", "the request's deadline passed") from error


def _tokens_of(request: GenerationRequest, model: LocalModel) -> list[int]:
    """For a thread: the first use builds the tokenizer, and a long conversation takes its time."""
    if request.messages is not None:
        return chat_tokens(model.tokenizer, request.messages, request.template_kwargs)
    prompt = request.prompt_ids if request.prompt_ids is not None else request.prompt or ""
    return prompt_tokens(model.tokenizer, prompt)


def _step_timing(total_s: float, trace: Sequence[StageTrace], head_s: float) -> StepTiming:
    stages_s = sum(stage.compute_us for stage in trace) / 1e6
    return StepTiming(total_s=total_s, stages_s=stages_s, head_s=head_s)
