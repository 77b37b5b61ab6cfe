"""Text over three real processes: the same as in one, whoever asks and however."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import openai
import pytest

from covey.cli.child import wait_for
from covey.client import AsyncClient, BadRequest, Client, Generation
from covey.node.model.sampling import SamplingParams
from support.swarm import MODEL, Member, Swarm

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(180)]

Alone = Callable[[str, SamplingParams], str]

SKY = "Why is the sky blue?"
CAT = "Write one sentence about a cat."
GREEDY = SamplingParams(max_tokens=16)


def messages(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def ask(client: Client, content: str, max_tokens: int = 16) -> Generation:
    return client.chat(messages(content), model=MODEL, max_tokens=max_tokens, temperature=0.0)


@pytest.fixture(autouse=True)
def nothing_is_left(swarm: Swarm) -> Iterator[None]:
    """Every session, however it ended, is gone from every member within two seconds."""
    yield
    wait_for(lambda: swarm.n_sessions() == 0, 2.0, "a session did not end")


def async_client(member: Member) -> AsyncClient:
    return AsyncClient(home=member.process.home)


def test_greedy_text_over_three_stages_equals_one_process(swarm: Swarm, alone: Alone) -> None:
    result = ask(swarm.head, SKY, max_tokens=32)
    assert result.text == alone(SKY, SamplingParams(max_tokens=32))
    assert result.timing is not None
    spans = [stage.span for stage in result.timing.stages]
    assert len(spans) == 3
    assert [spans[0][0], spans[0][1], spans[1][1], spans[2][1]] == [
        0,
        spans[1][0],
        spans[2][0],
        30,
    ]


def test_a_prompt_that_begins_like_another_is_not_computed_again(
    swarm: Swarm, alone: Alone
) -> None:
    long = " ".join(f"Fact {i} about the sky." for i in range(30))
    assert ask(swarm.head, long + SKY).usage.cached_tokens == 0
    for question in (SKY, CAT):
        result = ask(swarm.head, long + question)
        assert result.text == alone(long + question, GREEDY)
        assert result.usage.cached_tokens % 64 == 0
        assert 128 <= result.usage.cached_tokens < result.usage.prompt_tokens


def test_a_seeded_sample_equals_one_process(swarm: Swarm, alone: Alone) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, top_k=40, seed=7)
    result = swarm.head.chat(
        messages(CAT), model=MODEL, max_tokens=24, temperature=0.9, top_p=0.9, top_k=40, seed=7
    )
    assert result.text == alone(CAT, params)
    assert result.text != alone(CAT, SamplingParams(max_tokens=24))


@pytest.mark.parametrize("idx", [1, 2])
def test_every_member_can_be_the_head(swarm: Swarm, alone: Alone, idx: int) -> None:
    assert ask(swarm.members[idx].client, SKY).text == alone(SKY, GREEDY)


async def test_generations_at_once_give_what_each_gives_alone(swarm: Swarm, alone: Alone) -> None:
    async with async_client(swarm.members[0]) as first, async_client(swarm.members[1]) as second:
        asked = [(first, SKY), (second, CAT), (first, CAT)]
        results = await asyncio.gather(
            *(
                client.chat(messages(content), model=MODEL, max_tokens=16, temperature=0.0)
                for client, content in asked
            )
        )
    assert [r.text for r in results] == [alone(content, GREEDY) for _, content in asked]


def test_a_stream_is_the_whole_answer_in_pieces(swarm: Swarm) -> None:
    with swarm.head.generate(
        "The capital of France is", model=MODEL, max_tokens=8, temperature=0.0, stream=True
    ) as stream:
        pieces = [chunk.text for chunk in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result.text
    assert stream.result.usage.completion_tokens == 8
    assert stream.result.finish_reason == "length"


async def test_the_async_client_generates_chats_and_streams(swarm: Swarm, alone: Alone) -> None:
    async with async_client(swarm.members[0]) as client:
        whole = await client.generate("One, two,", model=MODEL, max_tokens=4, temperature=0.0)
        stream = await client.chat(
            messages(SKY), model=MODEL, max_tokens=16, temperature=0.0, stream=True
        )
        async with stream:
            pieces = [chunk.text async for chunk in stream]
    assert whole.usage.completion_tokens == 4
    assert "".join(pieces) == alone(SKY, GREEDY)


def test_the_openai_package_streams_a_chat(swarm: Swarm, alone: Alone) -> None:
    url = swarm.members[0].process.facts["url"]
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": SKY}],
            max_tokens=16,
            temperature=0.0,
            stream=True,
        ) as stream,
    ):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == alone(SKY, GREEDY)


def test_closing_a_stream_early_frees_every_stage(swarm: Swarm) -> None:
    with swarm.head.chat(
        messages(SKY), model=MODEL, max_tokens=500, temperature=0.0, stream=True
    ) as stream:
        next(stream)
        # The founder as head, and a session on each of the three stages.
        assert swarm.n_sessions() == 4
    wait_for(lambda: swarm.n_sessions() == 0, 2.0, "a stage kept the session")


async def test_cancelling_an_async_request_frees_every_stage(swarm: Swarm) -> None:
    async with async_client(swarm.members[0]) as client:
        chat = client.chat(messages(SKY), model=MODEL, max_tokens=500, temperature=0.0)
        asking = asyncio.create_task(chat)
        await asyncio.to_thread(
            wait_for, lambda: swarm.n_sessions() == 4, 10.0, "the request did not begin"
        )
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        # While the client is open: its cancelled request is what ends the session.
        await asyncio.to_thread(
            wait_for, lambda: swarm.n_sessions() == 0, 2.0, "a stage kept the session"
        )


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_wrong_field_is_refused_by_name(
    swarm: Swarm, options: dict[str, float], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        swarm.head.chat(messages(SKY), model=MODEL, **options)  # type: ignore[call-overload]
    assert caught.value.param == param


def test_a_prompt_longer_than_the_context_is_refused(swarm: Swarm) -> None:
    with pytest.raises(BadRequest, match="shorten it") as caught:
        ask(swarm.head, "word " * 2100)
    assert caught.value.param == "messages"
