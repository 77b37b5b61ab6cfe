"""Boxes that one identity can open and anybody can close: libsodium's sealed boxes.

The identity's Ed25519 key serves as an X25519 key too, by libsodium's own conversion, so that
whoever knows a peer id can seal something to it. A box says nothing of who closed it.
"""

from __future__ import annotations

from nacl.exceptions import CryptoError
from nacl.public import SealedBox
from nacl.signing import SigningKey, VerifyKey

from .identity import Identity, public_key_of

OVERHEAD_BYTES = 48


def seal_to(peer_id: str, data: bytes) -> bytes:
    """`data` in a box that only `peer_id` can open.

    Raises:
        ValueError: nobody can have that peer id.
    """
    key = VerifyKey(public_key_of(peer_id).public_bytes_raw())
    try:
        return SealedBox(key.to_curve25519_public_key()).encrypt(data)
    except CryptoError as error:  # not a point of the main subgroup
        raise ValueError("not a usable Ed25519 key") from error


def open_sealed(identity: Identity, box: bytes) -> bytes | None:
    """What is in the box; None if it was not sealed to us, or is damaged."""
    key = SigningKey(identity.seed).to_curve25519_private_key()
    try:
        return SealedBox(key).decrypt(box)
    except (CryptoError, ValueError):  # ValueError: shorter than any box
        return None
