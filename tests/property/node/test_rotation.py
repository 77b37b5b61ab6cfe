"""Changing the secret among members that hear of it late, in any order, or die half way."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.node.rotation import Need, Secrets, is_entitled, lacking
from covey.node.standing import UNSIGNED, Standing, Statement, is_genuine, judge, sign_statement
from covey.store.schema import Delegation, Revocation, Rotation
from covey.transport.identity import Identity, verify
from covey.transport.membership import HONOURED_S, Keyring, Swarm
from covey.transport.sealing import open_sealed, seal_to

KEYS = [Identity(bytes([n] * 32)) for n in range(1, 9)]
FOUNDER = KEYS[0].peer_id
SWARM = Swarm(id="0123456789abcdef", epoch=0, secret=b"s" * 32, founder=FOUNDER)
START = 1_800_000_000.0


checked = functools.cache(verify)


@dataclass(frozen=True)
class Doc:
    """What one author published."""

    number: int = 0
    statements: tuple[Statement, ...] = ()
    admitted: frozenset[str] = frozenset()


@dataclass
class Member:
    """One node: its copy of everybody's documents, and its keyring."""

    identity: Identity
    secrets: Secrets
    docs: dict[str, Doc] = field(default_factory=dict)
    is_running: bool = True

    @property
    def id(self) -> str:
        return self.identity.peer_id

    @property
    def standing(self) -> Standing:
        said = (s for doc in self.docs.values() for s in doc.statements)
        return judge(FOUNDER, (s for s in said if is_genuine(s, swarm=SWARM.id, verify=checked)))

    @property
    def admitted(self) -> set[str]:
        removed = self.standing.removed
        docs = (doc for author, doc in self.docs.items() if author not in removed)
        return {peer for doc in docs for peer in doc.admitted}

    def publish(self, *said: Statement, admitted: str | None = None) -> None:
        doc = self.docs.get(self.id, Doc())
        is_new = any(isinstance(s, Rotation) for s in said)  # an author has one record of it
        kept = tuple(s for s in doc.statements if not (is_new and isinstance(s, Rotation)))
        more = doc.admitted if admitted is None else doc.admitted | {admitted}
        self.docs[self.id] = Doc(doc.number + 1, (*kept, *said), more)

    def sign(self, statement: Statement) -> Statement:
        return sign_statement(statement, swarm=SWARM.id, sign=self.identity.sign)


class World:
    """All members, what travels between them, and who ever learned which secret."""

    def __init__(self, n_members: int) -> None:
        self.now = 0.0
        ring = Keyring(current=SWARM)
        self.members = [Member(key, Secrets(key, ring)) for key in KEYS[:n_members]]
        for member in self.members[1:]:
            self.members[0].publish(admitted=member.id)
        self.knows: dict[bytes, set[str]] = {SWARM.commitment: {m.id for m in self.members}}

    def learned(self, commitment: bytes, *peers: str) -> None:
        self.knows.setdefault(commitment, set()).update(peers)

    # --- what may happen ---------------------------------------------------------------------

    def remove(self, by: Member, target: Member) -> None:
        standing = by.standing
        if target.id in standing.removed or not standing.may_remove(by.id, target.id):
            return
        gone = [target.id, *(p for p, said in standing.removed.items() if said.by == target.id)]
        said = [
            by.sign(Revocation(member=peer, name="x", by=by.id, at=1, signature=UNSIGNED))
            for peer in gone
        ]
        before = [s for doc in by.docs.values() for s in doc.statements]
        rotation = self.rotate(by, judge(FOUNDER, [*before, *said]))
        by.publish(*said, rotation)

    def rotate(self, by: Member, standing: Standing) -> Rotation:
        known = by.standing.rotation
        holders = {m.id for m in self.members} if known is None else {*known.copies, *by.admitted}
        holders |= by.standing.authorities
        rotation = by.secrets.rotate(standing, holders, unix_time=START + self.now)
        assert not set(rotation.copies) & set(rotation.without)
        self.learned(rotation.commitment, by.id, *rotation.copies)
        return rotation

    def allow(self, by: Member, target: Member) -> None:
        if by.id == FOUNDER and target.id not in by.standing.removed:
            said = Delegation(member=target.id, by=by.id, at=1, signature=UNSIGNED)
            by.publish(by.sign(said))

    def admit(self, by: Member, _: Member) -> None:
        if len(self.members) == len(KEYS) or by.id in by.standing.removed:
            return
        key = KEYS[len(self.members)]
        ring = Keyring(current=by.secrets.keyring.current)
        self.members.append(Member(key, Secrets(key, ring)))
        by.publish(admitted=key.peer_id)
        self.learned(ring.current.commitment, key.peer_id)

    def hear(self, hearer: Member, speaker: Member) -> None:
        """Anti-entropy in one direction."""
        if speaker.id in hearer.standing.removed or hearer.id in speaker.standing.removed:
            return
        for author, doc in speaker.docs.items():
            is_new = doc.number > hearer.docs.get(author, Doc()).number
            if is_new and author not in hearer.standing.removed:
                hearer.docs[author] = doc
        for author in hearer.standing.removed.keys() & hearer.docs.keys() - {hearer.id}:
            del hearer.docs[author]

    def look(self, member: Member, _: Member) -> Need:
        standing = member.standing
        need = member.secrets.review(standing, now=self.now, unix_time=START + self.now)
        if need is Need.ROTATE:
            member.publish(self.rotate(member, standing))
        return need

    def ask(self, asker: Member, asked: Member) -> None:
        copy = asked.secrets.copy_for(asked.standing, asker.id, asked.admitted)
        if copy is None:
            return
        assert asker.id not in asked.standing.removed
        rotation = asked.standing.rotation
        if rotation is not None and open_sealed(asker.identity, copy) is not None:
            self.learned(rotation.commitment, asker.id)
        asker.secrets.take(asker.standing, copy, unix_time=START + self.now)

    def restart(self, member: Member, _: Member) -> None:
        ring = Keyring.from_dict(member.secrets.keyring.to_dict())
        member.secrets = Secrets(member.identity, ring)

    def die(self, member: Member, _: Member) -> None:
        member.is_running = False

    def lie(self, liar: Member, target: Member) -> None:
        """Somebody who may not rotate says that it did, and gives everybody a copy."""
        if liar.id in liar.standing.authorities:
            return
        swarm = SWARM.with_secret(50, b"l" * 32)
        copies = {m.id: seal_to(m.id, swarm.secret) for m in self.members}
        forged = Rotation(
            epoch=50,
            by=liar.id,
            at=1,
            commitment=swarm.commitment,
            without=(),
            copies=copies,
            signature=UNSIGNED,
        )
        forgery = msgspec.structs.replace(forged, by=FOUNDER)
        liar.publish(liar.sign(forged), liar.sign(forgery))
        self.learned(swarm.commitment, liar.id, *copies)  # the founder may yet let it

    def botch(self, by: Member, target: Member) -> None:
        """The latest rotation of a revoker holds a wrong copy for somebody."""
        doc = by.docs.get(by.id, Doc())
        said = tuple(
            msgspec.structs.replace(
                s, copies={**s.copies, target.id: seal_to(target.id, b"?" * 32)}
            )
            if isinstance(s, Rotation) and target.id in s.copies
            else s
            for s in doc.statements
        )
        by.docs[by.id] = replace(doc, number=doc.number + 1, statements=said)

    # --- and what must come of it ------------------------------------------------------------

    def settle(self) -> list[Member]:
        """Everybody who runs hears everybody else, for as long as something happens."""
        running = [m for m in self.members if m.is_running]
        for _ in range(8):
            self.now += 30.0
            for hearer in running:
                for speaker in running:
                    self.hear(hearer, speaker)
            for member in running:
                if self.look(member, member) is Need.ASK:
                    for other in running:
                        self.ask(member, other)
        return running


steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "remove",
                "allow",
                "admit",
                "hear",
                "hear",
                "hear",
                "look",
                "ask",
                "restart",
                "die",
                "lie",
                "botch",
            ]
        ),
        st.integers(0, len(KEYS) - 1),
        st.integers(0, len(KEYS) - 1),
    ),
    min_size=4,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 6), st.integers(0, 2), steps)
def test_members_end_with_one_secret_that_no_removed_one_knows(
    n_members: int, n_delegates: int, steps: list[tuple[str, int, int]]
) -> None:
    world = World(n_members)
    for delegate in world.members[1 : 1 + n_delegates]:
        world.allow(world.members[0], delegate)
    for member in world.members:
        world.hear(member, world.members[0])
    for action, one, other in steps:
        world.now += 1.0
        n_actors = 1 + n_delegates if action == "remove" else len(world.members)
        actor = world.members[one % n_actors]
        if actor.is_running:
            getattr(world, action)(actor, world.members[other % len(world.members)])
    running = world.settle()
    gone = {peer for m in running for peer in m.standing.removed}
    deciders = [m for m in running if m.id not in gone and m.id in m.standing.authorities]
    if not deciders:
        return  # a removal is enforced by peer id all the same
    standing = deciders[0].standing
    members = [m for m in running if m.id not in standing.removed]
    assert all(m.standing == standing for m in members)
    if standing.rotation is None:
        assert not standing.removed
        return
    entitled = [m for m in members if is_entitled(standing, m.id, m.admitted)]
    held = {m.secrets.keyring.current.commitment for m in entitled}
    assert held == {standing.rotation.commitment}
    assert not world.knows[standing.rotation.commitment] & standing.removed.keys()


# --- one rule at a time ------------------------------------------------------------------------


def founder_and(n: int) -> World:
    return World(n + 1)


def spread(world: World) -> None:
    world.settle()


def epoch_of(member: Member) -> int:
    return member.secrets.keyring.current.epoch


def test_a_removal_brings_everybody_else_to_the_next_secret() -> None:
    world = founder_and(3)
    founder, gone, *others = world.members
    world.remove(founder, gone)
    spread(world)
    assert [epoch_of(m) for m in (founder, *others)] == [1, 1, 1]
    assert epoch_of(gone) == 0


def test_two_removals_at_once_lead_to_a_secret_without_either() -> None:
    world = founder_and(4)
    founder, deputy, one, two, _ = world.members
    world.allow(founder, deputy)
    spread(world)
    world.remove(founder, one)
    world.remove(deputy, two)  # neither knows of the other's
    spread(world)
    standing = founder.standing
    assert standing.removed.keys() == {one.id, two.id}
    assert standing.rotation is not None
    assert set(standing.rotation.without) == {one.id, two.id}
    assert epoch_of(founder) == epoch_of(deputy) == 2
    assert not world.knows[standing.rotation.commitment] & {one.id, two.id}


def test_a_delegate_takes_over_in_its_turn_when_the_founder_is_gone() -> None:
    world = founder_and(4)
    founder, deputy, one, two, last = world.members
    world.allow(founder, deputy)
    spread(world)
    world.remove(founder, one)
    world.remove(deputy, two)
    for member in (deputy, last):
        world.hear(member, founder)
        world.hear(member, deputy)
    world.die(founder, founder)
    assert world.look(deputy, deputy) is Need.NOTHING  # the founder's turn
    world.now += 10.0
    assert world.look(deputy, deputy) is Need.ROTATE
    spread(world)
    assert epoch_of(deputy) == epoch_of(last) == 2


def test_an_old_rotation_played_again_changes_nothing() -> None:
    world = founder_and(3)
    founder, one, two, last = world.members
    world.remove(founder, one)
    old = founder.standing.rotation
    spread(world)
    world.remove(founder, two)
    spread(world)
    assert old is not None
    assert epoch_of(last) == 2
    last.docs = {FOUNDER: Doc(9, (old,))}  # all it sees, after it lost its store
    assert world.look(last, last) is Need.NOTHING
    assert epoch_of(last) == 2


def test_a_wrongly_sealed_copy_is_not_adopted_and_a_right_one_is_asked_for() -> None:
    world = founder_and(3)
    founder, gone, unlucky, lucky = world.members
    world.remove(founder, gone)
    world.botch(founder, unlucky)
    for member in (unlucky, lucky):
        world.hear(member, founder)
    assert world.look(lucky, lucky) is Need.NOTHING
    assert world.look(unlucky, unlucky) is Need.ASK
    assert epoch_of(unlucky) == 0
    world.ask(unlucky, lucky)
    assert epoch_of(unlucky) == 1


def test_who_was_let_in_while_the_secret_changed_is_entitled_to_the_new_one() -> None:
    world = founder_and(3)
    founder, gone, inviter, _ = world.members
    world.remove(founder, gone)
    world.admit(inviter, inviter)  # which has not heard of it
    joiner = world.members[-1]
    assert epoch_of(joiner) == 0
    spread(world)
    assert epoch_of(joiner) == 1


def test_whom_nobody_let_in_is_given_nothing() -> None:
    world = founder_and(2)
    founder, gone, _ = world.members
    world.remove(founder, gone)
    spread(world)
    made_up = KEYS[-1].peer_id  # by the removed one, with the secret that it knew
    assert founder.secrets.copy_for(founder.standing, made_up, founder.admitted) is None
    assert founder.secrets.copy_for(founder.standing, gone.id, founder.admitted) is None


def test_a_delegate_that_was_removed_cannot_use_the_numbers_up() -> None:
    world = founder_and(2)
    founder, deputy, last = world.members
    world.allow(founder, deputy)
    spread(world)
    swarm = SWARM.with_secret(1 << 31, b"h" * 32)
    huge = Rotation(
        epoch=swarm.epoch,
        by=deputy.id,
        at=1,
        commitment=swarm.commitment,
        without=(),
        copies={m.id: seal_to(m.id, swarm.secret) for m in world.members},
        signature=UNSIGNED,
    )
    deputy.publish(deputy.sign(huge))
    spread(world)
    assert epoch_of(founder) == epoch_of(last) == 1 << 31
    world.remove(founder, deputy)
    spread(world)
    assert epoch_of(founder) == epoch_of(last) == 1


@pytest.mark.parametrize(("away_s", "opens"), [(HONOURED_S - 1, True), (HONOURED_S, False)])
def test_an_earlier_secret_is_honoured_for_thirty_days(away_s: float, *, opens: bool) -> None:
    world = founder_and(2)
    founder, gone, _ = world.members
    world.remove(founder, gone)
    ring = founder.secrets.keyring
    assert bool(ring.honoured(START + away_s)) is opens


def test_a_secret_from_before_a_lost_store_is_kept() -> None:
    world = founder_and(2)
    founder, gone, other = world.members
    world.remove(founder, gone)
    spread(world)
    assert lacking(other.secrets.keyring, judge(FOUNDER, ())) is None
