"""mDNS cards: open to members, closed to everyone else."""

from __future__ import annotations

import pytest

from covey.transport.control_mdns import mdns_key, open_card, seal_card
from covey.transport.identity import Identity

PEER_ID = Identity(bytes(31) + b"\1").peer_id
ADDRESS = f"/ip4/10.0.0.1/tcp/7071/p2p/{PEER_ID}"
NONCE = bytes(12)
KEY = mdns_key(bytes(32), "meadow2026")


def test_a_card_says_nothing_to_others() -> None:
    sealed = b"".join(seal_card(KEY, PEER_ID, [ADDRESS], nonce=NONCE).values())
    assert PEER_ID.encode() not in sealed
    assert b"10.0.0.1" not in sealed


@pytest.mark.parametrize(
    "key", [mdns_key(bytes(31) + b"\1", "meadow2026"), mdns_key(bytes(32), "meadow2027")]
)
def test_a_card_of_another_swarm_does_not_open(key: bytes) -> None:
    assert open_card(key, seal_card(KEY, PEER_ID, [ADDRESS], nonce=NONCE)) is None


def test_addresses_of_another_peer_are_left_out() -> None:
    other = f"/ip4/10.0.0.2/tcp/7071/p2p/{Identity(bytes(31) + bytes([2])).peer_id}"
    card = seal_card(KEY, PEER_ID, [other, ADDRESS], nonce=NONCE)
    assert open_card(KEY, card) == (PEER_ID, (ADDRESS,))


def test_a_name_that_is_no_peer_id_is_passed_over() -> None:
    assert open_card(KEY, seal_card(KEY, "nobody", ["/p2p/nobody"], nonce=NONCE)) is None
