"""What adding up a vector over the members of a group costs, by each way of doing it.

Two terms for each message: the one-way latency of a link and the bytes over its bandwidth. Members
hang on one switch; a link carries both directions at once, but what one member sends to several
leaves it one after the other, and so does what several send to one arrive. Pure, no units but
seconds and bytes; what a member's own processor does for a message belongs to the latency.

With n members, latency l, payload S and bandwidth B (`allreduce_s` takes the least):

    star    everybody to the hub, the sum back       2 l       + 2 (n - 1) S/B
    direct  everybody to everybody                   l         + (n - 1) S/B
    ring    a share at a time, twice round           2 (n-1) l + 2 (n - 1)/n S/B
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Algorithm = Literal["star", "direct", "ring"]

# Among more, direct exchange takes n times the messages of a star, and a lane for every pair.
MAX_DIRECT = 2


def star_s(n_members: int, payload_bytes: float, *, latency_s: float, bytes_per_s: float) -> float:
    """The hub receives from all at once, adds, and sends to all: its link carries everything."""
    return 2 * (latency_s + (n_members - 1) * payload_bytes / bytes_per_s)


def direct_s(
    n_members: int, payload_bytes: float, *, latency_s: float, bytes_per_s: float
) -> float:
    """Each sends its part to every other, and adds for itself."""
    return latency_s + (n_members - 1) * payload_bytes / bytes_per_s


def ring_s(n_members: int, payload_bytes: float, *, latency_s: float, bytes_per_s: float) -> float:
    """Each n-th of the vector goes round once to be added up, and once more to be told."""
    n_steps = 2 * (n_members - 1)
    return n_steps * (latency_s + payload_bytes / n_members / bytes_per_s)


def costs_s(
    n_members: int, payload_bytes: float, *, latency_s: float, bytes_per_s: float
) -> Mapping[Algorithm, float]:
    """Seconds by each way that a group of so many may choose.

    Raises:
        ValueError: fewer than two members, or figures that are not a link's.
    """
    if n_members < 2:
        raise ValueError("a group has at least two members")
    if not (latency_s >= 0 and bytes_per_s > 0 and payload_bytes >= 0):
        raise ValueError("latency and payload must not be negative, and bandwidth must be positive")
    link = {"latency_s": latency_s, "bytes_per_s": bytes_per_s}
    if n_members <= MAX_DIRECT:
        return {"direct": direct_s(n_members, payload_bytes, **link)}
    return {
        "star": star_s(n_members, payload_bytes, **link),
        "ring": ring_s(n_members, payload_bytes, **link),
    }


def allreduce_s(
    n_members: int, payload_bytes: float, *, latency_s: float, bytes_per_s: float
) -> tuple[Algorithm, float]:
    """The fastest way, the star if equal, and its seconds.

    Args:
        n_members: of the group, two or more.
        payload_bytes: of one member's part as it is on the wire.
        latency_s: one way between two members, their processors' part included.
        bytes_per_s: of one member's link, each direction.

    Raises:
        ValueError: as `costs_s`.
    """
    costs = costs_s(n_members, payload_bytes, latency_s=latency_s, bytes_per_s=bytes_per_s)
    algorithm = min(costs, key=lambda name: costs[name])
    return algorithm, costs[algorithm]
