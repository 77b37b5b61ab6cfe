"""The one interface of a lane: whole messages to one member, from a thread that may block.

A `Link` serves many tasks on the event loop; handing a tensor from the compute thread to the loop
and back costs more than the wire. A tensor-parallel group waits for its wire twice in each block,
so its members talk over lanes of their own, which live as long as the group.

Every kind passes `tests/conformance/transport/test_lane.py`.
"""

from __future__ import annotations

from typing import Literal, Protocol

from covey.transport.frame import Buffer

#: What carries a lane, fastest first: memory or a socket of one machine, TLS, the peer's link.
LaneKind = Literal["local", "tls", "link"]

MAX_MESSAGE = 1 << 26  # bytes: hidden states of a prefill chunk of any model we know, in fp32


class Lane(Protocol):
    """A reliable, ordered channel of messages to one authenticated member.

    One thread at a time uses it; `close` may be called from any.
    """

    @property
    def peer_id(self) -> str:
        """Whom this lane leads to, proved when it was opened."""

    @property
    def kind(self) -> LaneKind:
        """What carries it."""

    def send(self, *parts: Buffer) -> None:
        """Send one message made of `parts`; blocks while the way is full.

        Raises:
            LaneBroken: the lane ended, or the peer takes nothing for `SEND_TIMEOUT_S`.
            ValueError: longer than `MAX_MESSAGE`.
        """

    def receive(self, timeout_s: float) -> memoryview:
        """The next message; valid until the next call of `receive` or `poll`.

        Raises:
            LaneTimeout: none came in time; the lane stays usable.
            LaneBroken: there will be no more.
        """

    def poll(self) -> memoryview | None:
        """The next message if it is here already, without waiting; raises LaneBroken.

        Whoever waits for several lanes polls each for a bounded time and then sleeps in
        `wait_any` of this package, until one of them may have something.
        """

    def has_unseen(self) -> bool:
        """Whether something is here that `poll` has not looked at and `fileno` does not tell.

        What is here and tells is found by waiting, which is cheaper than a `poll` in vain.
        """

    def fileno(self) -> int:
        """What becomes readable when `poll` may have something that it had not before."""

    def close(self) -> None:
        """End it; the peer's calls raise LaneBroken. Safe to call twice, and from any thread."""
