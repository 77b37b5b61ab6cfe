"""Generations over one to three stages of a tiny real model: the same text, and nothing left over.

Nodes are joined by links in memory, time is virtual, and every moment at which a client may go
away or a machine may die is tried in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from covey.node.catalog import LocalModel
from covey.node.engine.errors import EngineError, InvalidHiddenStates
from covey.node.engine.generate import generate, generate_text
from covey.node.engine.tensors import EngineKind, HiddenStates
from covey.node.engine.torch_stage import load_stage
from covey.node.engines import Engines
from covey.node.errors import (
    Busy,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    SessionFailed,
)
from covey.node.generation import Generator
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.errors import InvalidParams
from covey.node.model.sampling import SamplingParams
from covey.node.route import Route
from covey.node.service import Delta, Event, Finished, GenerationRequest, Started
from covey.transport.errors import LinkBroken
from support.node_core import (
    LINK_S,
    PEERS,
    AddingStage,
    CoreNode,
    Net,
    in_virtual_time,
    route_of,
    settled,
)
from support.tiny_models import TINY, write_tiny_gguf

CUTS: dict[int, list[tuple[int, int]]] = {
    1: [(0, 4)],
    2: [(0, 1), (1, 4)],
    3: [(0, 1), (1, 3), (3, 4)],
}
PROMPT = "the cat and the other cat"
LONG = list(range(5, 200)) + list(range(20, 150))  # 325 tokens: three chunks
EOS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("tiny")
    with open_checkpoint(write_tiny_gguf(folder / "tiny.gguf"), cache_dir=folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> LocalModel:
    return LocalModel("tiny", checkpoint, Engines("fp32", 1))


@dataclass
class Bench:
    """A head and the stages of its plan; the first stage may be the head's own."""

    nodes: list[CoreNode]
    model: LocalModel
    route: Route
    held: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.head = self.nodes[0]
        for node in self.nodes:
            if node.peer_id in self.route.peers:
                span = self.route.spans[self.route.peers.index(node.peer_id)]
                engine = load_stage(self.model.checkpoint, span, self.route.dtype)
                node.load(self.route, engine=engine, capacity_tokens=2000)
        self.generator = self.make_generator()

    def make_generator(self, **changes: Any) -> Generator:
        return Generator(
            **{
                "find_route": lambda _: (self.model, self.route),
                "hold": self._hold,
                "pipelines": self.head.pipelines,
                "worker": self.head.worker,
                "context_tokens": 512,
                "max_sessions": 2,
                **changes,
            }
        )

    def _hold(self, peers: Sequence[str]) -> AbstractContextManager[None]:
        self.held.append(tuple(peers))
        for peer_id in peers:
            if peer_id in self.head.peers:
                self.head.peers[peer_id].hold()
        return nullcontext()

    async def run(self, request: GenerationRequest) -> list[Event]:
        async with aclosing(self.generator.generate(request)) as events:
            return [event async for event in events]

    def assert_empty(self) -> None:
        assert self.generator.n_active == 0
        assert list(self.head.pipelines) == []
        for node in self.nodes:
            assert node.server.n_sessions == 0
            for stage in node.server.stages.values():
                assert stage.leases.free_bytes == stage.leases.capacity_bytes
                assert stage.engine._caches == {}  # type: ignore[attr-defined]


@asynccontextmanager
async def bench(
    model: LocalModel,
    n_stages: int,
    *,
    own_stage: bool = False,
    codec: str = "exact",
    engine: EngineKind = "fp32",
) -> AsyncIterator[Bench]:
    async with Net(n_stages + 1) as nodes:
        peers = PEERS[:n_stages] if own_stage else PEERS[1 : n_stages + 1]
        yield Bench(
            nodes, model, route_of(*peers, spans=CUTS[n_stages], codec=codec, engine=engine)
        )


def asked(prompt: str | Sequence[int] = PROMPT, **params: Any) -> GenerationRequest:
    plain = SamplingParams(**{"max_tokens": 12, **params})
    if isinstance(prompt, str):
        return GenerationRequest(model="tiny", params=plain, prompt=prompt)
    return GenerationRequest(model="tiny", params=plain, prompt_ids=tuple(prompt))


def ids_of(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Delta)]


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if not isinstance(event, Started))


REQUESTS = {
    "greedy": asked(),
    "one token": asked(max_tokens=1),
    "sampled": asked(temperature=1.0, top_k=40, top_p=0.95, seed=7, max_tokens=30),
    "penalties": asked(
        temperature=0.7,
        seed=3,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        max_tokens=30,
    ),
    "logit bias": asked(logit_bias={40: 100.0}, max_tokens=5),
    "end of text": asked(temperature=1.0, seed=12, logit_bias={EOS: 4.0}, max_tokens=60),
    "end at once": asked(logit_bias={EOS: 100.0}),
    "long prompt": asked(LONG),
    "a chunk to the token": asked(LONG[:256]),
    "one token of prompt": asked([7]),
    "to the end of the context": asked(LONG, max_tokens=1000),
    "logprobs": asked(logprobs=3, max_tokens=4),
}


@pytest.mark.parametrize("n_stages", [1, 2, 3])
@pytest.mark.parametrize("what", REQUESTS)
@in_virtual_time
async def test_tokens_equal_those_of_one_process(
    model: LocalModel, what: str, n_stages: int
) -> None:
    request = REQUESTS[what]
    prompt = request.prompt_ids or model.tokenizer.encode(request.prompt or "", add_special=True)
    # What the context has no room for is not asked of the reference either.
    fits = min(request.params.max_tokens, TINY.context_length - len(prompt))
    reference = generate(
        load_stage(model.checkpoint, (0, 4)),
        model.head,
        prompt,
        SamplingParams(**{**asdict(request.params), "max_tokens": fits}),
        eos_ids=model.tokenizer.eos_ids,
    )
    expected, reason = [], ""
    while not reason:
        try:
            expected.append(next(reference))
        except StopIteration as ended:
            reason = ended.value
    async with bench(model, n_stages, own_stage=n_stages > 1) as it:
        events = await it.run(request)
        started, *deltas, finished = events
        assert ids_of(events) == [token.id for token in expected]
        assert isinstance(started, Started)
        assert (started.prompt_tokens, started.stages) == (len(prompt), it.route.spans)
        assert isinstance(finished, Finished)
        assert (finished.reason, finished.completion_tokens) == (reason, len(expected))
        assert len(finished.stages) == n_stages
        assert all(stage.received_bytes > 0 for stage in finished.stages)
        assert text_of(events) == model.tokenizer.decode(token.id for token in expected)
        if request.params.logprobs:
            assert [
                (d.logprob.logprob, [(t.token_id, t.logprob) for t in d.logprob.top])
                for d in deltas
                if isinstance(d, Delta) and d.logprob is not None
            ] == [(token.logprob, list(token.top)) for token in expected]
        await asyncio.sleep(1)
        it.assert_empty()


def asdict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


def test_the_requests_end_in_the_ways_that_they_are_there_for(model: LocalModel) -> None:
    lengths = {}
    for what in ("end of text", "end at once"):
        prompt = model.tokenizer.encode(PROMPT, add_special=True)
        reference = generate(
            load_stage(model.checkpoint, (0, 4)),
            model.head,
            prompt,
            REQUESTS[what].params,
            eos_ids=model.tokenizer.eos_ids,
        )
        lengths[what] = len(list(reference))
    assert 3 < lengths["end of text"] < 60
    assert lengths["end at once"] == 0


@in_virtual_time
async def test_stop_texts_cut_as_in_one_process(model: LocalModel) -> None:
    async with bench(model, 2) as it:
        whole = text_of(await it.run(asked(temperature=1.0, seed=5, max_tokens=40)))
        prompt = model.tokenizer.encode(PROMPT, add_special=True)
        for begin in (0, 4, len(whole) - 2):
            for length in (1, 2, 5):
                stop = (whole[begin : begin + length], "never met")
                request = asked(temperature=1.0, seed=5, max_tokens=40, stop=stop)
                expected = "".join(
                    generate_text(
                        load_stage(model.checkpoint, (0, 4)),
                        model.head,
                        model.tokenizer,
                        prompt,
                        request.params,
                    )
                )
                events = await it.run(request)
                assert text_of(events) == expected
                assert events[-1].reason == "stop"  # type: ignore[union-attr]
        await asyncio.sleep(1)
        it.assert_empty()


@in_virtual_time
async def test_the_codec_fp16_gives_the_text_of_the_codec_exact(model: LocalModel) -> None:
    async with bench(model, 2) as exact:
        expected = ids_of(await exact.run(asked()))
    async with bench(model, 2, codec="fp16") as it:
        events = await it.run(asked())
        assert ids_of(events) == expected
        finished = events[-1]
        assert isinstance(finished, Finished)
        # Two bytes per value: 12 times one row came back.
        assert finished.returned_bytes == 12 * TINY.hidden_size * 2


@in_virtual_time
async def test_bf16_over_three_stages_equals_bf16_in_one_process(checkpoint: Checkpoint) -> None:
    model = LocalModel("tiny", checkpoint, Engines("bf16", 1))
    prompt = model.tokenizer.encode(PROMPT, add_special=True)
    reference = generate(load_stage(checkpoint, (0, 4), "bf16"), model.head, prompt, asked().params)
    expected = [token.id for token in reference]
    async with bench(model, 3, engine="bf16") as it:
        assert ids_of(await it.run(asked())) == expected


@in_virtual_time
async def test_chats_are_rendered_by_the_models_template(model: LocalModel) -> None:
    async with bench(model, 2) as it:
        chat = GenerationRequest(
            model="tiny",
            params=SamplingParams(max_tokens=5),
            messages=[{"role": "user", "content": "the"}],
        )
        rendered = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
        plain = asked(model.tokenizer.encode(rendered), max_tokens=5)
        assert ids_of(await it.run(chat)) == ids_of(await it.run(plain))


@in_virtual_time
async def test_interleaved_sessions_do_not_disturb_each_other(model: LocalModel) -> None:
    one, two = asked(temperature=1.0, seed=1), asked(LONG, temperature=1.0, seed=2)
    async with bench(model, 3, own_stage=True) as it:
        alone = [ids_of(await it.run(one)), ids_of(await it.run(two))]
        together = await asyncio.gather(it.run(one), it.run(two))
        assert [ids_of(events) for events in together] == alone
        with pytest.raises(Busy):
            await asyncio.gather(*(it.run(one) for _ in range(3)))


@in_virtual_time
async def test_events_carry_what_each_stage_did(model: LocalModel) -> None:
    async with bench(model, 2) as it:
        events = await it.run(asked(max_tokens=3))
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert it.held == [it.route.peers]
        n_rows = finished.prompt_tokens + 2  # the last token is never fed back
        for stage, peer in zip(finished.stages, it.route.peers, strict=True):
            assert stage.peer_id == peer
            assert stage.received_bytes == n_rows * TINY.hidden_size * 4
            assert stage.compute_s == pytest.approx(3 * 0.002)
        assert finished.returned_bytes == 3 * TINY.hidden_size * 4
        first, *later = [event for event in events if isinstance(event, Delta)]
        assert first.timing is None
        assert all(d.timing is not None and d.timing.stages_s == 2 * 0.002 for d in later)
        assert it.generator.n_tokens == 3


@in_virtual_time
async def test_a_long_prompt_keeps_one_chunk_more_in_flight_than_there_are_stages(
    model: LocalModel,
) -> None:
    async with bench(model, 1) as it:
        request = asked(LONG, max_tokens=2)
        expected = ids_of(await it.run(request))
        task = asyncio.create_task(it.run(request))
        await asyncio.sleep(1.5 * LINK_S)  # the session is open there, and not yet known here
        it.nodes[1].worker.is_held = True
        await asyncio.sleep(1)
        [session] = it.nodes[1].server._sessions.values()
        assert session.n_owed == 2  # of three chunks
        it.nodes[1].worker.release()
        assert ids_of(await task) == expected


REFUSED = [
    (asked([0] * 512), PromptTooLong),
    (asked([10_000]), InvalidRequest),
    (asked([]), InvalidRequest),
    (asked(logit_bias={10_000: 1.0}), InvalidParams),
]


@pytest.mark.parametrize(("request_", "error"), REFUSED)
@in_virtual_time
async def test_a_request_that_cannot_run_is_refused_before_any_stage_hears_of_it(
    model: LocalModel, request_: GenerationRequest, error: type[Exception]
) -> None:
    async with bench(model, 1) as it:
        with pytest.raises(error):
            await it.run(request_)
        assert it.nodes[1].links[PEERS[0]].bytes_received == 0
        it.assert_empty()


@in_virtual_time
async def test_a_stopping_node_begins_nothing(model: LocalModel) -> None:
    async with bench(model, 1) as it:
        it.generator.refuse_new()
        with pytest.raises(NotReady):
            await it.run(asked())
        it.assert_empty()


@in_virtual_time
async def test_a_stage_without_room_is_busy_and_the_others_keep_nothing(
    model: LocalModel,
) -> None:
    async with bench(model, 3) as it:
        [stage] = it.nodes[2].server.stages.values()
        taken = stage.leases.capacity_bytes // stage.engine.kv_bytes_per_token
        stage.leases.grant("somebody else", n_tokens=taken, now=it.head.clock())
        with pytest.raises(Busy):
            await it.run(asked())
        stage.leases.release("somebody else")
        await asyncio.sleep(1)
        it.assert_empty()


@in_virtual_time
async def test_a_stage_that_unloaded_the_plan_makes_the_model_not_ready(
    model: LocalModel,
) -> None:
    async with bench(model, 3) as it:
        it.nodes[3].server.remove(it.route.digest)
        with pytest.raises(NotReady, match="tiny is not ready"):
            await it.run(asked())
        await asyncio.sleep(1)
        it.assert_empty()


@in_virtual_time
async def test_a_deadline_ends_a_generation_and_frees_the_stages(model: LocalModel) -> None:
    async with bench(model, 2) as it:
        for deadline_s in (0.0, LINK_S, 2.5 * LINK_S, 5 * LINK_S, 20 * LINK_S):
            plain = asked(max_tokens=100)
            request = GenerationRequest(
                model="tiny", params=plain.params, prompt=PROMPT, deadline_s=deadline_s
            )
            began_at = it.head.clock()
            with pytest.raises(SessionFailed) as caught:
                await it.run(request)
            assert caught.value.code == "deadline_exceeded"
            assert it.head.clock() - began_at <= deadline_s + 1e-6
            await asyncio.sleep(1)
            it.assert_empty()


@in_virtual_time
async def test_an_engine_error_of_the_head_fails_the_session(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise InvalidHiddenStates("for the test")

    async with bench(model, 2) as it:
        monkeypatch.setattr(model.head, "logits", fail)
        with pytest.raises(SessionFailed) as caught:
            await it.run(asked())
        assert caught.value.code == "internal"
        assert isinstance(caught.value.__cause__, EngineError)
        await asyncio.sleep(1)
        it.assert_empty()


@in_virtual_time
async def test_a_worker_that_was_closed_fails_the_session_with_shutting_down(
    model: LocalModel,
) -> None:
    async with bench(model, 1) as it:
        events = it.generator.generate(asked(max_tokens=50))
        for _ in range(3):
            await anext(events)
        it.head.worker.close()
        with pytest.raises(SessionFailed) as caught:
            _ = [event async for event in events]
        assert caught.value.code == "shutting_down"
        await asyncio.sleep(1)
        it.assert_empty()


async def cancelled_after(it: Bench, delay_s: float) -> None:
    task = asyncio.create_task(it.run(asked(LONG, max_tokens=3)))
    await asyncio.sleep(delay_s)
    task.cancel()
    await asyncio.wait({task})
    # A client that goes away frees the memory within one way over the links.
    await asyncio.sleep(1.5 * LINK_S)
    await settled()
    it.assert_empty()


@in_virtual_time
async def test_a_client_that_goes_away_at_any_moment_leaves_nothing_behind(
    model: LocalModel,
) -> None:
    async with bench(model, 2) as it:
        began_at = it.head.clock()
        await it.run(asked(LONG, max_tokens=3))
        whole_s = it.head.clock() - began_at
        await asyncio.sleep(1)
        for n in range(int(whole_s / (LINK_S / 4)) + 1):
            await cancelled_after(it, n * LINK_S / 4)
        assert not any(node.lost for node in it.nodes)  # and nobody took offence


@in_virtual_time
async def test_a_client_that_closes_the_stream_after_any_event_leaves_nothing_behind(
    model: LocalModel,
) -> None:
    async with bench(model, 3, own_stage=True) as it:
        n_events = len(await it.run(asked(max_tokens=4)))
        for n in range(1, n_events + 1):
            events = it.generator.generate(asked(max_tokens=4))
            for _ in range(n):
                await anext(events)
            await events.aclose()
            assert it.generator.n_active == 0
            await asyncio.sleep(1.5 * LINK_S)
            it.assert_empty()
        assert not any(node.lost for node in it.nodes)


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("how", ["break", "stall"])
@in_virtual_time
async def test_a_stage_that_dies_at_any_moment_fails_the_call_and_frees_the_rest(
    model: LocalModel, victim: int, how: str
) -> None:
    n_failed = 0
    for n in range(14):
        async with bench(model, 2) as it:
            task = asyncio.create_task(it.run(asked(LONG, max_tokens=3)))
            await asyncio.sleep(n * LINK_S)
            for link in it.nodes[victim].links.values():
                if how == "break":
                    link.break_()
                else:
                    link.stall()
            struck_at = it.head.clock()
            await asyncio.wait({task})
            if task.exception() is None:
                assert isinstance(task.result()[-1], Finished)
            else:
                n_failed += 1
                assert isinstance(task.exception(), SessionFailed | NotReady)
                # Held links beat each second; an open has its own deadline.
                limit_s = 0.0 if how == "break" else 10.0
                assert it.head.clock() - struck_at <= limit_s + 2 * LINK_S
            if how == "break":
                await asyncio.sleep(2 * LINK_S)
                it.assert_empty()
            else:
                # Nobody tells the survivors that the head is gone for them: leases run out.
                await asyncio.sleep(70)
                for node in it.nodes:
                    node.server.expire()
                await settled()
                it.assert_empty()
    assert n_failed >= 8


@in_virtual_time
async def test_a_head_that_dies_ends_its_sessions_on_every_stage(model: LocalModel) -> None:
    for n in range(1, 9):
        async with bench(model, 2) as it:
            task = asyncio.create_task(it.run(asked(LONG, max_tokens=30)))
            await asyncio.sleep(n * LINK_S)
            for link in it.head.links.values():
                link.break_()
            await settled()
            for node in it.nodes[1:]:
                assert node.server.n_sessions == 0
            with pytest.raises((SessionFailed, NotReady)):
                await task


class NonsenseStage(AddingStage):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = TINY.hidden_size

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        return np.full_like(hidden, np.nan)


@in_virtual_time
async def test_a_stage_that_computes_nonsense_loses_its_link_and_the_call_fails(
    model: LocalModel,
) -> None:
    async with bench(model, 1) as it:
        [stage] = it.nodes[1].server.stages.values()
        stage.engine = NonsenseStage()
        with pytest.raises(SessionFailed) as caught:
            await it.run(asked())
        assert caught.value.code == "peer_lost"
        assert [type(error) for _, error in it.head.lost] != [LinkBroken]
        await asyncio.sleep(1)
        assert it.nodes[1].server.n_sessions == 0
