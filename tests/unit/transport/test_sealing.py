"""Sealed boxes: for one identity, and unreadable to every other."""

from __future__ import annotations

import base58
import pytest

from covey.transport.identity import Identity
from covey.transport.sealing import OVERHEAD_BYTES, open_sealed, seal_to

A, B = Identity(bytes(32)), Identity(bytes([1] * 32))


def test_only_its_receiver_opens_a_box() -> None:
    box = seal_to(A.peer_id, b"secret")
    assert len(box) == len(b"secret") + OVERHEAD_BYTES
    assert open_sealed(A, box) == b"secret"
    assert open_sealed(B, box) is None
    assert b"secret" not in box


@pytest.mark.parametrize("idx", [0, 31, 32, 47, 50])
def test_a_changed_box_opens_for_nobody(idx: int) -> None:
    box = bytearray(seal_to(A.peer_id, b"secret"))
    box[idx] ^= 1
    assert open_sealed(A, bytes(box)) is None


@pytest.mark.parametrize("box", [b"", b"x", bytes(47), bytes(48), bytes(1000)])
def test_other_bytes_are_no_box(box: bytes) -> None:
    assert open_sealed(A, box) is None


def test_nothing_is_sealed_to_what_is_no_key() -> None:
    with pytest.raises(ValueError, match="peer id"):
        seal_to("nobody", b"secret")
    for y in range(2, 40):  # curve points among them that are not of the main subgroup
        raw = bytes.fromhex("002408011220") + y.to_bytes(32, "little")
        peer_id = base58.b58encode(raw).decode()
        try:
            seal_to(peer_id, b"secret")
        except ValueError:
            continue
