"""Which ways to a peer are worth trying, best first, by what both ends know of their NATs. Pure.

What a pair of kinds allows over TCP (one row for us, one column for the peer):

                   | open    | full cone | address-r. | port-r.  | symmetric
    open           | dial    | reverse   | reverse    | reverse  | reverse
    full cone      | dial    | punch     | punch      | punch    | punch
    address-restr. | dial    | punch     | punch      | punch    | punch
    port-restr.    | dial    | punch     | punch      | punch    | birthday (easy end)
    symmetric      | dial    | punch     | punch      | birthday | -
                   |         |           |            | (hard end)|

ICE over UDP does the same but for the two birthdays. Many routers are cones for UDP only, and
port-restricted for TCP: then a full cone or address-restricted one and a symmetric one meet by a
birthday, or through WebRTC, which is an order of magnitude slower than TCP and therefore last.
Two symmetric routers need a relay. What is not known is tried, but never by a birthday.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from covey.transport.addresses import format_address
from covey.transport.link import LinkKind
from covey.transport.nat.facts import NatFacts, NatKind

MAX_LAN_DIALS = 4

_LENIENT = frozenset({NatKind.OPEN, NatKind.FULL_CONE, NatKind.ADDRESS_RESTRICTED})


class AttemptKind(StrEnum):
    """What this end does."""

    DIAL = "dial"  # connects to one of `addresses`
    REVERSE = "reverse"  # asks the peer to dial one of `addresses`
    PUNCH = "punch"  # both connect to what an observer saw of the other's port
    BIRTHDAY_EASY = "birthday_easy"  # our port is the one that can be foretold
    BIRTHDAY_HARD = "birthday_hard"  # the peer's is
    WEBRTC = "webrtc"  # ICE over UDP


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to try."""

    kind: AttemptKind
    link_kind: LinkKind  # of the link that it makes
    addresses: tuple[str, ...] = ()  # "host:port"


def attempts(ours: NatFacts, theirs: NatFacts) -> tuple[Attempt, ...]:
    """What to try with the peer, in this order, until one makes a link.

    Direct attempts cost a packet or two and come first; a relay is not among them.
    """
    made = [
        *_dials(AttemptKind.DIAL, to=theirs, of=ours),
        *_dials(AttemptKind.REVERSE, to=ours, of=theirs),
    ]
    if can_punch(ours.tcp, theirs.tcp):
        made.append(Attempt(AttemptKind.PUNCH, LinkKind.PUNCHED))
    match ours.tcp, theirs.tcp:
        case NatKind.PORT_RESTRICTED, NatKind.SYMMETRIC:
            made.append(Attempt(AttemptKind.BIRTHDAY_EASY, LinkKind.PUNCHED))
        case NatKind.SYMMETRIC, NatKind.PORT_RESTRICTED:
            made.append(Attempt(AttemptKind.BIRTHDAY_HARD, LinkKind.PUNCHED))
    if can_punch(ours.udp, theirs.udp):
        made.append(Attempt(AttemptKind.WEBRTC, LinkKind.WEBRTC))
    return tuple(made)


def can_punch(ours: NatKind, theirs: NatKind) -> bool:
    """Whether two ends that send to each other at once meet, as far as is known."""
    if NatKind.BLOCKED in (ours, theirs):
        return False
    if ours is NatKind.SYMMETRIC:
        # Our port cannot be foretold: the other end must let in any port of our host.
        return theirs in _LENIENT or theirs is NatKind.UNKNOWN
    if theirs is NatKind.SYMMETRIC:
        return ours in _LENIENT or ours is NatKind.UNKNOWN
    return True


def _dials(kind: AttemptKind, *, to: NatFacts, of: NatFacts) -> Iterable[Attempt]:
    """How the end `of` could dial the end `to`."""
    if of.tcp is NatKind.BLOCKED:
        return
    if _may_share_a_network(of, to):
        nearby = _at(to.lan_hosts[:MAX_LAN_DIALS], to.port)
        if nearby:
            yield Attempt(kind, LinkKind.DIRECT, nearby)
    if to.is_reachable or to.tcp is NatKind.OPEN:
        direct = _at(to.public_hosts, to.port)
        if direct:
            yield Attempt(kind, LinkKind.DIRECT, direct)
    if to.mapped_addresses:
        yield Attempt(kind, LinkKind.MAPPED, to.mapped_addresses)


def _may_share_a_network(one: NatFacts, other: NatFacts) -> bool:
    """Behind the same router, or nobody can tell."""
    if not one.public_hosts or not other.public_hosts:
        return True
    return not set(one.public_hosts).isdisjoint(other.public_hosts)


def _at(hosts: Sequence[str], port: int) -> tuple[str, ...]:
    return tuple(format_address(host, port) for host in hosts)
