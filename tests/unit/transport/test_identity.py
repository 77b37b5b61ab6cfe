"""Identities: the key file, the peer id, signatures."""

from __future__ import annotations

from pathlib import Path

import base58
import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from covey.transport.errors import IdentityUnusable
from covey.transport.identity import Identity, public_key_of, verify

SEED = bytes(range(32))


def test_the_peer_id_is_libp2ps() -> None:
    expected = ID.from_pubkey(create_new_key_pair(SEED).public_key).to_base58()
    assert Identity(SEED).peer_id == expected
    assert expected.startswith("12D3KooW")


def test_an_identity_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity"
    made = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == made.peer_id
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["identity"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(IdentityUnusable, match="chmod 600"):
        Identity.load_or_create(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"covey-identity-1 ",
        b"covey-identity-1 \xff\xff",
        b"covey-identity-1 " + base58.b58encode_check(bytes(31)),
        b"covey-identity-1 " + base58.b58encode_check(SEED)[:-1] + b"1",
        b"covey-identity-2 " + base58.b58encode_check(SEED),
        bytes(10_000),
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityUnusable, match="damaged") as caught:
        Identity.load_or_create(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_folder_in_the_way_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(IdentityUnusable, match="cannot use"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityUnusable, match="cannot use"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_only_the_signer_and_the_signed_fit() -> None:
    me, other = Identity(SEED), Identity(bytes(32))
    signature = me.sign(b"data")
    assert verify(me.peer_id, signature, b"data")
    assert not verify(me.peer_id, signature, b"date")
    assert not verify(other.peer_id, signature, b"data")
    assert not verify(me.peer_id, signature[:-1], b"data")
    assert not verify("nobody", signature, b"data")


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        "12D3KooW",
        Identity(SEED).peer_id + "1",
        "1" + Identity(SEED).peer_id[1:-1] + "0",
        "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
        base58.b58encode(bytes.fromhex("002408011220") + bytes(32)).decode(),
        base58.b58encode(bytes.fromhex("002408011220") + b"\x01" + bytes(31)).decode(),
        base58.b58encode(bytes.fromhex("002408011220") + b"\xff" * 32).decode(),
        base58.b58encode(bytes.fromhex("002408021220") + Identity(SEED).seed).decode(),
        "Ω" * 52,
    ],
)
def test_what_names_no_usable_key_is_refused(peer_id: str) -> None:
    with pytest.raises(ValueError, match=r"peer id|Ed25519|Invalid"):
        public_key_of(peer_id)


def test_a_key_of_small_order_would_fit_any_message_and_is_refused() -> None:
    # The neutral point as key, R = neutral point and S = 0: OpenSSL accepts it for all data.
    neutral = b"\x01" + bytes(31)
    peer_id = base58.b58encode(bytes.fromhex("002408011220") + neutral).decode()
    assert not verify(peer_id, neutral + bytes(32), b"anything")


def test_the_seed_is_not_shown() -> None:
    assert SEED.hex() not in repr(Identity(SEED))
