"""What a mesh knows of one peer, and how long it tries to get back to one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from .peer import Peer
from .steady.link import SteadyLink

# A relayed handshake takes about ten round trips, and a pause of two seconds is better than a
# session that begins again. Where silence was the sign, two and a half have passed already.
MEND_S = 2.0
MEND_SILENT_S = 1.2
MAX_MEND_S = 10.0
MEND_ROUND_TRIPS = 12


@dataclass(slots=True)
class Contact:
    """One peer: where it is, the link to it, and what is under way."""

    addresses: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    peer: Peer | None = None
    link: SteadyLink | None = None  # below `peer`
    run: asyncio.Task[None] | None = None  # runs `peer`
    dial: asyncio.Task[Any] | None = None  # for a new link, or one that lost its carrier
    moving: asyncio.Task[Any] | None = None  # looks for a better carrier while this one works
    up: asyncio.Event = field(default_factory=asyncio.Event)
    has_relays: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals: asyncio.Lock = field(default_factory=asyncio.Lock)


def mend_deadline_s(rtt_s: float | None, *, was_silent: bool) -> float:
    """How long a link may be without a carrier before it counts as broken."""
    at_least_s = MEND_SILENT_S if was_silent else MEND_S
    return min(max(at_least_s, MEND_ROUND_TRIPS * (rtt_s or 0.0)), MAX_MEND_S)
