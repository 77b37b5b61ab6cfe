"""Which relays a node keeps warm, and which one it takes to reach a peer. Pure functions.

A relay that was never measured counts as slow, not as unfit; two at one site count as less than
two, since what takes one away takes the other too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

N_KEPT = 2
UNKNOWN_RTT_S = 0.3
SAME_SITE_S = 0.15  # a slower relay elsewhere is worth this much
HYSTERESIS = 0.7  # a relay gives way to one that is faster by a third, and by 5 ms
_HYSTERESIS_S = 0.005
MAX_TRIED = 4  # relays in one attempt to reach a peer


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member that is willing to relay and can be dialled."""

    peer_id: str
    host: str | None = None  # at which others reach it
    rtt_s: float | None = None


def choose_kept(
    candidates: Iterable[Candidate], kept: Collection[str], *, n: int = N_KEPT
) -> tuple[str, ...]:
    """The peer ids of up to `n` relays to hold links to, the best first.

    Those in `kept` have an advantage, so that small changes of their round-trip times move nobody.
    """
    left = list(candidates)
    chosen: list[Candidate] = []
    while left and len(chosen) < n:
        sites = {_site(candidate.host) for candidate in chosen} - {None}
        best = min(left, key=lambda one: (_cost(one, sites, kept), one.peer_id))
        left.remove(best)
        chosen.append(best)
    return tuple(candidate.peer_id for candidate in chosen)


def order_for_dial(
    announced: Mapping[str, float | None], rtts_s: Mapping[str, float]
) -> tuple[str, ...]:
    """The relays that a peer announces, the shortest way first.

    `announced` has the peer's round-trip time to each, `rtts_s` ours to those that we know.
    """

    def whole_s(relay: str) -> tuple[float, str]:
        theirs = announced[relay]
        return (
            rtts_s.get(relay, UNKNOWN_RTT_S) + (UNKNOWN_RTT_S if theirs is None else theirs),
            relay,
        )

    return tuple(sorted(announced, key=whole_s)[:MAX_TRIED])


def _cost(candidate: Candidate, sites: Collection[str | None], kept: Collection[str]) -> float:
    cost_s = UNKNOWN_RTT_S if candidate.rtt_s is None else candidate.rtt_s
    if _site(candidate.host) in sites:
        cost_s += SAME_SITE_S
    if candidate.peer_id in kept:
        cost_s = cost_s * HYSTERESIS - _HYSTERESIS_S
    return cost_s


def _site(host: str | None) -> str | None:
    """What the members of one household share: an IPv4 address, or 64 bits of an IPv6 one."""
    if host is None or ":" not in host:
        return host
    try:
        return str(ipaddress.IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host
