"""How this node comes to be in a swarm: one it founds, one it was in before, or an invite."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from covey.store.schema import MemberCard
from covey.transport.errors import InviteInvalid
from covey.transport.identity import Identity
from covey.transport.invite import Invite, InviteBook
from covey.transport.joining import redeem
from covey.transport.membership import Swarm
from covey.transport.messages import MemberEntry, Welcome

from .errors import ConfigError, RemovedFromSwarm
from .home import Home

SWARM_FILE = "swarm.json"
INVITES_FILE = "invites.json"
REMOVED_FILE = "removed.json"
MIN_ADDRESS = 3  # of the wire's `Address`; a card may hold less, and one frame must not be spoilt
MAX_WELCOMED = 64  # members a joiner is told of; the DHT and the store tell the rest


@dataclass(frozen=True, slots=True)
class Membership:
    """The swarm this node is in, and members it can be reached through at first."""

    swarm: Swarm
    known: tuple[MemberEntry, ...]


async def enter(
    home: Home, identity: Identity, *, invite: str | None, may_found: bool
) -> Membership:
    """Join by invite, go on in the home's swarm, or found a new one.

    Raises:
        ConfigError: the home belongs to another swarm, or to none and `may_found` is false.
        RemovedFromSwarm: this node was removed from the home's swarm.
        InviteInvalid, PeerUnreachable: the invite opens nothing now.
    """
    removed = home.load(REMOVED_FILE)
    if removed is not None:
        raise RemovedFromSwarm(str(removed.get("by")), str(home.path))
    swarm = _saved_swarm(home)
    if invite is not None:
        parsed = Invite.parse(invite, unix_time=time.time())
        if swarm is not None and swarm.id == parsed.swarm:
            return Membership(swarm, ())
        if swarm is not None:
            raise ConfigError(f"{home.path} belongs to another swarm: give this one its own --home")
        if parsed.inviter == identity.peer_id:
            raise InviteInvalid("it was made by this very node")
        welcome = await redeem(identity, parsed)
        swarm = Swarm.from_welcome(welcome)
        home.save(SWARM_FILE, dict(swarm.to_dict()))
        return Membership(swarm, tuple(welcome.members))
    if swarm is None:
        if not may_found:
            raise ConfigError(
                f"{home.path} is in no swarm: give the invite that `covey up` printed elsewhere"
            )
        swarm = Swarm.create(identity.peer_id)
        home.save(SWARM_FILE, dict(swarm.to_dict()))
    return Membership(swarm, ())


def load_invites(home: Home) -> InviteBook:
    """The invites this node issued before; raises ConfigError."""
    state = home.load(INVITES_FILE)
    if state is None:
        return InviteBook()
    try:
        return InviteBook.from_dict(state)
    except ValueError as error:
        raise ConfigError(f"{home.path / INVITES_FILE} is damaged: remove it") from error


def save_invites(home: Home, invites: InviteBook) -> None:
    """Keep the invites over a restart; raises ConfigError."""
    home.save(INVITES_FILE, invites.to_dict())


def save_removal(home: Home, by: str) -> RemovedFromSwarm:
    """Keep for good that this node was removed, and by whom; the error that says so."""
    home.save(REMOVED_FILE, {"by": by})
    return RemovedFromSwarm(by, str(home.path))


def make_welcome(swarm: Swarm, members: Iterable[MemberEntry]) -> Welcome:
    """What a joiner is told."""
    return Welcome(
        swarm=swarm.id,
        epoch=swarm.epoch,
        secret=swarm.secret,
        founder=swarm.founder,
        members=list(members)[:MAX_WELCOMED],
    )


def entry_of(card: MemberCard) -> MemberEntry:
    """Where a member can be reached, from its card."""
    return MemberEntry(
        peer_id=card.peer_id,
        addresses=list(card.addresses[:16]),
        control_addresses=[
            address for address in card.control_addresses if len(address) >= MIN_ADDRESS
        ][:16],
    )


def _saved_swarm(home: Home) -> Swarm | None:
    state = home.load(SWARM_FILE)
    if state is None:
        return None
    try:
        return Swarm.from_dict(state)
    except ValueError as error:
        raise ConfigError(
            f"{home.path / SWARM_FILE} is damaged: remove it, then join again"
        ) from error
