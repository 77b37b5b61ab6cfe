"""Invites: a pasteable string that lets a machine in, and the inviter's book of them.

Sans-IO. An invite never holds the swarm's secret: it holds a token that opens one link to the
inviter, on which the secret is handed over (`Welcome`). The string is `covey1` and base58 of the
fields and a checksum, so that one cut short or mistyped is told from one that is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Annotated

import base58
import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta, Struct

from .addresses import MAX_ADDRESSES
from .errors import InviteInvalid
from .identity import public_key_of
from .membership import KEY_ID_BYTES
from .messages import Address, PeerId

INVITE_VERSION = 1
MAX_OPEN_INVITES = 256
MAX_USES = 1000
_PREFIX = "covey"
_MAX_CHARS = 8192
_CHECKSUM_BYTES = 4

TokenId = Annotated[bytes, Meta(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]
TokenKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
UnixTime = Annotated[int, Meta(ge=0, le=1 << 40)]
Uses = Annotated[int, Meta(ge=1, le=MAX_USES)]


class Token(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What opens the inviter's door: an id to name it by and a key to prove it with."""

    id: TokenId
    key: TokenKey

    @property
    def preamble_key(self) -> bytes:
        """Key of the HMAC in a preamble, 32 bytes."""
        return self._derive(b"covey invite preamble key")

    @property
    def authority_seed(self) -> bytes:
        """Ed25519 seed of the certificate authority on the token's link, 32 bytes."""
        return self._derive(b"covey invite tls authority")

    def _derive(self, label: bytes) -> bytes:
        return HKDF(SHA256(), length=32, salt=self.id, info=label).derive(self.key)


class Invite(Struct, frozen=True, forbid_unknown_fields=True, array_like=True, kw_only=True):
    """One invite as the joiner gets it."""

    version: int
    swarm: Annotated[str, Meta(min_length=8, max_length=64)]
    inviter: PeerId
    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]
    token: Token
    expires_at: UnixTime  # unix seconds
    uses: Uses

    def __str__(self) -> str:
        """The string to paste."""
        body = msgspec.msgpack.encode(self)
        head = f"{_PREFIX}{self.version}"
        encoded: bytes = base58.b58encode(body + _checksum(head, body))
        return head + encoded.decode("ascii")

    @classmethod
    def parse(cls, text: str, *, unix_time: float) -> Invite:
        """Read a pasted invite; blanks and line breaks in it do not matter.

        Raises:
            InviteInvalid: not an invite, damaged, of another version, or expired.
        """
        text = "".join(text.split())
        if not text.startswith(_PREFIX):
            raise InviteInvalid("it does not begin with covey1")
        head = f"{_PREFIX}{INVITE_VERSION}"
        if not text.startswith(head):
            raise InviteInvalid("another version of Covey made it")
        if len(text) > _MAX_CHARS:
            raise InviteInvalid("it is too long to be one")
        try:
            raw: bytes = base58.b58decode(text[len(head) :])
        except ValueError as error:
            raise InviteInvalid("it is cut short or mistyped") from error
        body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        if checksum != _checksum(head, body):
            raise InviteInvalid("it is cut short or mistyped")
        try:
            invite = msgspec.msgpack.decode(body, type=cls)
            public_key_of(invite.inviter)
        except ValueError as error:
            raise InviteInvalid("it is malformed") from error
        if invite.version != INVITE_VERSION:
            raise InviteInvalid("another version of Covey made it")
        if unix_time >= invite.expires_at:
            raise InviteInvalid("it has expired")
        return invite


class _Entry(Struct, forbid_unknown_fields=True, kw_only=True):
    """One issued invite and who came in with it."""

    token: Token
    expires_at: UnixTime
    uses: Uses
    used_by: Annotated[list[PeerId], Meta(max_length=MAX_USES)] = []


class InviteBook:
    """The inviter's record of the invites it issued; kept in the node's state file."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}

    def issue(
        self,
        *,
        swarm: str,
        inviter: str,
        addresses: Sequence[str],
        valid_s: float,
        uses: int,
        unix_time: float,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> Invite:
        """A new invite for `uses` machines, good for `valid_s` seconds.

        Raises:
            InviteInvalid: too many are open already; wait for some to expire.
            ValueError: `uses` is out of bounds.
        """
        if not 1 <= uses <= MAX_USES:
            raise ValueError(f"uses must be 1 to {MAX_USES}, not {uses}")
        self._forget_expired(unix_time)
        if len(self._entries) >= MAX_OPEN_INVITES:
            raise InviteInvalid(f"{MAX_OPEN_INVITES} are open already")
        token = Token(id=entropy(KEY_ID_BYTES), key=entropy(32))
        expires_at = int(unix_time + valid_s)
        self._entries[token.id] = _Entry(token=token, expires_at=expires_at, uses=uses)
        return Invite(
            version=INVITE_VERSION,
            swarm=swarm,
            inviter=inviter,
            addresses=tuple(addresses[:MAX_ADDRESSES]),
            token=token,
            expires_at=expires_at,
            uses=uses,
        )

    def token(self, token_id: bytes, *, unix_time: float) -> Token | None:
        """The token of that id, if its invite has not expired.

        One that is used up still opens the door, so that its joiner is told why it is refused.
        """
        entry = self._entries.get(token_id)
        return entry.token if entry is not None and unix_time < entry.expires_at else None

    def redeem(self, token_id: bytes, peer_id: str, *, unix_time: float) -> None:
        """Count a use; free for a peer that has used it before, whose welcome may have been lost.

        Raises:
            InviteInvalid: unknown, expired or used up.
        """
        entry = self._entries.get(token_id)
        if entry is None or unix_time >= entry.expires_at:
            raise InviteInvalid("it has expired")
        if peer_id in entry.used_by:
            return
        if len(entry.used_by) >= entry.uses:
            raise InviteInvalid("it is used up")
        entry.used_by.append(peer_id)

    def to_dict(self) -> dict[str, object]:
        """For the node's state file; holds the token keys."""
        return {"invites": msgspec.to_builtins(list(self._entries.values()))}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> InviteBook:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or out of bounds.
        """
        book = cls()
        for entry in msgspec.convert(state.get("invites"), list[_Entry]):
            book._entries[entry.token.id] = entry
        return book

    def _forget_expired(self, unix_time: float) -> None:
        self._entries = {k: e for k, e in self._entries.items() if unix_time < e.expires_at}


def _checksum(head: str, body: bytes) -> bytes:
    return sha256(head.encode() + body).digest()[:_CHECKSUM_BYTES]
