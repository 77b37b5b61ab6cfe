"""How a node comes to be in a swarm, and what it tells those who join."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from covey.node.errors import ConfigError, RemovedFromSwarm
from covey.node.home import Home
from covey.node.membership import (
    INVITES_FILE,
    MAX_WELCOMED,
    SWARM_FILE,
    enter,
    entry_of,
    load_invites,
    make_welcome,
    save_invites,
    save_keyring,
    save_removal,
)
from covey.store.schema import MemberCard
from covey.transport.codec import decode_frame, encode_frame
from covey.transport.errors import InviteInvalid
from covey.transport.frame import Frame
from covey.transport.identity import Identity
from covey.transport.invite import InviteBook
from covey.transport.membership import Keyring, Swarm
from covey.transport.mesh import Mesh
from support.node_core import PEERS

ME = Identity(bytes([1] * 32))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "home") as opened:
        yield opened


def invite_to(swarm: str, inviter: str, *, book: InviteBook | None = None) -> str:
    book = book or InviteBook()
    invite = book.issue(
        swarm=swarm,
        inviter=inviter,
        addresses=["127.0.0.1:1"],
        valid_s=60,
        uses=1,
        unix_time=time.time(),
    )
    return str(invite)


async def test_a_founder_finds_its_swarm_again(home: Home) -> None:
    founded = await enter(home, ME, invite=None, may_found=True)
    again = await enter(home, ME, invite=None, may_found=False)
    assert again.swarm == founded.swarm
    assert founded.swarm.founder == ME.peer_id


async def test_a_home_without_a_swarm_needs_an_invite(home: Home) -> None:
    with pytest.raises(ConfigError, match="is in no swarm: give the invite"):
        await enter(home, ME, invite=None, may_found=False)
    assert home.load(SWARM_FILE) is None


async def test_an_invite_to_the_swarm_it_is_in_changes_nothing(home: Home) -> None:
    mine = (await enter(home, ME, invite=None, may_found=True)).swarm
    invite = invite_to(mine.id, PEERS[1])
    assert (await enter(home, ME, invite=invite, may_found=False)).swarm == mine


async def test_a_member_that_was_away_too_long_comes_back_with_an_invite(home: Home) -> None:
    inviter = Identity(bytes([2] * 32))
    old = Swarm.create(inviter.peer_id)
    save_keyring(home, Keyring(current=old))
    now = old.next_epoch().next_epoch()
    book = InviteBook()
    mesh = Mesh(
        inviter,
        now,
        handler=lambda _, __: None,
        invites=book,
        welcome=lambda _, __: make_welcome(now, []),
    )
    async with mesh:
        invite = book.issue(
            swarm=old.id,
            inviter=inviter.peer_id,
            addresses=mesh.addresses,
            valid_s=60,
            uses=1,
            unix_time=time.time(),
        )
        entry = await enter(home, ME, invite=str(invite), may_found=False)
    assert entry.swarm == now
    assert [each.swarm for each in entry.keyring.old] == [old]
    again = await enter(home, ME, invite=str(invite), may_found=False)  # the inviter is gone
    assert again.keyring == entry.keyring


async def test_a_removed_node_is_refused_by_its_own_home(home: Home) -> None:
    await enter(home, ME, invite=None, may_found=True)
    said = save_removal(home, "kitchen")
    for invite in (None, invite_to("0123456789abcdef", PEERS[1])):
        with pytest.raises(RemovedFromSwarm, match="removed from the swarm by kitchen") as caught:
            await enter(home, ME, invite=invite, may_found=True)
        assert str(caught.value) == str(said)
        assert str(home.path) in str(said)


async def test_an_invite_to_another_swarm_needs_another_home(home: Home) -> None:
    mine = (await enter(home, ME, invite=None, may_found=True)).swarm
    with pytest.raises(ConfigError, match="another swarm"):
        await enter(home, ME, invite=invite_to("0123456789abcdef", PEERS[1]), may_found=False)
    assert (await enter(home, ME, invite=None, may_found=False)).swarm == mine


async def test_its_own_invite_opens_nothing(home: Home) -> None:
    with pytest.raises(InviteInvalid, match="this very node"):
        await enter(home, ME, invite=invite_to("0123456789abcdef", ME.peer_id), may_found=False)
    assert home.load(SWARM_FILE) is None


@pytest.mark.parametrize(
    "state", [{}, {"swarm": 7}, {"swarm": "0123456789abcdef", "epoch": -1, "secret": "AA=="}]
)
async def test_a_damaged_swarm_file_says_what_to_do(home: Home, state: dict[str, object]) -> None:
    home.save(SWARM_FILE, state)
    with pytest.raises(ConfigError, match=r"swarm\.json is damaged: remove it"):
        await enter(home, ME, invite=None, may_found=True)
    assert home.load(SWARM_FILE) == state  # never replaced by a swarm of one


def test_invites_outlive_a_restart(home: Home) -> None:
    assert load_invites(home).to_dict() == InviteBook().to_dict()
    book = InviteBook()
    invite_to("0123456789abcdef", ME.peer_id, book=book)
    save_invites(home, book)
    assert load_invites(home).to_dict() == book.to_dict() != InviteBook().to_dict()


@pytest.mark.parametrize("state", [{}, {"invites": 7}, {"invites": [{"token": None}]}])
def test_a_damaged_invite_file_says_what_to_do(home: Home, state: dict[str, object]) -> None:
    home.save(INVITES_FILE, state)
    with pytest.raises(ConfigError, match=r"invites\.json is damaged: remove it"):
        load_invites(home)


def card(**changes: object) -> MemberCard:
    value: dict[str, object] = {
        "peer_id": PEERS[1],
        "name": "kitchen",
        "addresses": ["10.0.0.1:1"],
        "control_addresses": ["/ip4/10.0.0.1/tcp/1"],
        "models": [],
        "max_blocks": None,
        "memory_bytes": None,
        "version": "0",
        "started_at": 0.0,
    }
    return MemberCard.from_value({**value, **changes})


@pytest.mark.parametrize(
    "published",
    [
        card(),
        card(addresses=[f"10.0.0.1:{n}" for n in range(1, 33)]),
        card(control_addresses=[f"/ip4/10.0.0.{n}" for n in range(32)]),
        card(control_addresses=["x", "xy"] * 16),
        card(control_addresses=["x" * 256] * 32),
    ],
)
def test_no_card_of_a_member_can_spoil_the_welcome(published: MemberCard) -> None:
    # What a card may hold and a frame may not would lock every joiner out.
    welcome = make_welcome(Swarm.create(ME.peer_id), [entry_of(published)])
    header, _ = encode_frame(Frame(message=welcome))
    assert decode_frame(header, b"").message == welcome


def test_usable_addresses_are_passed_on() -> None:
    entry = entry_of(card(control_addresses=["x", "/ip4/10.0.0.1/tcp/1"]))
    assert entry.addresses == ["10.0.0.1:1"]
    assert entry.control_addresses == ["/ip4/10.0.0.1/tcp/1"]


def test_a_welcome_names_a_bounded_number_of_members() -> None:
    welcome = make_welcome(Swarm.create(ME.peer_id), [entry_of(card())] * (MAX_WELCOMED + 1))
    assert len(welcome.members) == MAX_WELCOMED
