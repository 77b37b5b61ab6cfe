"""One member's part in changing the swarm's secret, sans-IO: what it holds, lacks and must do.

A removed member knows the secret of its time, so the swarm goes on to a new one, which whoever may
remove members draws and seals to each of the others. What a member does follows from its keyring
and from the standing (`standing.py`) alone, so members that see the same end with the same secret:

- The rotation that holds is adopted, and no other: one by whom the founder did not let, one that
  a better one has overtaken, and one whose secret is not what was signed are no rotation.
- Who finds no copy it can open asks another member: whoever holds the secret and finds the asker
  entitled to it seals it one.
- Where somebody is removed whom the rotation that holds has not left out (two removed members at
  once, say), there is another one: the founder's at once, the delegates' in turn.

Invariant: no secret is ever sealed to a peer that is removed in the standing it is sealed under.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from enum import Enum, auto

from covey.store.schema import MAX_COPIES, MAX_EPOCH, Rotation
from covey.transport.identity import Identity
from covey.transport.membership import Keyring, Swarm
from covey.transport.sealing import open_sealed, seal_to

from .standing import UNSIGNED, Standing, sign_statement

TURN_S = 10.0  # how long one that may rotate leaves it to the one before


class Need(Enum):
    """What a member must do next."""

    NOTHING = auto()
    ASK = auto()  # another member for the secret
    ROTATE = auto()


class Secrets:
    """The keyring of one member, kept in step with the standing."""

    def __init__(
        self,
        identity: Identity,
        keyring: Keyring,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.keyring = keyring
        self._identity = identity
        self._own = identity.peer_id
        self._entropy = entropy
        self._stale_since: float | None = None

    def review(self, standing: Standing, *, now: float, unix_time: float) -> Need:
        """Adopt what can be adopted, and say what is needed next.

        Args:
            standing: as of now.
            now: any clock that only goes forward, in seconds.
            unix_time: from which earlier secrets are honoured.
        """
        if self._own in standing.removed:
            return Need.NOTHING
        rotation = lacking(self.keyring, standing)
        if rotation is not None:
            known = self.keyring.with_commitment(rotation.commitment)
            copy = rotation.copies.get(self._own)
            if known is not None:
                self._adopt(known, rotation, unix_time)
            elif copy is None or not self.take(standing, copy, unix_time=unix_time):
                return Need.ASK
        self._note_author(standing)
        return self._turn(standing, now)

    def take(self, standing: Standing, copy: bytes, *, unix_time: float) -> bool:
        """Adopt the secret in a sealed copy, from anybody, if it is the one that we lack."""
        rotation = lacking(self.keyring, standing)
        secret = open_sealed(self._identity, copy)
        if rotation is None or secret is None or len(secret) != len(self.keyring.current.secret):
            return False
        swarm = self.keyring.current.with_secret(rotation.epoch, secret)
        if swarm.commitment != rotation.commitment:
            return False
        self._adopt(swarm, rotation, unix_time)
        return True

    def rotate(self, standing: Standing, members: Iterable[str], *, unix_time: float) -> Rotation:
        """A new secret for `members`, without those removed in `standing`; it is adopted here.

        Only for whom the standing lets; `standing` is the one that the rotation is published with.
        """
        swarm = self.keyring.current.next_epoch(
            after=self._latest_epoch(standing), entropy=self._entropy
        )
        entitled = sorted(peer for peer in members if peer not in standing.removed)
        rotation = Rotation(
            epoch=swarm.epoch,
            by=self._own,
            at=int(unix_time),
            commitment=swarm.commitment,
            without=tuple(sorted(standing.removed)),
            copies=_copies(entitled, swarm.secret),
            signature=UNSIGNED,
        )
        rotation = sign_statement(rotation, swarm=swarm.id, sign=self._identity.sign)
        self._adopt(swarm, rotation, unix_time)
        return rotation

    def copy_for(self, standing: Standing, peer_id: str, admitted: Collection[str]) -> bytes | None:
        """The secret that holds, sealed to a member that asks; None if it is entitled to none.

        Args:
            standing: as of now.
            peer_id: who asks, proven.
            admitted: whom members say to have let in.
        """
        rotation = standing.rotation
        if rotation is None or not is_entitled(standing, peer_id, admitted):
            return None
        if self.keyring.current.commitment == rotation.commitment:
            return seal_to(peer_id, self.keyring.current.secret)
        return rotation.copies.get(peer_id)

    # --- inside ------------------------------------------------------------------------------

    def _adopt(self, swarm: Swarm, rotation: Rotation, unix_time: float) -> None:
        self.keyring = self.keyring.adopt(swarm, by=rotation.by, unix_time=unix_time)

    def _note_author(self, standing: Standing) -> None:
        """Once we see whose rotation our secret is from; an invite does not say."""
        rotation, keyring = standing.rotation, self.keyring
        if rotation is not None and rotation.commitment == keyring.current.commitment:
            self.keyring = Keyring(current=keyring.current, by=rotation.by, old=keyring.old)

    def _turn(self, standing: Standing, now: float) -> Need:
        if not is_stale(standing) or self._own not in standing.authorities:
            self._stale_since = None
            return Need.NOTHING
        if self._stale_since is None:
            self._stale_since = now
        n_before = 0
        if self._own != standing.founder:
            n_before = 1 + sorted(standing.delegates).index(self._own)
        return Need.ROTATE if now - self._stale_since >= n_before * TURN_S else Need.NOTHING

    def _latest_epoch(self, standing: Standing) -> int:
        """Where to count on from.

        Not from what somebody counted who may rotate no longer, if that leaves too few numbers.
        """
        latest = standing.rotation.epoch if standing.rotation is not None else 0
        is_ours_void = self.keyring.by is not None and self.keyring.by not in standing.authorities
        if is_ours_void and self.keyring.current.epoch > MAX_EPOCH // 2:
            return latest
        return max(latest, self.keyring.current.epoch)


def _copies(members: Iterable[str], secret: bytes) -> dict[str, bytes]:
    """Sealed copies, as many as fit into a record; the other members ask for theirs."""
    copies: dict[str, bytes] = {}
    for peer_id in members:
        if len(copies) == MAX_COPIES:
            break
        with suppress(ValueError):  # somebody says to have let in what is no peer
            copies[peer_id] = seal_to(peer_id, secret)
    return copies


def lacking(keyring: Keyring, standing: Standing) -> Rotation | None:
    """The rotation whose secret should be the present one and is not.

    One of an earlier epoch is not followed, since the store may have been lost and be behind,
    unless whoever made our present secret may do so no longer.
    """
    rotation = standing.rotation
    if rotation is None or rotation.commitment == keyring.current.commitment:
        return None
    is_ours_void = keyring.by is not None and keyring.by not in standing.authorities
    return rotation if is_ours_void or rotation.epoch >= keyring.current.epoch else None


def is_stale(standing: Standing) -> bool:
    """Whether somebody who was removed may know the secret that holds."""
    left_out = standing.rotation.without if standing.rotation is not None else ()
    return not standing.removed.keys() <= set(left_out)


def is_entitled(standing: Standing, peer_id: str, admitted: Collection[str]) -> bool:
    """Whether a peer may have the secret that holds: a member then, or let in since."""
    if peer_id in standing.removed:
        return False
    copies = standing.rotation.copies if standing.rotation is not None else {}
    return peer_id in standing.authorities or peer_id in copies or peer_id in admitted
