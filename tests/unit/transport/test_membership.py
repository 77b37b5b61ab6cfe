"""The swarm's keys: each its own, each epoch its own, and kept in the state file."""

from __future__ import annotations

import json

import pytest

from covey.transport.errors import InviteInvalid
from covey.transport.identity import Identity
from covey.transport.invite import InviteBook
from covey.transport.membership import HONOURED_S, MAX_OLD_EPOCHS, Keyring, Swarm

FOUNDER = Identity(bytes(32)).peer_id
GUEST = Identity(bytes([1] * 32)).peer_id


def keys(swarm: Swarm) -> list[bytes]:
    return [
        swarm.key_id,
        swarm.preamble_key,
        swarm.renewal_key_id,
        swarm.renewal_key,
        swarm.authority_seed,
        swarm.libp2p_psk,
        swarm.commitment,
        swarm.stun_key,
        swarm.observe_key_id,
        swarm.observe_key,
    ]


def test_every_use_and_every_epoch_has_a_key_of_its_own() -> None:
    swarm = Swarm.create(FOUNDER)
    later = swarm.next_epoch()
    same_secret = Swarm(id=swarm.id, epoch=1, secret=swarm.secret, founder=FOUNDER)
    everything = [key[:16] for s in (swarm, later, same_secret) for key in keys(s)]
    assert len(set(everything)) == len(everything)
    assert (later.id, later.epoch) == (swarm.id, 1)
    assert keys(swarm) == keys(Swarm.from_dict(swarm.to_dict()))


def test_a_swarm_survives_the_state_file() -> None:
    swarm = Swarm.create(FOUNDER)
    assert Swarm.from_dict(json.loads(json.dumps(swarm.to_dict()))) == swarm


@pytest.mark.parametrize(
    "change", [{"secret": "AAAA"}, {"epoch": -1}, {"founder": "?"}, {"extra": 1}, {"swarm": None}]
)
def test_a_damaged_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Expected|Object"):
        Swarm.from_dict({**Swarm.create(FOUNDER).to_dict(), **change})


def test_the_secret_is_not_shown() -> None:
    swarm = Swarm.create(FOUNDER)
    assert repr(swarm.secret) not in repr(swarm)


def test_a_keyring_survives_the_state_file_and_one_secret_becomes_one() -> None:
    swarm = Swarm.create(FOUNDER)
    ring = Keyring(current=swarm).adopt(swarm.next_epoch(), by=FOUNDER, unix_time=5.0)
    assert Keyring.from_dict(json.loads(json.dumps(ring.to_dict()))) == ring
    assert Keyring.from_dict(swarm.to_dict()) == Keyring(current=swarm)


@pytest.mark.parametrize(
    "change",
    [{"secret": "AAAA"}, {"by": 7}, {"old": [{}]}, {"old": [{"epoch": 0}]}, {"extra": 1}],
)
def test_a_damaged_keyring_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Expected|Object"):
        Keyring.from_dict({**Keyring(current=Swarm.create(FOUNDER)).to_dict(), **change})


def test_earlier_secrets_are_honoured_for_a_time_and_not_without_end() -> None:
    swarm = Swarm.create(FOUNDER)
    ring = Keyring(current=swarm).adopt(swarm.next_epoch(), by=None, unix_time=0.0)
    assert [old.swarm for old in ring.honoured(HONOURED_S - 1)] == [swarm]
    assert ring.honoured(HONOURED_S) == ()
    for _ in range(2 * MAX_OLD_EPOCHS):
        ring = ring.adopt(ring.current.next_epoch(), by=None, unix_time=1.0)
    assert len(ring.old) == MAX_OLD_EPOCHS
    assert ring.old[0].swarm.epoch == ring.current.epoch - 1
    assert ring.with_commitment(ring.old[3].swarm.commitment) == ring.old[3].swarm
    assert ring.with_commitment(bytes(32)) is None


def test_going_back_to_an_earlier_secret_keeps_each_once() -> None:
    swarm = Swarm.create(FOUNDER)
    other = swarm.next_epoch()
    ring = Keyring(current=swarm).adopt(other, by=None, unix_time=0.0)
    back = ring.adopt(swarm, by=None, unix_time=1.0)
    assert (back.current, [old.swarm for old in back.old]) == (swarm, [other])


def book_with(uses: int) -> tuple[InviteBook, bytes]:
    book = InviteBook()
    invite = book.issue(
        swarm="12345678",
        inviter=FOUNDER,
        addresses=[],
        valid_s=100,
        uses=uses,
        unix_time=1000,
    )
    return book, invite.token.id


def test_an_invite_is_used_up_but_not_by_trying_again() -> None:
    book, token_id = book_with(uses=1)
    book.redeem(token_id, GUEST, unix_time=1001)
    book.redeem(token_id, GUEST, unix_time=1002)
    with pytest.raises(InviteInvalid, match="used up"):
        book.redeem(token_id, FOUNDER, unix_time=1002)


@pytest.mark.parametrize("uses", [0, 1001])
def test_an_invite_for_none_or_too_many_is_our_mistake(uses: int) -> None:
    with pytest.raises(ValueError, match="uses must be"):
        book_with(uses)


def test_an_invite_expires() -> None:
    book, token_id = book_with(uses=1)
    assert book.token(token_id, unix_time=1099) is not None
    assert book.token(token_id, unix_time=1100) is None
    with pytest.raises(InviteInvalid, match="expired"):
        book.redeem(token_id, GUEST, unix_time=1100)


def test_the_book_survives_the_state_file() -> None:
    book, token_id = book_with(uses=1)
    book.redeem(token_id, GUEST, unix_time=1001)
    kept = InviteBook.from_dict(json.loads(json.dumps(book.to_dict())))
    assert kept.token(token_id, unix_time=1001) == book.token(token_id, unix_time=1001)
    with pytest.raises(InviteInvalid, match="used up"):
        kept.redeem(token_id, FOUNDER, unix_time=1002)


def test_expired_invites_make_room() -> None:
    book, token_id = book_with(uses=1)
    issue = {"swarm": "12345678", "inviter": FOUNDER, "addresses": [], "valid_s": 10, "uses": 1}
    for _ in range(255):
        book.issue(**issue, unix_time=1000)  # type: ignore[arg-type]
    with pytest.raises(InviteInvalid, match="open already"):
        book.issue(**issue, unix_time=1000)  # type: ignore[arg-type]
    book.issue(**issue, unix_time=1010)  # type: ignore[arg-type]
    assert book.token(token_id, unix_time=1010) is not None
