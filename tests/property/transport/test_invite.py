"""Invites: what was issued can be read; what was damaged is told from it."""

from __future__ import annotations

import base58
from hypothesis import given
from hypothesis import strategies as st

from covey.transport.errors import InviteInvalid
from covey.transport.identity import Identity
from covey.transport.invite import Invite, InviteBook
from covey.transport.membership import Swarm

INVITER = Identity(bytes(32)).peer_id
SWARM = Swarm.create(INVITER, entropy=lambda n: bytes([n]) * n)
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def issue(uses: int = 1, addresses: tuple[str, ...] = ("10.0.0.1:4000",)) -> Invite:
    return InviteBook().issue(
        swarm=SWARM.id,
        inviter=INVITER,
        addresses=addresses,
        valid_s=100,
        uses=uses,
        unix_time=1000,
        entropy=lambda n: bytes(range(n)),
    )


TEXT = str(issue())


def is_refused(text: str) -> bool:
    try:
        Invite.parse(text, unix_time=1001)
    except InviteInvalid:
        return True
    return False


@given(
    st.integers(1, 1000),
    st.lists(st.text(min_size=3, max_size=60), max_size=16).map(tuple),
    st.integers(1, 80),
)
def test_an_invite_survives_pasting(uses: int, addresses: tuple[str, ...], width: int) -> None:
    invite = issue(uses, addresses)
    text = str(invite)
    wrapped = "\n  ".join(text[at : at + width] for at in range(0, len(text), width))
    assert Invite.parse(f" {wrapped}\n", unix_time=1001) == invite


@given(st.integers(0, len(TEXT) - 1))
def test_one_cut_short_is_refused(length: int) -> None:
    assert is_refused(TEXT[:length])


@given(st.integers(0, len(TEXT) - 1), st.sampled_from(BASE58))
def test_one_mistyped_is_refused(at: int, char: str) -> None:
    changed = TEXT[:at] + char + TEXT[at + 1 :]
    assert changed == TEXT or is_refused(changed)


@given(st.text(max_size=200))
def test_any_text_is_refused(text: str) -> None:
    assert is_refused(text)
    assert is_refused("covey1" + text)


def test_the_secret_is_not_in_it() -> None:
    raw: bytes = base58.b58decode(TEXT[len("covey1") :])
    assert SWARM.secret not in raw
    assert SWARM.id.encode() in raw
