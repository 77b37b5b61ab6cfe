"""What every kind of link promises, whatever carries it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from covey.transport.errors import FrameTooLarge, LinkBroken, LinkClosed, LinkTimeout
from covey.transport.frame import Frame, Tensor
from covey.transport.identity import Identity
from covey.transport.link import Link, LinkKind
from covey.transport.memory import Conditions, memory_link_pair
from covey.transport.messages import Beat, Forward, StageTrace
from covey.transport.relay.splice import Splice, Toll
from covey.transport.steady.link import SteadyLink
from covey.transport.stream_link import open_stream_link
from covey.transport.tls import authenticate, build_contexts
from support.rtc import rtc_pair

Pair = tuple[Link, Link]
MIB = 1 << 20
A, B = Identity(bytes(32)), Identity(bytes([1] * 32))


async def memory_pair() -> Pair:
    return memory_link_pair(A.peer_id, B.peer_id)


async def bad_memory_pair() -> Pair:
    conditions = Conditions(delay_s=0.001, jitter_s=0.005, loss=0.2, retransmit_s=0.003)
    return memory_link_pair(A.peer_id, B.peer_id, conditions=conditions, seed=7)


async def direct_pair() -> Pair:
    return await secured(*connected_sockets(), LinkKind.DIRECT)


async def relayed_pair() -> Pair:
    at_a, a_at_relay = connected_sockets()
    b_at_relay, at_b = connected_sockets()
    toll = Toll(rate=500e6, rate_per_payer=500e6)
    Splice(a_at_relay, b_at_relay, toll=toll, payer=A.peer_id, on_end=toll.close)
    return await secured(at_a, at_b, LinkKind.RELAYED)


def connected_sockets() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return dialled, accepted


async def secured(dialled: socket.socket, accepted: socket.socket, kind: LinkKind) -> Pair:
    at_a, at_b = await asyncio.gather(
        *(
            open_stream_link(
                connection,
                context=contexts.client if is_dialer else contexts.server,
                is_dialer=is_dialer,
                authenticate=lambda tls: authenticate(
                    tls, expected=None, is_allowed=lambda _: True
                ),
                kind=kind,
                handshake_s=5.0,
            )
            for connection, contexts, is_dialer in (
                (dialled, build_contexts(bytes(32), A), True),
                (accepted, build_contexts(bytes(32), B), False),
            )
        )
    )
    return at_a, at_b


def steady(pair: Pair) -> Pair:
    """Links that would move to another carrier, if there were one."""
    at_a, at_b = (SteadyLink(carrier, bytes(16)) for carrier in pair)
    for link in (at_a, at_b):
        link.on_lost = lambda link=link: link.abort(link.lost_to)  # type: ignore[misc]
    return at_a, at_b


async def steady_memory_pair() -> Pair:
    return steady(await bad_memory_pair())


async def steady_direct_pair() -> Pair:
    return steady(await direct_pair())


async def steady_relayed_pair() -> Pair:
    return steady(await relayed_pair())


async def webrtc_pair() -> Pair:
    return await rtc_pair(A.peer_id, B.peer_id)


@pytest.fixture(
    params=[
        pytest.param(memory_pair, id="memory"),
        pytest.param(bad_memory_pair, id="bad_memory"),
        pytest.param(direct_pair, id="direct", marks=pytest.mark.network),
        pytest.param(relayed_pair, id="relayed", marks=pytest.mark.network),
        pytest.param(webrtc_pair, id="webrtc", marks=pytest.mark.network),
        pytest.param(steady_memory_pair, id="steady_memory"),
        pytest.param(steady_direct_pair, id="steady_direct", marks=pytest.mark.network),
        pytest.param(steady_relayed_pair, id="steady_relayed", marks=pytest.mark.network),
    ],
)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    links = await request.param()
    yield links
    for link in links:
        link.abort(LinkBroken("the test is over"))
    await asyncio.gather(*(link.aclose() for link in links))


def beat(text: str) -> Frame:
    return Frame(message=Beat(body=text.encode()))


def forward(step: int, nbytes: int, session: str = "s") -> Frame:
    message = Forward(session=session, epoch=0, stage_idx=0, step=step, position=0, n_return=1)
    data = bytes([step % 256]) * nbytes
    return Frame(message=message, tensors={"hidden": Tensor("u8", (nbytes,), data)})


async def test_each_end_knows_the_other(pair: Pair) -> None:
    at_a, at_b = pair
    assert (at_a.peer_id, at_b.peer_id) == (B.peer_id, A.peer_id)
    assert at_a.kind is at_b.kind
    assert isinstance(at_a.kind, LinkKind)


async def test_a_frame_arrives_as_it_was_sent(pair: Pair) -> None:
    at_a, at_b = pair
    trace = [StageTrace(1, 2, 3)]
    sent = Frame(
        message=Forward(
            session="s", epoch=1, stage_idx=2, step=3, position=4, n_return=5, trace=trace
        ),
        tensors={
            "indices": Tensor("i32", (2, 2), bytes(range(16))),
            "hidden": Tensor("fp16", (1, 3), b"abcdef"),
            "empty": Tensor("fp32", (0, 4), b""),
            "scalar": Tensor("u8", (), b"x"),
        },
        request=7,
        reply_to=8,
    )
    await at_a.send(sent)
    got = await at_b.receive()
    assert (got.message, got.request, got.reply_to) == (sent.message, 7, 8)
    assert {n: (t.dtype, t.shape, bytes(t.data)) for n, t in got.tensors.items()} == {
        n: (t.dtype, t.shape, bytes(t.data)) for n, t in sent.tensors.items()
    }


async def test_frames_of_a_session_keep_their_order_both_ways_at_once(pair: Pair) -> None:
    sizes = [0, 3, 300_000, 10, 70_000, 2 * MIB, 1, 1, 600_000]

    async def send_all(link: Link) -> None:
        for step, size in enumerate(sizes):
            await link.send(forward(step, size))

    async def check_all(link: Link) -> None:
        for step, size in enumerate(sizes):
            frame = await link.receive()
            expected = forward(step, size)
            assert frame.message == expected.message
            assert frame.tensors["hidden"].data == expected.tensors["hidden"].data

    await asyncio.gather(*(act(link) for link in pair for act in (send_all, check_all)))


async def test_frames_of_several_sessions_all_arrive(pair: Pair) -> None:
    at_a, at_b = pair
    sessions = [f"session-{n}" for n in range(9)]
    sending = asyncio.gather(
        *(at_a.send(forward(step, 400_000, s)) for s in sessions for step in range(3))
    )
    seen: dict[str, list[int]] = {}
    for _ in range(27):
        message = (await at_b.receive()).message
        assert isinstance(message, Forward)
        seen.setdefault(message.session, []).append(message.step)
    assert seen == {session: [0, 1, 2] for session in sessions}
    await sending


async def test_counters_count_both_ways(pair: Pair) -> None:
    at_a, at_b = pair
    await at_a.send(forward(0, MIB))
    await at_b.receive()
    assert MIB < at_a.bytes_sent == at_b.bytes_received < MIB + 1000
    assert at_a.bytes_received <= at_b.bytes_sent < 50  # it may have confirmed that


async def test_what_was_sent_before_closing_arrives(pair: Pair) -> None:
    at_a, at_b = pair
    for step in range(5):
        await at_a.send(forward(step, MIB))
    await asyncio.gather(at_a.aclose(), receive_steps(at_b, range(5)))
    with pytest.raises(LinkClosed) as caught:
        await at_b.receive()
    assert caught.value.by_peer


async def test_a_closed_link_says_so_at_both_ends(pair: Pair) -> None:
    at_a, at_b = pair
    receiving = asyncio.create_task(at_a.receive())
    await asyncio.sleep(0)
    await at_a.aclose()
    await at_a.aclose()
    with pytest.raises(LinkClosed) as caught:
        await receiving
    assert not caught.value.by_peer
    with pytest.raises(LinkClosed):
        await at_a.send(beat("too late"))
    with pytest.raises(LinkClosed):
        at_a.post(beat("too late"))
    with pytest.raises(LinkClosed):
        await at_b.receive()
    with pytest.raises(LinkClosed):
        await at_b.send(beat("too late"))


async def test_an_aborted_link_is_broken_for_the_peer(pair: Pair) -> None:
    at_a, at_b = pair
    receiving = asyncio.create_task(at_b.receive())
    await at_a.send(beat("hello"))
    await receiving
    at_a.abort(LinkTimeout("anything", 1))
    with pytest.raises(LinkTimeout):
        await at_a.receive()
    with pytest.raises(LinkTimeout):
        await at_a.send(beat("too late"))
    with pytest.raises(LinkBroken):
        await at_b.receive()


async def test_a_frame_beyond_the_limits_leaves_the_link_usable(pair: Pair) -> None:
    at_a, at_b = pair
    with pytest.raises(FrameTooLarge):
        await at_a.send(forward(0, 65 * MIB))
    with pytest.raises(FrameTooLarge):
        at_a.post(Frame(message=Beat(body=bytes(3 * MIB))))
    await at_a.send(beat("still here"))
    assert (await at_b.receive()).message == Beat(body=b"still here")


async def test_a_peer_that_does_not_read_holds_the_sender_back(pair: Pair) -> None:
    at_a, at_b = pair
    reading = asyncio.create_task(at_a.receive())  # what is sent is confirmed there
    n_sent = 0

    async def send_all() -> None:
        nonlocal n_sent
        while n_sent < 64:
            await at_a.send(forward(n_sent, MIB))
            n_sent += 1

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send_all(), 0.5)
    assert 8 <= n_sent < 40  # buffers of both ends and of the system
    await receive_steps(at_b, range(n_sent))  # the one given up was not sent
    await at_a.send(beat("on it goes"))
    assert (await at_b.receive()).message == Beat(body=b"on it goes")
    reading.cancel()


async def test_a_receiver_may_give_up_waiting_and_lose_nothing(pair: Pair) -> None:
    at_a, at_b = pair
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await at_b.receive()
    await at_a.send(beat("now"))
    assert (await at_b.receive()).message == Beat(body=b"now")


async def test_answers_nobody_reads_break_the_link(pair: Pair) -> None:
    at_a, _ = pair

    async def flood() -> None:
        for _ in range(100):
            for _ in range(1000):
                at_a.post(Frame(message=Beat(body=bytes(4096))))
            await asyncio.sleep(0)

    with pytest.raises(LinkBroken, match="does not read"):
        await flood()


async def receive_steps(link: Link, steps: range) -> None:
    for step in steps:
        message = (await link.receive()).message
        assert isinstance(message, Forward)
        assert message.step == step
