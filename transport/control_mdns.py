"""mDNS: members on one local network find each other without an address from anyone.

Not libp2p's, which broadcasts peer id and addresses to everybody on the network, blocks its loop
while it registers, and shares one global list of listeners between all swarms of a process. This
one announces a random name and a sealed text that only members can open. RFC 6762 and 6763.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta
from zeroconf import InterfaceChoice, ServiceInfo, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

from .control_records import ControlError
from .identity import public_key_of

SERVICE_TYPE = "_covey._udp.local."
MAX_ADDRESSES = 8
MAX_SEALED_BYTES = 1024
_CHUNK_BYTES = 200  # a string of a TXT record holds 255, its name included
_NONCE_BYTES = 12

DiscoveryCallback = Callable[[str, tuple[str, ...]], None]


class _Card(msgspec.Struct, array_like=True, frozen=True):
    """What is sealed: who, and the multiaddrs of its control plane."""

    peer_id: Annotated[str, Meta(max_length=64)]
    addresses: Annotated[
        tuple[Annotated[str, Meta(min_length=3, max_length=128)], ...],
        Meta(min_length=1, max_length=MAX_ADDRESSES),
    ]


_CARD = msgspec.msgpack.Decoder(_Card)


def mdns_key(psk: bytes, swarm: str) -> bytes:
    """The key that seals what members of `swarm` announce."""
    info = b"covey mdns 1 " + swarm.encode()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(psk)


def seal_card(
    key: bytes, peer_id: str, addresses: Sequence[str], *, nonce: bytes
) -> dict[bytes, bytes]:
    """The TXT properties "c0", "c1", ... that announce a member; `nonce` is 12 random bytes."""
    card = msgspec.msgpack.encode(_Card(peer_id, tuple(addresses[:MAX_ADDRESSES])))
    sealed = nonce + ChaCha20Poly1305(key).encrypt(nonce, card, None)
    starts = range(0, len(sealed), _CHUNK_BYTES)
    return {
        b"c%d" % index: sealed[start : start + _CHUNK_BYTES] for index, start in enumerate(starts)
    }


def open_card(
    key: bytes, properties: Mapping[bytes, bytes | None]
) -> tuple[str, tuple[str, ...]] | None:
    """Peer id and multiaddrs of a member; None for anything that no member of ours sealed."""
    sealed = b""
    for index in range(MAX_SEALED_BYTES // _CHUNK_BYTES + 1):
        sealed += properties.get(b"c%d" % index) or b""
    if not _NONCE_BYTES < len(sealed) <= MAX_SEALED_BYTES:
        return None
    nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    try:
        card = _CARD.decode(ChaCha20Poly1305(key).decrypt(nonce, text, None))
        public_key_of(card.peer_id)
    except (InvalidTag, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    suffix = f"/p2p/{card.peer_id}"
    addresses = tuple(address for address in card.addresses if address.endswith(suffix))
    return (card.peer_id, addresses) if addresses else None


class Beacon:
    """Announces this member on the local network, and tells of others."""

    def __init__(self, *, psk: bytes, swarm: str) -> None:
        self.callbacks: list[DiscoveryCallback] = []
        self._key = mdns_key(psk, swarm)
        self._peer_id = ""
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None

    async def start(
        self, peer_id: str, addresses: Sequence[str], *, interfaces: Sequence[str]
    ) -> None:
        """Announce and listen on the interfaces that have these addresses.

        Raises:
            ControlError: no multicast socket can be opened there.
        """
        self._peer_id = peer_id
        anywhere = any(host in ("0.0.0.0", "::") for host in interfaces)  # noqa: S104 - compared
        try:
            self._zeroconf = AsyncZeroconf(
                interfaces=InterfaceChoice.All if anywhere else list(interfaces)
            )
        except OSError as error:
            raise ControlError(f"mDNS cannot be used here: {error}") from error
        name = secrets.token_hex(8)
        info = ServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=9,  # discard: the way in is sealed in the text
            properties=seal_card(
                self._key, peer_id, addresses, nonce=secrets.token_bytes(_NONCE_BYTES)
            ),
            server=f"{name}.local.",
        )
        # The name is random, so there is no need to probe for a second that it is free.
        broadcast = await self._zeroconf.async_register_service(info, cooperating_responders=True)
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change]
        )
        await broadcast

    async def aclose(self) -> None:
        """Withdraw the announcement; safe to call twice."""
        zeroconf, self._zeroconf = self._zeroconf, None
        browser, self._browser = self._browser, None
        if browser is not None:
            await browser.async_cancel()
        if zeroconf is not None:
            await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            return
        # Answers carry the text along; should it come later, it comes as an update.
        info = ServiceInfo(service_type, name)
        info.load_from_cache(zeroconf)
        found = open_card(self._key, info.properties)
        if found is not None and found[0] != self._peer_id:
            for callback in self.callbacks:
                callback(*found)
