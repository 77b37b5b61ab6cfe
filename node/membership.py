"""How this node comes to be in a swarm: one it founds, one it was in before, or an invite."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from covey.store.schema import MemberCard
from covey.transport.errors import InviteInvalid, TransportError
from covey.transport.identity import Identity
from covey.transport.invite import Invite, InviteBook
from covey.transport.joining import redeem
from covey.transport.membership import Keyring, Swarm
from covey.transport.messages import MemberEntry, Welcome

from .errors import ConfigError, RemovedFromSwarm
from .home import Home

logger = logging.getLogger(__name__)

SWARM_FILE = "swarm.json"
INVITES_FILE = "invites.json"
REMOVED_FILE = "removed.json"
MIN_ADDRESS = 3  # of the wire's `Address`; a card may hold less, and one frame must not be spoilt
MAX_WELCOMED = 64  # members a joiner is told of; the DHT and the store tell the rest
COME_BACK_S = 5.0  # for the inviter of a member that comes back with an invite


@dataclass(frozen=True, slots=True)
class Membership:
    """The swarm this node is in, and members it can be reached through at first."""

    keyring: Keyring
    known: tuple[MemberEntry, ...]

    @property
    def swarm(self) -> Swarm:
        """The swarm, with the secret that this node knows as the present one."""
        return self.keyring.current


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
    keyring = _saved_keyring(home)
    if invite is not None:
        parsed = Invite.parse(invite, unix_time=time.time())
        if keyring is not None and keyring.current.id == parsed.swarm:
            return await _come_back(home, identity, keyring, parsed)
        if keyring is not None:
            raise ConfigError(f"{home.path} belongs to another swarm: give this one its own --home")
        if parsed.inviter == identity.peer_id:
            raise InviteInvalid("it was made by this very node")
        welcome = await redeem(identity, parsed)
        keyring = Keyring(current=Swarm.from_welcome(welcome))
        save_keyring(home, keyring)
        return Membership(keyring, tuple(welcome.members))
    if keyring is None:
        if not may_found:
            raise ConfigError(
                f"{home.path} is in no swarm: give the invite that `covey up` printed elsewhere"
            )
        keyring = Keyring(current=Swarm.create(identity.peer_id))
        save_keyring(home, keyring)
    return Membership(keyring, ())


async def _come_back(
    home: Home, identity: Identity, keyring: Keyring, invite: Invite
) -> Membership:
    """With an invite to the swarm we are in: it helps whoever was away for too long.

    Whatever goes wrong, the node goes on with what it has, as it would without an invite.
    """
    if invite.inviter == identity.peer_id:
        return Membership(keyring, ())
    try:
        async with asyncio.timeout(COME_BACK_S):
            welcome = await redeem(identity, invite)
    except (TransportError, TimeoutError) as error:
        logger.info("the invite was of no use to this member: %s", error)
        return Membership(keyring, ())
    if welcome.epoch > keyring.current.epoch:
        swarm = Swarm.from_welcome(welcome)
        keyring = keyring.adopt(swarm, by=None, unix_time=time.time())
        save_keyring(home, keyring)
    return Membership(keyring, tuple(welcome.members))


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


def save_keyring(home: Home, keyring: Keyring) -> None:
    """Keep the secrets over a restart; raises ConfigError."""
    home.save(SWARM_FILE, keyring.to_dict())


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


def _saved_keyring(home: Home) -> Keyring | None:
    state = home.load(SWARM_FILE)
    if state is None:
        return None
    try:
        return Keyring.from_dict(state)
    except ValueError as error:
        raise ConfigError(
            f"{home.path / SWARM_FILE} is damaged: remove it, then join again"
        ) from error
