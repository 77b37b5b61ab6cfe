"""Who a node is: its Ed25519 key, and the libp2p peer id that names it.

Knows nothing of swarms or links. The key file holds one line, is readable by its owner only, and
appears whole or not at all. A peer id *is* the public key (libp2p peer-ids spec, "Ed25519": an
identity multihash of the protobuf-wrapped key), so whoever knows the id can check a signature.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import IdentityUnusable

_FILE_PREFIX = b"covey-identity-1 "
_MAX_FILE_BYTES = 256
# Identity multihash (00), 36 bytes (24), protobuf: key type 1 = Ed25519 (08 01), 32 bytes (12 20).
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_CHARS = 52
_FIELD_PRIME = 2**255 - 19
_ORDER_8_Y = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# y coordinates of the points of order 1, 2, 4 and 8: a signature by such a "key" fits any message
# (RFC 8032 leaves the check to us).
_SMALL_ORDER_Y = frozenset(
    {
        0,
        1,
        _FIELD_PRIME - 1,
        _ORDER_8_Y,
        _FIELD_PRIME - _ORDER_8_Y,
    }
)


class Identity:
    """A node's private key and its name."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.seed = seed
        self.public_key = self._key.public_key()
        self.peer_id = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        """The public half only."""
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> Identity:
        """A new identity that is not stored anywhere."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity kept in `path`; made there, mode 0600, if there is no such file.

        Raises:
            IdentityUnusable: others may read the file, or it is damaged or out of reach.
        """
        try:
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _create(path, secrets.token_bytes(32))
            return cls(_load(path))
        except OSError as error:
            raise IdentityUnusable(
                f"cannot use the identity file {path}: {error.strerror}; make its folder writable"
                " for this user or choose another --home"
            ) from error

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `data`."""
        return self._key.sign(data)


def peer_id_of(public_key: Ed25519PublicKey) -> str:
    """The libp2p peer id ("12D3KooW...") of a public key."""
    encoded: bytes = base58.b58encode(_PEER_ID_PREFIX + public_key.public_bytes_raw())
    return encoded.decode("ascii")


def public_key_of(peer_id: str) -> Ed25519PublicKey:
    """The key inside a peer id.

    Raises:
        ValueError: not the one way to write the id of a usable Ed25519 key.
    """
    if len(peer_id) != _PEER_ID_CHARS or not peer_id.isascii():
        raise ValueError("a peer id has 52 base58 characters")
    raw: bytes = base58.b58decode(peer_id)
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError("not the peer id of an Ed25519 key")
    key = raw[len(_PEER_ID_PREFIX) :]
    y = int.from_bytes(key, "little") & ((1 << 255) - 1)
    if y >= _FIELD_PRIME or y in _SMALL_ORDER_Y:
        raise ValueError("not a usable Ed25519 key")
    return Ed25519PublicKey.from_public_bytes(key)


def verify(peer_id: str, signature: bytes, data: bytes) -> bool:
    """Whether `peer_id` signed `data`; False for anything malformed."""
    try:
        public_key_of(peer_id).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True


def _create(path: Path, seed: bytes) -> None:
    """Write the file whole under its name, or leave the one that another process was first with."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_FILE_PREFIX + base58.b58encode_check(seed) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike rename, never replaces a key that is already there
        except FileExistsError:
            return
        except OSError:  # no hard links here (Android, FAT); a home has one node, so no race
            draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _load(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        text = file.read(_MAX_FILE_BYTES + 1)
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise IdentityUnusable(f"others may read the identity file {path}: run chmod 600 {path}")
    seed = _parse(text)
    if seed is None:
        raise IdentityUnusable(
            f"the identity file {path} is damaged: restore it from a backup,"
            " or remove it and join the swarm again as a new member"
        )
    return seed


def _parse(text: bytes) -> bytes | None:
    if not text.startswith(_FILE_PREFIX):
        return None
    try:
        seed: bytes = base58.b58decode_check(text[len(_FILE_PREFIX) :].strip())
    except ValueError:
        return None
    return seed if len(seed) == 32 else None
