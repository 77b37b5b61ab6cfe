"""The measured links, and what hidden states take across one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .profile import LinkKind, LinkProfile
from .speed import on_grid

# What a lost packet costs, measured over Linux TCP at 4, 20 and 40 ms, 1 and 2 % lost, messages of
# 1, 2 and 12 packets sent one at a time. A lone one is missed only when the sender's timer runs
# out, which is never sooner; of a longer message the others tell soon, but what is sent next has to
# wait for a window that was shut.
PACKET_BYTES = 1400
ALONE_LOST_S = 0.2
LOST_ROUND_TRIPS = 10
# Of a prompt's hundred packets several are lost and sent again while the others go on: measured at
# 40 ms and 4 %, 74 KB and 295 KB came 0.10 and 0.40 s late.
PROMPT_LOST_ROUND_TRIPS = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class BorderTerm:
    """What one border costs; all zero where both sides are one device."""

    sender: str
    receiver: str
    kind: LinkKind | None  # None: no link, sender and receiver are one device
    latency_s: float  # one way, with what lost packets cost on average
    wire_s: float  # bytes of one token / bandwidth
    chunk_wire_s: float  # of one prefill chunk, with what is lost of it sent again
    token_bytes: int = 0  # on the wire, indices included

    @property
    def decode_s(self) -> float:
        """From the last byte computed to the last byte received, one token."""
        return self.batch_s(1)

    def batch_s(self, n_sessions: int) -> float:
        """The same of a message with a token of each session."""
        return self.latency_s + n_sessions * self.wire_s

    @property
    def chunk_s(self) -> float:
        """The same of one prefill chunk."""
        return self.latency_s + self.chunk_wire_s


class Network:
    """The measured links, by direction.

    A direction nobody measured counts as its opposite; a pair without any measurement cannot be
    used. Of several measurements of one direction the worse of each figure counts.
    """

    def __init__(self, links: Iterable[LinkProfile]) -> None:
        measured: dict[tuple[str, str], LinkProfile] = {}
        for link in links:
            known = measured.get((link.a, link.b))
            measured[link.a, link.b] = _worse(known, link) if known else link
        self._links = measured

    def link(self, sender: str, receiver: str) -> LinkProfile | None:
        """The link that carries bytes from `sender` to `receiver`."""
        return self._links.get((sender, receiver)) or self._links.get((receiver, sender))

    def border(
        self, sender: str, receiver: str, *, token_bytes: int, chunk_tokens: float
    ) -> BorderTerm | None:
        """The terms of a border; None when the two cannot reach each other."""
        if sender == receiver:
            return BorderTerm(
                sender=sender, receiver=receiver, kind=None, latency_s=0, wire_s=0, chunk_wire_s=0
            )
        link = self.link(sender, receiver)
        if link is None:
            return None
        per_byte_s = 1.0 / link.bandwidth_bytes_per_s
        chunk_bytes = token_bytes * chunk_tokens
        n_lost = link.loss * chunk_bytes / PACKET_BYTES
        return BorderTerm(
            sender=sender,
            receiver=receiver,
            kind=link.kind,
            latency_s=on_grid(one_way_s(link, token_bytes)),
            wire_s=on_grid(token_bytes * per_byte_s),
            chunk_wire_s=on_grid(
                chunk_bytes * per_byte_s + n_lost * PROMPT_LOST_ROUND_TRIPS * link.rtt_s
            ),
            token_bytes=token_bytes,
        )

    def round_trip_s(self, one: str, other: str) -> float:
        """A short message and its answer; 0 where nothing was measured, or both are one."""
        if one == other:
            return 0.0
        ways = (self.link(one, other), self.link(other, one))
        return sum(on_grid(one_way_s(link)) for link in ways if link is not None)


def one_way_s(link: LinkProfile, n_bytes: int = 0) -> float:
    """Half a round trip, and what the loss of any of a message's packets adds on average."""
    n_packets = 1 + n_bytes // PACKET_BYTES
    lost_s = ALONE_LOST_S if n_packets == 1 else LOST_ROUND_TRIPS * link.rtt_s
    # A message of many packets loses several at once, and waits for all of them together.
    return link.rtt_s / 2 + min(1.0, link.loss * n_packets) * lost_s


def _worse(one: LinkProfile, other: LinkProfile) -> LinkProfile:
    return LinkProfile(
        a=one.a,
        b=one.b,
        rtt_s=max(one.rtt_s, other.rtt_s),
        bandwidth_bytes_per_s=min(one.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s),
        kind=max(one.kind, other.kind),  # only to be independent of order; no figure rests on it
        loss=max(one.loss, other.loss),
    )
