"""Who is a member now, by what the store says, and the end of those who are not.

A removal is a signed statement in its author's document. As soon as it is applied here, the
member's links are cut, its documents are forgotten and nothing of it is taken in again. What the
statements mean is `standing.py`'s; this module acts on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from covey.store.awareness import Awareness
from covey.store.errors import RecordMalformed
from covey.store.replica import Replica
from covey.store.schema import (
    MAX_REMOVED,
    Admission,
    Delegation,
    MemberCard,
    Record,
    Revocation,
    Rotation,
)
from covey.store.views import Views
from covey.transport.errors import TransportError
from covey.transport.identity import Identity, verify
from covey.transport.mesh import Mesh
from covey.transport.messages import MembershipNotice

from .errors import InvalidRequest, NotAllowed
from .standing import (
    UNSIGNED,
    S,
    Standing,
    Statement,
    decode_statement,
    encode_statement,
    is_genuine,
    judge,
    sign_statement,
)

logger = logging.getLogger(__name__)

LAST_WORDS_S = 0.2  # from telling a removed member why to cutting its link
MIN_SUFFIX_CHARS = 4
MAX_ADMISSIONS = 256  # of ours that are remembered
MAX_HEARD = 1024  # statements that came outside the store
MAX_GENUINE = 4096  # remembered; beyond that signatures are checked again
_PREFIXES = (Delegation.prefix, Revocation.prefix, Rotation.prefix)


class Members:
    """The members of the swarm as this node sees them.

    `on_removed(revocation)` is called on the event loop, once for each removal that comes to
    force, soon after it did; that of this very node included. `on_standing()` is called then too,
    and for every other change of the standing.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        swarm: str,
        founder: str,
        replica: Replica,
        views: Views,
        awareness: Awareness,
        mesh: Mesh,
        on_removed: Callable[[Revocation], None],
        on_standing: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._own = identity.peer_id
        self._swarm = swarm
        self._replica = replica
        self._views = views
        self._awareness = awareness
        self._mesh = mesh
        self._on_removed = on_removed
        self._on_standing = on_standing
        self._loop = asyncio.get_running_loop()
        self._genuine: set[bytes] = set()  # statements whose signature was checked, encoded
        self._heard: dict[bytes, Statement] = {}  # outside the store
        self.last_seen: dict[str, float] = {}  # unix time
        self.standing = judge(founder, ())
        replica.subscribe(self._changed)
        self._look()

    def is_allowed(self, peer_id: str) -> bool:
        """Whether the peer may have anything to do with us: it was not removed."""
        return bool(peer_id) and peer_id not in self.standing.removed

    def saw(self, live: Iterable[str], *, unix_time: float) -> None:
        """Note that members are alive now."""
        for peer_id in live:
            self.last_seen[peer_id] = unix_time

    # --- saying ------------------------------------------------------------------------------

    def remove(
        self, text: str, rotate: Callable[[Standing], Rotation], *, with_invited: bool = False
    ) -> list[Revocation]:
        """Remove a member for good; removals and a new secret, or neither, are published.

        Args:
            text: name, peer id or the end of one.
            rotate: makes the rotation that goes with the removal, for the standing it leads to.
            with_invited: remove those too whom nobody else let in, and whom they did.

        Raises:
            InvalidRequest: nobody, or more than one, is called so; or it is this node.
            NotAllowed: this node may not remove it.
        """
        peer_id = self.find(text)
        standing = self.standing
        if peer_id == self._own:
            raise InvalidRequest("member", "a node cannot remove itself: stop it with `covey stop`")
        if peer_id in standing.removed:
            raise InvalidRequest("member", f"{text} was removed before")
        if not standing.may_remove(self._own, peer_id):
            raise NotAllowed(self._why_not(peer_id))
        gone = [peer_id, *(self.invited_by(peer_id) if with_invited else ())]
        removals = [self._revocation(peer, self.name_of(peer)) for peer in gone]
        again = [
            self._revocation(said.member, said.name)
            for said in standing.removed.values()
            if said.by in gone
        ]
        if len(standing.removed) + len(removals) > MAX_REMOVED:
            raise NotAllowed(f"no more than {MAX_REMOVED} can be removed: found a new swarm")
        after = judge(standing.founder, [*self._statements(), *removals, *again])
        self.publish([*removals, *again, rotate(after)])
        return removals

    def allow(self, text: str) -> Delegation:
        """Let a member remove others; errors as for `remove`."""
        if self._own != self.standing.founder:
            raise NotAllowed(f"only the founder, {self.name_of(self.standing.founder)}, may do so")
        peer_id = self.find(text)
        if not self.is_allowed(peer_id) or peer_id == self._own:
            raise InvalidRequest("member", f"{text} is the founder, or was removed")
        delegation = self._signed(
            Delegation(member=peer_id, by=self._own, at=int(time.time()), signature=UNSIGNED)
        )
        self.publish([delegation])
        return delegation

    def admitted(self, peer_id: str, *, epoch: int) -> None:
        """Say that we let a machine in by an invite.

        Heads that live for one question come in by the hundred: the oldest that is gone makes way.
        """
        said = [
            (value.get("at"), key, value.get("member"))
            for author, key, value in self._replica.items(Admission.prefix)
            if author == self._own
        ]
        live = self._awareness.live(self._loop.time())
        admission = Admission(member=peer_id, at=int(time.time()), epoch=epoch)
        with self._replica.edit() as edit:
            if len(said) >= MAX_ADMISSIONS:
                gone = [key for _, key, member in sorted(said) if member not in live]
                for key in gone[:1]:
                    edit.delete(key)
            edit.set(admission.key, admission.to_value())

    def publish(self, records: Iterable[Record]) -> None:
        """Write records into our document, in one envelope; raises StoreError."""
        with self._replica.edit() as edit:
            for record in records:
                edit.set(record.key, record.to_value())

    # --- names -------------------------------------------------------------------------------

    def known(self) -> dict[str, MemberCard | None]:
        """Every member that is known of and was not removed, with its card if it has one."""
        known: dict[str, MemberCard | None] = dict.fromkeys(self.inviters())
        known.update({self.standing.founder: None, self._own: None})
        known.update(self._views.members())
        return {peer: card for peer, card in sorted(known.items()) if self.is_allowed(peer)}

    def inviters(self) -> dict[str, set[str]]:
        """Who let whom in, by what members say of it."""
        inviters: dict[str, set[str]] = {}
        for entry in self._views.admissions():
            inviters.setdefault(entry.record.member, set()).add(entry.author)
        return inviters

    def invited_by(self, peer_id: str) -> list[str]:
        """Members that are in only by its word, or by that of such; whom we may remove."""
        inviters, cards = self.inviters(), self._views.members()
        found = {peer_id}
        while more := {m for m in cards.keys() - found if inviters.get(m, {""}) <= found}:
            found |= more
        return sorted(
            peer for peer in found - {peer_id} if self.standing.may_remove(self._own, peer)
        )

    def holders(self, standing: Standing) -> set[str]:
        """Who is to have the next secret: whoever had the present one sealed, or was let in.

        Before the first rotation nobody had it sealed: there every member counts. Later on one
        that nobody let in does not, since a removed member could make up any number of those; nor
        does one that it alone says to have let in, and that nobody has seen.
        """
        cards, rotation = self._views.members(), self.standing.rotation
        admitted = {
            peer
            for peer, by in self.inviters().items()
            if peer in cards or not by <= standing.removed.keys()
        }
        had_it = rotation.copies if rotation is not None else cards
        return {*had_it, *admitted, *standing.authorities, self._own}

    def name_of(self, peer_id: str) -> str:
        """What a peer calls itself, else the end of its id."""
        card = self._views.members().get(peer_id)
        revocation = self.standing.removed.get(peer_id)
        if card is not None:
            return card.name
        return revocation.name if revocation is not None else peer_id[-8:]

    def find(self, text: str) -> str:
        """The peer id of the member called so; raises InvalidRequest."""
        known = {**dict.fromkeys(self.standing.removed), **self.known()}
        matches = [text] if text in known else []
        matches = matches or [peer for peer in known if self.name_of(peer) == text]
        if not matches and len(text) >= MIN_SUFFIX_CHARS:
            matches = [peer for peer in known if peer.endswith(text)]
        if not matches:
            names = ", ".join(sorted(self.name_of(peer) for peer in self.known()))
            raise InvalidRequest("member", f"nobody is called {text!r}; there are: {names}")
        if len(matches) > 1:
            ids = ", ".join(peer[-8:] for peer in matches)
            raise InvalidRequest(
                "member", f"{text!r} may be any of {ids}: give more of its peer id"
            )
        return matches[0]

    # --- hearing -----------------------------------------------------------------------------

    def take_notice(self, statements: Sequence[bytes]) -> None:
        """Take in statements that came outside the store, from anybody; false ones are ignored."""
        for data in statements:
            try:
                statement = decode_statement(data)
            except RecordMalformed as error:
                logger.debug("a statement is ignored: %s", error)
                continue
            is_believed = statement.by in self._authors() and self._is_genuine(statement)
            if is_believed and len(self._heard) < MAX_HEARD:
                self._heard[data] = statement
        self._look()

    def proof_of_removal(self, peer_id: str) -> list[bytes]:
        """What a removed peer needs in order to believe it."""
        revocation = self.standing.removed[peer_id]
        proof: list[Statement] = [
            said
            for said in self._statements()
            if isinstance(said, Delegation) and said.member == revocation.by
        ]
        return [encode_statement(said) for said in (*proof, revocation)]

    def statements_in_force(self) -> list[bytes]:
        """What somebody who was away needs to know, in the order to take it in."""
        standing = self.standing
        in_force: list[Statement] = [*standing.removed.values()]
        if standing.rotation is not None:
            in_force.append(standing.rotation)
        authors = {said.by for said in in_force}
        delegations: list[Statement] = [
            said
            for said in self._statements()
            if isinstance(said, Delegation) and said.member in authors
        ]
        return [encode_statement(said) for said in (*delegations, *in_force)]

    def _changed(self, _author: str, keys: frozenset[str]) -> None:
        if any(key.startswith(_PREFIXES) for key in keys):
            self._look()

    def _look(self) -> None:
        """Judge anew; what changed follows once the store is done with what it is doing."""
        before = self.standing
        self.standing = judge(before.founder, self._statements())
        if self.standing != before:
            self._loop.call_soon(self._on_standing)
        for peer_id, revocation in self.standing.removed.items():
            if peer_id not in before.removed:
                self._loop.call_soon(self._cut_off, revocation)

    def _statements(self) -> Iterator[Statement]:
        """The genuine ones of those who may be believed; nobody else's signature is looked at."""
        authors = self._authors()
        for statement in (*self._views.statements(), *self._heard.values()):
            if statement.by in authors and self._is_genuine(statement):
                yield statement

    def _authors(self) -> set[str]:
        founder = self.standing.founder
        return {founder} | {
            said.member
            for said in (*self._views.statements(), *self._heard.values())
            if isinstance(said, Delegation) and said.by == founder and self._is_genuine(said)
        }

    def _is_genuine(self, statement: Statement) -> bool:
        encoded = encode_statement(statement)
        if encoded in self._genuine:
            return True
        if not is_genuine(statement, swarm=self._swarm, verify=verify):
            return False
        if len(self._genuine) >= MAX_GENUINE:
            self._genuine.clear()
        self._genuine.add(encoded)
        return True

    # --- enforcing ---------------------------------------------------------------------------

    def _cut_off(self, revocation: Revocation) -> None:
        peer_id = revocation.member
        if self.is_allowed(peer_id):
            return  # whoever said so was removed itself
        logger.warning(
            "%s was removed from the swarm by %s",
            revocation.name,
            self.name_of(revocation.by),
            extra={"peer": peer_id[-8:]},
        )
        if peer_id != self._own:
            self._tell(peer_id)
            self._loop.call_later(LAST_WORDS_S, self._mesh.drop, peer_id)
            self._awareness.forget(peer_id)
            self._replica.forget(peer_id)
        self._on_removed(revocation)

    def _tell(self, removed: str) -> None:
        """Tell the removed one why, and at once every member that we have a link to.

        The store would do the latter too, but a hello may be lost, and its repair takes seconds.
        """
        proof, rotation = self.proof_of_removal(removed), self.standing.rotation
        news = [*proof, encode_statement(rotation)] if rotation is not None else proof
        for peer_id, link in self._mesh.peers.items():
            if peer_id == removed or self.is_allowed(peer_id):
                said = proof if peer_id == removed else news
                try:
                    link.post(MembershipNotice(statements=said))
                except TransportError:
                    logger.debug("the link ended before", extra={"peer": peer_id[-8:]})

    # --- inside ------------------------------------------------------------------------------

    def _revocation(self, peer_id: str, name: str) -> Revocation:
        at = int(time.time())
        return self._signed(
            Revocation(member=peer_id, name=name, by=self._own, at=at, signature=UNSIGNED)
        )

    def _signed(self, statement: S) -> S:
        return sign_statement(statement, swarm=self._swarm, sign=self._identity.sign)

    def _why_not(self, peer_id: str) -> str:
        standing = self.standing
        if peer_id == standing.founder:
            return "the founder of the swarm cannot be removed"
        if self._own in standing.delegates:
            return "only the founder may remove a member that may remove others itself"
        names = ", ".join(self.name_of(peer) for peer in sorted(standing.authorities))
        return f"this node may not remove members; ask for it at {names}"
