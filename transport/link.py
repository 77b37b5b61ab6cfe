"""The one interface to a peer, whatever carries the bytes.

Every kind of link passes `tests/conformance/transport/test_link.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from .errors import TransportError
from .frame import Frame


class LinkKind(StrEnum):
    """What carries a link, best first."""

    MEMORY = "memory"
    DIRECT = "direct"
    MAPPED = "mapped"
    PUNCHED = "punched"
    WEBRTC = "webrtc"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class Packets:
    """Packets with payload that a carrier has sent so far."""

    n_sent: int
    n_resent: int  # of these, because the first did not arrive


class Link(Protocol):
    """A reliable, ordered channel of frames to one authenticated peer."""

    @property
    def peer_id(self) -> str:
        """Whom this link leads to, proved by the handshake."""

    @property
    def kind(self) -> LinkKind:
        """What carries it now."""

    @property
    def remote(self) -> tuple[str, int] | None:
        """IP address and port at the other end, where those are the peer's or its router's."""

    @property
    def is_dialer(self) -> bool:
        """Whether this end began it; then `remote`, if any, is an address that can be dialled."""

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the carrier so far, headers included."""

    @property
    def bytes_received(self) -> int:
        """Bytes taken from the carrier so far, headers included."""

    @property
    def packets(self) -> Packets | None:
        """What the system says of the carrier's packets; None where it says nothing."""

    async def send(self, frame: Frame) -> None:
        """Queue a frame; waits while the send buffer is full, and may do so until somebody waits
        in `receive`. Tensors are not copied: do not modify them afterwards.

        Raises:
            LinkClosed, LinkBroken: the link ended; the frame may or may not have arrived.
            FrameTooLarge: beyond a limit of the protocol; the link stays usable.
        """

    def post(self, frame: Frame) -> None:
        """Queue a small frame without waiting: answers and heartbeats, from code that must not
        wait. A peer that lets more than 1 MiB of them pile up loses the link.

        Raises:
            LinkClosed, LinkBroken: the link ended.
            FrameTooLarge: beyond a limit of the protocol; the link stays usable.
        """

    async def receive(self) -> Frame:
        """The next frame. One task at a time may wait here.

        Raises:
            LinkClosed, LinkBroken: there will be no more.
            ProtocolViolation: the peer sent something wrong; the link has closed itself.
        """

    def suspect(self) -> None:
        """The peer has not been heard of for too long: find another way to it, or end as broken."""

    def abort(self, error: TransportError) -> None:
        """End the link now, unflushed; `send` and `receive` raise `error` from here on."""

    async def aclose(self) -> None:
        """Flush what was sent (bounded time), then end the link; safe to call twice."""
