"""The link over a channel that misbehaves, or whose other end does; without any network."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest

from covey.transport.errors import (
    ErrorCode,
    LinkBroken,
    LinkClosed,
    MalformedFrame,
    ProtocolViolation,
)
from covey.transport.frame import Frame, Tensor
from covey.transport.framing import END
from covey.transport.messages import Beat, Failure, Forward
from covey.transport.rtc import RtcLink, link


class Wire:
    """A channel that records, and hands over what it is told to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.buffered_bytes = 0
        self.is_closed = False

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    async def aclose(self) -> None:
        self.is_closed = True

    @property
    def stream(self) -> bytes:
        return b"".join(message[1:] for message in self.sent if message[:1] == b"\0")

    @property
    def grants(self) -> list[int]:
        return [struct.unpack("!Q", m[1:])[0] for m in self.sent if m[:1] == b"\1"]


def make() -> tuple[RtcLink, Wire]:
    wire = Wire()
    return RtcLink(wire, peer_id="peer", is_dialer=True), wire


def grant(limit: int) -> bytes:
    return b"\1" + struct.pack("!Q", limit)


def forward(nbytes: int, step: int = 0) -> Frame:
    message = Forward(session="s", epoch=0, stage_idx=0, step=step, position=0, n_return=1)
    return Frame(message=message, tensors={"hidden": Tensor("u8", (nbytes,), bytes(nbytes))})


async def stream_of(*frames: Frame) -> bytes:
    """The bytes that carry them."""
    sender, wire = make()
    for frame in frames:
        await sender.send(frame)
        while sender.bytes_sent % link.WINDOW_BYTES == 0:  # the window is used up
            sender.message_received(grant(sender.bytes_sent + link.WINDOW_BYTES))
    return wire.stream


def deliver(to: RtcLink, stream: bytes, piece: int = link.MESSAGE_BYTES) -> None:
    for at in range(0, len(stream), piece):
        to.message_received(b"\0" + stream[at : at + piece])


async def test_messages_are_small_and_wait_for_the_library_and_the_window() -> None:
    at, wire = make()
    wire.buffered_bytes = link.CHANNEL_HIGH_BYTES
    await at.send(forward(2 * link.WINDOW_BYTES))
    assert not wire.sent
    wire.buffered_bytes = 0
    at.buffer_low()
    assert len(wire.stream) == link.WINDOW_BYTES == at.bytes_sent
    assert max(map(len, wire.sent)) == 1 + link.MESSAGE_BYTES
    at.message_received(grant(link.WINDOW_BYTES + 10))
    assert len(wire.stream) == link.WINDOW_BYTES + 10


async def test_the_window_moves_as_the_reader_reads() -> None:
    at, wire = make()
    frames = [forward(1 << 20, step) for step in range(16)]
    stream = await stream_of(*frames)
    sent = 0
    while sent < len(stream):
        limit = wire.grants[-1] if wire.grants else link.WINDOW_BYTES
        if limit == sent:
            break
        deliver(at, stream[sent:limit])
        sent = limit
    # The reader's buffer is full: nothing more may come.
    assert link.RECEIVE_BUFFER_BYTES < sent < link.RECEIVE_BUFFER_BYTES + 2 * link.WINDOW_BYTES
    for _ in range(8):
        await at.receive()
    assert wire.grants[-1] > sent


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        b"\1",
        b"\2xxxx",
        b"\1\0\0",
        "text",
        grant(0),
        grant(link.WINDOW_BYTES),  # moves nothing
        grant(link.WINDOW_BYTES + 1),  # nothing was sent yet
        grant(1 << 63),
        b"\0" + b"\xff" * 100,
        b"\0" + bytes(4) + b"xxxx",  # goes on after its end
    ],
    ids=repr,
)
async def test_a_message_that_is_none_ends_the_link(message: bytes | str) -> None:
    at, wire = make()
    at.message_received(message)
    with pytest.raises(ProtocolViolation):
        await at.receive()
    told = RtcLink(Wire(), peer_id="peer", is_dialer=False)
    deliver(told, wire.stream)
    assert (await told.receive()).message == Failure(code=ErrorCode.MALFORMED_FRAME)
    with pytest.raises(LinkClosed):
        await told.receive()
    told.abort(LinkBroken("over"))
    await told.aclose()
    at.channel_lost()
    await at.aclose()
    assert wire.is_closed


async def test_more_than_the_window_allows_ends_the_link() -> None:
    at, _ = make()
    stream = await stream_of(forward(2 * link.WINDOW_BYTES))
    deliver(at, stream[: link.WINDOW_BYTES])
    # The window has moved by what came; this goes beyond even that.
    at.message_received(b"\0" + stream[link.WINDOW_BYTES : 2 * link.WINDOW_BYTES + 100])
    with pytest.raises(MalformedFrame, match="more than it may"):
        await at.receive()
    at.abort(LinkBroken("over"))
    await at.aclose()


async def test_a_channel_that_is_lost_breaks_the_link_at_once() -> None:
    at, wire = make()
    deliver(at, await stream_of(Frame(message=Beat(body=b"last words"))))
    receiving = asyncio.create_task(at.receive())
    at.channel_lost()
    assert (await receiving).message == Beat(body=b"last words")
    with pytest.raises(LinkBroken):
        await at.receive()
    with pytest.raises(LinkBroken):
        await at.send(Frame(message=Beat(body=b"")))
    await at.aclose()
    assert wire.is_closed


async def test_an_end_within_a_frame_is_no_end() -> None:
    at, wire = make()
    stream = await stream_of(forward(300_000))
    deliver(at, stream[:65_540])  # a whole segment
    at.message_received(b"\0" + END)
    with pytest.raises(LinkBroken):
        await at.receive()
    await at.aclose()
    assert END not in wire.stream


async def test_closing_waits_for_the_other_end_to_have_got_everything() -> None:
    at, wire = make()
    await at.send(Frame(message=Beat(body=b"bye")))
    closing = asyncio.create_task(at.aclose())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.stream.endswith(END)
    assert not wire.is_closed
    at.message_received(b"\0" + END)
    await closing
    assert wire.is_closed


async def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CLOSE_DEADLINE_S", 0.05)
    at, wire = make()
    wire.buffered_bytes = link.CHANNEL_HIGH_BYTES  # nothing leaves
    await at.send(forward(1 << 20))
    began = time.monotonic()
    await at.aclose()
    assert wire.is_closed
    assert time.monotonic() - began < 1
    with pytest.raises(LinkClosed):
        await at.receive()


async def test_the_end_that_is_hung_up_on_answers_and_lets_the_other_go_first() -> None:
    at, wire = make()
    at.message_received(b"\0" + END)
    with pytest.raises(LinkClosed) as caught:
        await at.receive()
    assert caught.value.by_peer
    assert wire.stream == END
    await asyncio.sleep(0)
    assert not wire.is_closed
    at.channel_lost()
    await at.aclose()
    assert wire.is_closed


async def test_an_abort_hastens_an_end_under_way() -> None:
    at, wire = make()
    closing = asyncio.create_task(at.aclose())
    await asyncio.sleep(0)
    at.abort(LinkBroken("no more patience"))
    await closing
    assert wire.is_closed
