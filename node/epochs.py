"""Carries this node from one secret of the swarm to the next, and others that were away with it.

The shell around `rotation.py`: it looks when the standing changes and once a second, asks members
over links that stand, or over the one request that an earlier secret is good for, answers those
who ask, and keeps the keyring on disk. Links that stand, stand.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from covey.store.schema import Revocation, Rotation
from covey.transport.errors import (
    ErrorCode,
    NotAMember,
    PeerUnreachable,
    RefusedByPeer,
    TransportError,
)
from covey.transport.identity import Identity
from covey.transport.membership import Keyring, Swarm
from covey.transport.mesh import Mesh
from covey.transport.messages import Failure, SecretAnswer, SecretRequest
from covey.transport.renewal import RenewalDoor, renew
from covey.transport.tasks import Tasks

from .members import Members
from .rotation import Need, Secrets
from .standing import Standing
from .switch import Switch

logger = logging.getLogger(__name__)

LOOK_S = 1.0
ASK_S = 2.0  # between two requests for the secret over links that stand
ANSWER_S = 5.0
RENEW_S = 5.0  # between two requests to one member that told us that our epoch is over
# Between two to one that hung up on us: it may have gone another way from an epoch we both had.
GUESS_S = 60.0
MAX_GUESSES = 2  # earlier epochs to try with it


class Epochs:
    """Which secret this node uses; `run` is its one loop."""

    def __init__(
        self,
        identity: Identity,
        keyring: Keyring,
        *,
        members: Members,
        mesh: Mesh,
        switch: Switch,
        save: Callable[[Keyring], None],
        on_new_secret: Callable[[Swarm], None],
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._identity = identity
        self._secrets = Secrets(identity, keyring)
        self._in_use = keyring
        self._members = members
        self._mesh = mesh
        self._save = save
        self._on_new_secret = on_new_secret
        self._clock = clock
        self._rng = rng
        self._tasks = Tasks()
        self._next_ask_at = 0.0
        self._next_renewal_at: dict[str, float] = {}
        self._door = RenewalDoor(identity, keyring, self._answer)
        mesh.add_door(self._door)
        switch.on_request(SecretRequest, self._take_request)

    @property
    def swarm(self) -> Swarm:
        """The swarm with the secret that this node uses now."""
        return self._in_use.current

    def remove(self, text: str, *, with_invited: bool = False) -> list[Revocation]:
        """Remove a member and change the secret; arguments and errors as `Members.remove`."""
        before = self._secrets.keyring
        try:
            removals = self._members.remove(text, self._rotation, with_invited=with_invited)
        except BaseException:
            self._secrets.keyring = before  # the new secret was never published
            raise
        self._put_to_use()
        return removals

    def look(self) -> None:
        """Do what the standing asks for."""
        standing, now = self._members.standing, self._clock()
        need = self._secrets.review(standing, now=now, unix_time=time.time())
        if need is Need.ROTATE:
            logger.info("the secret is changed again: somebody removed may know it")
            self._members.publish([self._rotation(standing)])
        elif need is Need.ASK and now >= self._next_ask_at:
            self._next_ask_at = now + ASK_S
            self._tasks.spawn(self._ask_somebody(), "ask for the secret")
        self._put_to_use()

    def dial_failed(self, peer_id: str, error: TransportError) -> None:
        """Note that a member could not be dialled: our secret may be of an earlier epoch."""
        ring, now = self._secrets.keyring, self._clock()
        if now < self._next_renewal_at.get(peer_id, 0.0):
            return
        match error:
            case RefusedByPeer(code=ErrorCode.EPOCH_OVER):
                self._next_renewal_at[peer_id] = now + RENEW_S
                self._tasks.spawn(self._renew(peer_id, [ring.current]), "renew")
            case PeerUnreachable() if ring.old:
                self._next_renewal_at[peer_id] = now + GUESS_S
                earlier = [old.swarm for old in ring.honoured(time.time())[:MAX_GUESSES]]
                self._tasks.spawn(self._renew(peer_id, earlier), "renew")
            case _:
                pass

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    async def aclose(self) -> None:
        """Stop what is under way."""
        await self._tasks.aclose()

    # --- asking ------------------------------------------------------------------------------

    async def _ask_somebody(self) -> None:
        peers = [
            peer for peer in self._mesh.peers.values() if self._members.is_allowed(peer.peer_id)
        ]
        if not peers:
            return
        peer = self._rng.choice(peers)
        try:
            answer = (await peer.request(SecretRequest(), timeout_s=ANSWER_S)).message
        except TransportError as error:
            logger.debug("no secret: %s", error, extra={"peer": peer.peer_id[-8:]})
            return
        if isinstance(answer, SecretAnswer):
            self._take(answer)

    async def _renew(self, peer_id: str, swarms: list[Swarm]) -> None:
        """Ask a member by the earlier secrets, one after the other."""
        addresses = self._mesh.addresses_of(peer_id)
        for swarm in swarms:
            try:
                answer = await renew(self._identity, swarm, peer_id, addresses)
            except (RefusedByPeer, NotAMember) as error:
                logger.warning(
                    "%s does not count this node among the members: ask for a new invite (%s)",
                    self._members.name_of(peer_id),
                    error,
                )
                return
            except TransportError as error:
                logger.debug("no secret: %s", error, extra={"peer": peer_id[-8:]})
                continue
            self._take(answer)
            return

    def _take(self, answer: SecretAnswer) -> None:
        self._members.take_notice(answer.statements)
        if answer.copy is not None:
            self._secrets.take(self._members.standing, answer.copy, unix_time=time.time())
        self.look()

    # --- answering ---------------------------------------------------------------------------

    def _take_request(self, sender: str, _: SecretRequest) -> Coroutine[Any, Any, Any]:
        async def answer() -> SecretAnswer | Failure:
            return self._answer(sender)

        return answer()

    def _answer(self, peer_id: str) -> SecretAnswer | Failure:
        members = self._members
        if not members.is_allowed(peer_id):
            return SecretAnswer(statements=members.proof_of_removal(peer_id), copy=None)
        copy = self._secrets.copy_for(members.standing, peer_id, members.inviters())
        if copy is None:
            return Failure(code=ErrorCode.NOT_A_MEMBER)
        return SecretAnswer(statements=members.statements_in_force(), copy=copy)

    # --- inside ------------------------------------------------------------------------------

    def _rotation(self, standing: Standing) -> Rotation:
        holders = self._members.holders(standing)
        return self._secrets.rotate(standing, holders, unix_time=time.time())

    def _put_to_use(self) -> None:
        """Let everything use the keyring as it is now, if it changed."""
        keyring, before = self._secrets.keyring, self._in_use
        if keyring == before:
            return
        self._save(keyring)
        self._in_use = keyring
        self._door.use(keyring)
        if keyring.current != before.current:
            logger.info("the swarm's secret is of epoch %d now", keyring.current.epoch)
            self._mesh.use_swarm(keyring.current)
            self._on_new_secret(keyring.current)
