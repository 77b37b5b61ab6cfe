"""Removal and change of the secret among real meshes on 127.0.0.1, many in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from covey.node import epochs, members
from covey.node.errors import InvalidRequest, NotAllowed
from covey.node.standing import encode_statement
from covey.store.errors import UpdateRejected
from covey.store.schema import Revocation, Rotation
from covey.transport.errors import ErrorCode, RefusedByPeer, TransportError
from covey.transport.identity import Identity
from covey.transport.membership import Keyring, Swarm
from covey.transport.messages import MembershipNotice
from covey.transport.renewal import renew
from support.members import MemberNode, running, until

pytestmark = pytest.mark.network

N_MEMBERS = 10
CUT_OFF_S = 5.0


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def swarm_of(stack: AsyncExitStack, n: int, *, disks: Path | None = None) -> list[MemberNode]:
    """Members that the founder, the first, let in; all linked to it and in a ring."""
    keys = [Identity.generate() for _ in range(n)]
    ring = Keyring(current=Swarm.create(keys[0].peer_id))
    nodes = []
    for idx, key in enumerate(keys):
        disk = disks / f"{idx}.sqlite" if disks is not None else None
        nodes.append(MemberNode(key, ring, name=f"node-{idx}", disk=disk))
        await stack.enter_async_context(running(nodes[-1]))
    for idx, node in enumerate(nodes):
        nodes[0].members.admitted(node.id, epoch=0)
        for other in {nodes[0], nodes[(idx + 1) % n]} - {node}:
            await node.dial(other)
    await until(lambda: all(len(node.views.members()) == n for node in nodes))
    return nodes


async def test_a_removed_member_is_cut_off_every_link_within_seconds(
    stack: AsyncExitStack,
) -> None:
    founder, gone, *others = nodes = await swarm_of(stack, N_MEMBERS)
    for other in others:
        await gone.dial(other)
    untouched = {
        (node.id, peer_id): peer
        for node in nodes
        for peer_id, peer in node.mesh.peers.items()
        if gone.id not in (node.id, peer_id)
    }
    began_at = time.monotonic()
    founder.epochs.remove("node-1")
    await until(lambda: not any(gone.id in node.mesh.peers for node in nodes))
    assert time.monotonic() - began_at < CUT_OFF_S
    await until(lambda: all(node.epoch == 1 for node in (founder, *others)))
    assert time.monotonic() - began_at < CUT_OFF_S
    # Everybody else kept every link, and went on to the new secret.
    for (node_id, peer_id), peer in untouched.items():
        node = next(node for node in nodes if node.id == node_id)
        assert node.mesh.peers[peer_id] is peer
    revocation = await gone.removals.get()
    assert (revocation.member, revocation.by) == (gone.id, founder.id)
    assert gone.epoch == 0
    assert all(gone.id not in node.replica.authors() for node in (founder, *others))


async def test_its_documents_beats_and_links_are_refused_from_then_on(
    stack: AsyncExitStack,
) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    envelopes: list[bytes] = []
    gone.replica.on_local(envelopes.append)
    founder.epochs.remove("node-1")
    await until(lambda: other.epoch == 1 and not gone.mesh.peers)
    gone.publish_card()
    gone.replica.set("profile/device", {"kind": "device", "value": {}, "peer": None})
    for node in (founder, other):
        for envelope in envelopes:
            with pytest.raises(UpdateRejected, match="no member"):
                node.replica.apply(envelope)
        with pytest.raises(UpdateRejected, match="no member"):
            node.awareness.receive(gone.awareness.beat(0.0, {}, ttl_s=5), 0.0)
        with pytest.raises(TransportError):
            await gone.dial(node)
        with pytest.raises(TransportError):
            await node.dial(gone)
        assert gone.id not in node.mesh.peers
        assert gone.id not in node.members.known()


async def test_a_removed_member_is_told_why_when_it_comes_back(stack: AsyncExitStack) -> None:
    nodes = await swarm_of(stack, 3)
    founder, other = nodes[0], nodes[2]
    async with AsyncExitStack() as while_away:
        away = MemberNode(Identity.generate(), nodes[0].saved, name="away")
        founder.members.admitted(away.id, epoch=0)
        await while_away.enter_async_context(running(away))
        await away.dial(founder)
        await until(lambda: away.id in founder.views.members())
    founder.epochs.remove("away")
    await until(lambda: other.epoch == 1)
    back = MemberNode(away.identity, away.saved, name="away")
    await stack.enter_async_context(running(back))
    with pytest.raises(TransportError):
        await back.dial(other)
    revocation = await asyncio.wait_for(back.removals.get(), 5)
    assert (revocation.name, revocation.by) == ("away", founder.id)
    assert back.epoch == 0


async def test_a_member_that_was_away_gets_in_by_any_member(stack: AsyncExitStack) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    async with AsyncExitStack() as while_away:
        away = MemberNode(Identity.generate(), founder.saved, name="away")
        founder.members.admitted(away.id, epoch=0)
        await while_away.enter_async_context(running(away))
        await away.dial(other)
        await until(lambda: away.id in founder.views.members())
    founder.epochs.remove(gone.id)
    await until(lambda: other.epoch == 1)
    await founder.mesh.aclose()  # the founder is away now
    back = MemberNode(away.identity, away.saved, name="away")
    await stack.enter_async_context(running(back))
    with suppress(TransportError):
        await back.dial(other)
    await until(lambda: back.epoch == 1)
    assert (await back.dial(other)).peer_id == other.id
    await until(lambda: not back.members.is_allowed(gone.id))


async def test_a_removal_survives_a_restart_of_everybody(
    stack: AsyncExitStack, tmp_path: Path
) -> None:
    async with AsyncExitStack() as first_life:
        founder, gone, other = await swarm_of(first_life, 3, disks=tmp_path)
        founder.epochs.remove("node-1")
        await until(lambda: other.epoch == 1)
    again = MemberNode(other.identity, other.saved, name="node-2", disk=tmp_path / "2.sqlite")
    await stack.enter_async_context(running(again))
    assert again.epoch == 1
    assert not again.members.is_allowed(gone.id)
    assert again.members.name_of(gone.id) == "node-1"


async def test_who_holds_the_old_secret_gets_nothing_but_that_one_answer(
    stack: AsyncExitStack,
) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    old = founder.epochs.swarm
    founder.epochs.remove("node-1")
    await until(lambda: other.epoch == 1)
    await until(lambda: gone.id not in other.mesh.peers)
    newcomer = MemberNode(Identity.generate(), Keyring(current=old), name="gone, renamed")
    await stack.enter_async_context(running(newcomer))
    with pytest.raises(RefusedByPeer) as caught:
        await newcomer.dial(other)
    assert caught.value.code is ErrorCode.EPOCH_OVER
    with pytest.raises(RefusedByPeer) as caught:
        await renew(newcomer.identity, old, other.id, other.mesh.addresses)
    assert caught.value.code is ErrorCode.NOT_A_MEMBER
    assert newcomer.epoch == 0
    assert newcomer.id not in other.mesh.peers
    assert newcomer.id not in other.members.known()


async def test_a_delegate_removes_and_a_plain_member_does_not(stack: AsyncExitStack) -> None:
    founder, deputy, gone, plain = await swarm_of(stack, 4)
    with pytest.raises(NotAllowed, match="ask for it at node-0"):
        plain.epochs.remove("node-2")
    with pytest.raises(NotAllowed, match="only the founder"):
        plain.members.allow("node-1")
    founder.members.allow("node-1")
    everybody = (founder, deputy, gone, plain)
    await until(lambda: all(deputy.id in node.members.standing.delegates for node in everybody))
    with pytest.raises(NotAllowed, match="founder of the swarm"):
        deputy.epochs.remove("node-0")
    deputy.epochs.remove("node-2")
    await until(lambda: founder.epoch == plain.epoch == 1)
    assert (await gone.removals.get()).by == deputy.id
    # The founder removes the deputy, whose removal stands all the same.
    founder.epochs.remove("node-1")
    await until(lambda: plain.epoch == 2)
    assert plain.members.standing.removed.keys() == {deputy.id, gone.id}


async def test_two_that_remove_at_once_end_with_one_secret(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "LOOK_S", 0.1)
    founder, deputy, one, two, other = await swarm_of(stack, 5)
    founder.members.allow("node-1")
    await until(lambda: deputy.id in deputy.members.standing.delegates)
    founder.epochs.remove("node-2")
    deputy.epochs.remove("node-3")
    secrets = [node.epochs for node in (founder, deputy, other)]
    await until(lambda: all(each.swarm.epoch == 2 for each in secrets))
    assert len({each.swarm.secret for each in secrets}) == 1
    assert other.members.standing.removed.keys() == {one.id, two.id}


async def test_a_member_cannot_rotate_or_remove_by_writing_records(stack: AsyncExitStack) -> None:
    founder, liar, other = await swarm_of(stack, 3)
    signature = liar.identity.sign(b"anything")
    removal = Revocation(member=other.id, name="x", by=liar.id, at=1, signature=signature)
    rotation = Rotation(
        epoch=9,
        by=liar.id,
        at=1,
        commitment=bytes(32),
        without=(),
        copies={},
        signature=signature,
    )
    liar.members.publish([removal, rotation])
    await until(lambda: other.replica.get(liar.id, rotation.key) is not None)
    await until(lambda: founder.replica.get(liar.id, rotation.key) is not None)
    assert founder.epoch == other.epoch == 0
    assert founder.members.is_allowed(other.id)


async def test_names_are_found_and_doubtful_ones_refused(stack: AsyncExitStack) -> None:
    founder, other = await swarm_of(stack, 2)
    find = founder.members.find
    assert find("node-1") == find(other.id) == find(other.id[-8:]) == other.id
    for text in ("nobody", other.id[-3:], "", other.id[:8]):
        with pytest.raises(InvalidRequest, match="there are: node-0, node-1"):
            find(text)
    with pytest.raises(InvalidRequest, match="covey stop"):
        founder.epochs.remove("node-0")
    other.name = "node-0"
    other.publish_card()
    await until(lambda: founder.members.name_of(other.id) == "node-0")
    with pytest.raises(InvalidRequest, match="give more of its peer id"):
        find("node-0")
    founder.epochs.remove(other.id[-8:])
    with pytest.raises(InvalidRequest, match="was removed before"):
        founder.epochs.remove(other.id)


async def test_who_is_in_only_by_a_removed_members_word(stack: AsyncExitStack) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    guest = MemberNode(Identity.generate(), founder.saved, name="guest")
    await stack.enter_async_context(running(guest))
    await guest.dial(founder)
    made_up = Identity.generate().peer_id  # nobody has ever seen it
    gone.members.admitted(guest.id, epoch=0)
    gone.members.admitted(made_up, epoch=0)
    await until(lambda: made_up in founder.members.inviters() and guest.id in other.members.known())
    founder.epochs.remove("node-1")
    await until(lambda: guest.epoch == other.epoch == 1)  # it stays
    rotation = founder.members.standing.rotation
    assert rotation is not None
    assert made_up not in rotation.copies
    assert made_up not in other.members.known()


async def test_those_it_invited_may_go_with_it(stack: AsyncExitStack) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    guests = [MemberNode(Identity.generate(), founder.saved, name=f"guest-{n}") for n in (0, 1)]
    for guest in guests:
        await stack.enter_async_context(running(guest))
        await guest.dial(founder)
    gone.members.admitted(guests[0].id, epoch=0)
    guests[0].members.admitted(guests[1].id, epoch=0)
    await until(lambda: {guest.id for guest in guests} <= founder.members.inviters().keys())
    await until(lambda: len(founder.views.members()) == 5)
    removals = founder.epochs.remove("node-1", with_invited=True)
    assert {said.name for said in removals} == {"node-1", "guest-0", "guest-1"}
    await until(lambda: other.epoch == 1)
    assert other.members.known().keys() == {founder.id, other.id}


async def test_a_removal_travels_without_the_store(stack: AsyncExitStack) -> None:
    founder, gone, other = await swarm_of(stack, 3)
    for node in (founder, other):
        node.gossip._sessions.clear()  # no hello is ever sent again
    founder.epochs.remove("node-1")
    await until(lambda: gone.id not in other.mesh.peers, CUT_OFF_S)
    await until(lambda: other.epoch == 1)  # it asked, over the link that stands
    assert (await asyncio.wait_for(gone.removals.get(), 5)).by == founder.id


async def test_false_statements_are_not_even_kept(stack: AsyncExitStack) -> None:
    founder, liar, other = await swarm_of(stack, 3)
    signature = liar.identity.sign(b"anything")
    forged = [
        encode_statement(Revocation(member=other.id, name="x", by=by, at=n, signature=signature))
        for n in range(50)
        for by in (founder.id, liar.id)
    ]
    peer = liar.mesh.peers[founder.id]
    await peer.send(MembershipNotice(statements=[*forged, b"", b"x", bytes(1000)]))
    await peer.ping(timeout_s=5)
    assert founder.members.is_allowed(other.id)
    assert not founder.members._heard


async def test_those_let_in_are_remembered_up_to_a_bound(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "MAX_ADMISSIONS", 4)
    founder, other = await swarm_of(stack, 2)
    await until(lambda: other.id in founder.awareness.live(asyncio.get_running_loop().time()))
    for _ in range(10):
        founder.members.admitted(Identity.generate().peer_id, epoch=0)
    assert len(founder.members.inviters()) == 4
    assert other.id in founder.members.inviters()  # which is alive
