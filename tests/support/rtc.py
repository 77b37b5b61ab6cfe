"""WebRTC links between two ends in one process, over loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from covey.transport.rtc import RtcLink, open_rtc_link

LOOPBACK = "127.0.0.1"


class QueueSignal:
    """Carries descriptions to the other end of it; `change` may falsify what is sent."""

    def __init__(
        self,
        out: asyncio.Queue[str],
        back: asyncio.Queue[str],
        change: Callable[[str], str] = str,
    ) -> None:
        self._out, self._back, self._change = out, back, change

    async def send(self, text: str) -> None:
        self._out.put_nowait(self._change(text))

    async def receive(self) -> str:
        return await self._back.get()


def signals(change: Callable[[str], str] = str) -> tuple[QueueSignal, QueueSignal]:
    """The two ends; `change` falsifies what the first one says."""
    one: asyncio.Queue[str] = asyncio.Queue()
    other: asyncio.Queue[str] = asyncio.Queue()
    return QueueSignal(one, other, change), QueueSignal(other, one)


@contextmanager
def loopback_candidates() -> Iterator[None]:
    """aioice leaves the loopback interface out; here it is the only one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aioice.ice.get_host_addresses", lambda **_: [LOOPBACK])
        yield


def both_ends(
    a_id: str, b_id: str, change: Callable[[str], str] = str, *, deadline_s: float = 5.0
) -> tuple[Awaitable[RtcLink], Awaitable[RtcLink]]:
    """The opening of a link from `a_id`, who dials, to `b_id`."""
    at_a, at_b = signals(change)
    return (
        open_rtc_link(at_a, is_dialer=True, peer_id=b_id, hosts=(LOOPBACK,), deadline_s=deadline_s),
        open_rtc_link(
            at_b, is_dialer=False, peer_id=a_id, hosts=(LOOPBACK,), deadline_s=deadline_s
        ),
    )


async def rtc_pair(a_id: str, b_id: str) -> tuple[RtcLink, RtcLink]:
    """Both ends of an open link."""
    with loopback_candidates():
        at_a, at_b = await asyncio.gather(*both_ends(a_id, b_id))
    return at_a, at_b
