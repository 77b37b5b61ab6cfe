"""The swarm as one member knows it: its name, its secrets, and the keys that follow from them.

Invariant: every use of the secret has a key of its own, so that none helps to find another or the
secret (HKDF-SHA256, RFC 5869, with one label each). The swarm id is drawn apart from the secret
and outlives every epoch of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta, Struct

from .messages import PeerId, Welcome

KEY_ID_BYTES = 16
SECRET_BYTES = 32
HONOURED_S = 30 * 86_400.0  # how long an earlier secret opens "give me my sealed secret"
MAX_OLD_EPOCHS = 16  # honoured at once; the oldest go first
_SWARM_ID_BYTES = 16


class _SwarmState(Welcome, frozen=True, kw_only=True):
    """What the state file holds: the bounds of a Welcome, the secret in base64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """Membership in one swarm, in one epoch of its secret."""

    id: str  # 32 hex digits
    epoch: int
    secret: bytes = field(repr=False)  # 32 bytes
    founder: str  # peer id of whom revocations are believed

    @classmethod
    def create(cls, founder: str, *, entropy: Callable[[int], bytes] = os.urandom) -> Swarm:
        """A new swarm with a fresh id and secret."""
        return cls(
            id=entropy(_SWARM_ID_BYTES).hex(),
            epoch=0,
            secret=entropy(SECRET_BYTES),
            founder=founder,
        )

    @classmethod
    def from_welcome(cls, welcome: Welcome) -> Swarm:
        """The swarm that an inviter let us into."""
        return cls(
            id=welcome.swarm, epoch=welcome.epoch, secret=welcome.secret, founder=welcome.founder
        )

    def next_epoch(
        self, *, after: int | None = None, entropy: Callable[[int], bytes] = os.urandom
    ) -> Swarm:
        """The same swarm with a new secret, in the epoch `after` our own or that one."""
        epoch = self.epoch if after is None else after
        return replace(self, epoch=epoch + 1, secret=entropy(SECRET_BYTES))

    def with_secret(self, epoch: int, secret: bytes) -> Swarm:
        """The same swarm with the secret of another epoch."""
        return replace(self, epoch=epoch, secret=secret)

    @property
    def commitment(self) -> bytes:
        """32 bytes by which a secret is recognised, and which do not help to find it."""
        return self._derive("epoch commitment", 32)

    @property
    def key_id(self) -> bytes:
        """16 bytes that name this epoch's preamble key to those who hold it, and say no more."""
        return self._derive("preamble key id", KEY_ID_BYTES)

    @property
    def preamble_key(self) -> bytes:
        """Key of the HMAC in a preamble, 32 bytes."""
        return self._derive("preamble key", 32)

    @property
    def renewal_key_id(self) -> bytes:
        """16 bytes that name the key by which a later epoch's secret is asked for."""
        return self._derive("renewal key id", KEY_ID_BYTES)

    @property
    def renewal_key(self) -> bytes:
        """Key of the HMAC in a preamble that asks for a later epoch's secret, 32 bytes."""
        return self._derive("renewal key", 32)

    @property
    def authority_seed(self) -> bytes:
        """Ed25519 seed of the certificate authority that every member derives, 32 bytes."""
        return self._derive("tls authority", 32)

    @property
    def libp2p_psk(self) -> bytes:
        """Pre-shared key of the libp2p network, 32 bytes."""
        return self._derive("libp2p psk", 32)

    @property
    def stun_key(self) -> bytes:
        """Key of MESSAGE-INTEGRITY in STUN between members, 32 bytes."""
        return self._derive("stun", 32)

    @property
    def observe_key_id(self) -> bytes:
        """16 bytes that name `observe_key` in a preamble."""
        return self._derive("observe key id", KEY_ID_BYTES)

    @property
    def observe_key(self) -> bytes:
        """Key of the preamble, and of the answer, of who asks how its TCP address looks."""
        return self._derive("observe key", 32)

    def to_dict(self) -> dict[str, str | int]:
        """For the node's state file; holds the secret."""
        state: dict[str, str | int] = msgspec.to_builtins(
            _SwarmState(
                swarm=self.id,
                epoch=self.epoch,
                secret=self.secret,
                founder=self.founder,
                members=[],
            )
        )
        return {key: state[key] for key in ("swarm", "epoch", "secret", "founder")}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> Swarm:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or out of bounds.
        """
        return cls.from_welcome(
            msgspec.convert({**state, "type": "welcome", "members": []}, _SwarmState)
        )

    def _derive(self, label: str, length: int) -> bytes:
        salt = f"covey swarm {self.id} epoch {self.epoch}".encode()
        return HKDF(SHA256(), length=length, salt=salt, info=b"covey " + label.encode()).derive(
            self.secret
        )


class _OldSecret(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One earlier epoch in the state file."""

    epoch: Annotated[int, Meta(ge=0, le=1 << 31)]
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    until: Annotated[float, Meta(ge=0, le=1 << 53)]


class _KeyringState(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the state file holds beside the current secret."""

    by: PeerId | None = None
    old: Annotated[list[_OldSecret], Meta(max_length=MAX_OLD_EPOCHS)] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class OldEpoch:
    """An earlier epoch, and until when (unix time) its secret is honoured."""

    swarm: Swarm
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyring:
    """The swarm in its present epoch, and the earlier ones that still open one thing."""

    current: Swarm
    by: str | None = None  # whose rotation made the present secret, once that is known
    old: tuple[OldEpoch, ...] = ()  # the latest to end first

    def adopt(self, swarm: Swarm, *, by: str | None, unix_time: float) -> Keyring:
        """With another secret as the present one; ours is honoured for `HONOURED_S` more."""
        ours = OldEpoch(swarm=self.current, until=unix_time + HONOURED_S)
        others = (old for old in self.honoured(unix_time) if old.swarm != swarm)
        return Keyring(current=swarm, by=by, old=(ours, *others)[:MAX_OLD_EPOCHS])

    def honoured(self, unix_time: float) -> tuple[OldEpoch, ...]:
        """The earlier epochs that are not over yet."""
        return tuple(old for old in self.old if unix_time < old.until)

    def with_commitment(self, commitment: bytes) -> Swarm | None:
        """The epoch on this ring that has it, old or new."""
        swarms = (self.current, *(old.swarm for old in self.old))
        return next((swarm for swarm in swarms if swarm.commitment == commitment), None)

    def to_dict(self) -> dict[str, object]:
        """For the node's state file; holds the secrets."""
        old = [
            _OldSecret(epoch=old.swarm.epoch, secret=old.swarm.secret, until=old.until)
            for old in self.old
        ]
        rest: dict[str, object] = msgspec.to_builtins(_KeyringState(by=self.by, old=old))
        return {**self.current.to_dict(), **rest}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> Keyring:
        """Inverse of `to_dict`; takes what `Swarm.to_dict` wrote as well.

        Raises:
            ValueError: a field is missing, unknown, or out of bounds.
        """
        extra = {key: state[key] for key in ("by", "old") if key in state}
        current = Swarm.from_dict({key: state[key] for key in state.keys() - extra.keys()})
        rest = msgspec.convert(extra, _KeyringState)
        return cls(
            current=current,
            by=rest.by,
            old=tuple(
                OldEpoch(swarm=current.with_secret(old.epoch, old.secret), until=old.until)
                for old in rest.old
            ),
        )
