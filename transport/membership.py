"""The swarm as one member knows it: its name, its secret, and the keys that follow from them.

Invariant: every use of the secret has a key of its own, so that none helps to find another or the
secret (HKDF-SHA256, RFC 5869, with one label each). The swarm id is drawn apart from the secret
and outlives every epoch of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .messages import Welcome

KEY_ID_BYTES = 16
SECRET_BYTES = 32
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

    def next_epoch(self, *, entropy: Callable[[int], bytes] = os.urandom) -> Swarm:
        """The same swarm with a new secret, after a member was removed."""
        return replace(self, epoch=self.epoch + 1, secret=entropy(SECRET_BYTES))

    @property
    def key_id(self) -> bytes:
        """16 bytes that name this epoch's preamble key to those who hold it, and say no more."""
        return self._derive("preamble key id", KEY_ID_BYTES)

    @property
    def preamble_key(self) -> bytes:
        """Key of the HMAC in a preamble, 32 bytes."""
        return self._derive("preamble key", 32)

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
