"""The control plane: who is in the swarm and where, through a Kademlia DHT that only members enter.

Asyncio outside; inside, libp2p in a trio thread. Knows nothing of links and carries no tensor and
no message of Covey's own: what comes back is signed peer records, for the data plane to dial.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Self, TypeVar

from .control_mdns import Beacon
from .control_records import ControlError, PeerRecord, RecordRejected
from .identity import Identity, public_key_of
from .trio_thread import TrioThread

if TYPE_CHECKING:
    from .control_node import ControlNode

__all__ = ["ControlError", "ControlPlane", "PeerRecord", "RecordRejected"]

START_DEADLINE_S = 60.0  # importing libp2p takes 1 s here, and may take 20 s on a Raspberry Pi
BOOTSTRAP_DEADLINE_S = 15.0  # 5 s a dial, 5 s to become known; eight at once
ANNOUNCE_DEADLINE_S = 20.0
LOOKUP_DEADLINE_S = 15.0
DISCOVER_DEADLINE_S = 30.0
MODE_DEADLINE_S = 5.0
MAX_BOOTSTRAP_ADDRESSES = 64

R = TypeVar("R")

logger = logging.getLogger(__name__)


class ControlPlane:
    """One member's control plane, from `start` to `aclose`; use it on one asyncio loop.

    Every method has a deadline, the constant of its name above, after which it raises
    ControlError; cancelling it cancels what it does in the trio thread. When the thread dies,
    pending and later calls raise ControlError, and `wait_closed` returns.
    """

    def __init__(
        self,
        *,
        private_key: bytes,
        psk: bytes,
        swarm: str,
        listen: Sequence[str] = ("127.0.0.1",),
        port: int = 0,
        mdns: bool = False,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            private_key: raw 32-byte Ed25519 seed of this member's identity.
            psk: 32 bytes that all members share; libp2p speaks to nobody without it.
            swarm: id of the swarm, 8 to 64 letters and digits; names the DHT's rendezvous.
            listen: literal IP addresses; "0.0.0.0" and "::" stand for all interfaces.
            port: TCP port on each of them; 0 takes any free one, not the same on each.
            mdns: also announce and find members on the local network, sealed with `psk`.
        """
        if len(private_key) != 32 or len(psk) != 32:
            raise ValueError("private_key and psk are 32 bytes each")
        if not (8 <= len(swarm) <= 64 and swarm.isascii() and swarm.isalnum()):
            raise ValueError("swarm is 8 to 64 letters and digits")
        if not listen or not 0 <= port < 65536:
            raise ValueError("listen is not empty, and port is in 0-65535")
        for host in listen:
            ip_address(host)  # ValueError for a name
        self._private_key, self._psk, self._swarm = private_key, psk, swarm
        self._listen, self._port = tuple(listen), port
        self._peer_id = Identity(private_key).peer_id
        self._mdns = Beacon(psk=psk, swarm=swarm) if mdns else None
        self._thread: TrioThread[ControlNode] | None = None
        self._node: ControlNode | None = None

    async def start(self) -> None:
        """Listen and serve the DHT; the first time in a process this imports libp2p (1 s).

        Raises:
            ControlError: the port is taken or another address cannot be used.
        """
        if self._thread is not None:
            raise ControlError("the control plane has been started before")
        self._thread = TrioThread("covey-control", self._open)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                self._node = await self._thread.start()
        except TimeoutError as error:
            raise ControlError(f"libp2p did not start within {START_DEADLINE_S:g} s") from error
        if self._mdns is None:
            return
        try:
            await self._mdns.start(self._peer_id, self._node.addresses, interfaces=self._listen)
        except ControlError as error:  # no reason to do without the rest
            logger.warning("members on this network will not be found by themselves: %s", error)
        except asyncio.CancelledError:
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    @property
    def peer_id(self) -> str:
        """This member's peer id, "12D3KooW..."."""
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs that others may dial, /p2p/<peer id> included; empty before `start`."""
        return self._node.addresses if self._node is not None else ()

    def sign(self, record: PeerRecord) -> bytes:
        """`record`, signed with this member's key."""
        return record.sign(self._private_key)

    async def bootstrap(self, addresses: Sequence[str]) -> int:
        """Dial the control planes behind some multiaddrs, all at once, 5 s each.

        Returns:
            How many peers are connected now. Several addresses of one peer count once; what is
            no multiaddr with a peer id, and our own, are passed over, as is all beyond 64.
        """
        known = tuple(addresses[:MAX_BOOTSTRAP_ADDRESSES])
        return await self._call("bootstrap", BOOTSTRAP_DEADLINE_S, lambda n: n.bootstrap(known))

    async def announce(self, record: PeerRecord) -> None:
        """Publish our record; repeat it at least every few hours, and with each new address.

        What is published before anyone is known stays here until the next call.

        Raises:
            RecordRejected: not ours, or not a record that others would take.
            RecordOutdated: we have published one with a higher sequence.
        """
        value = self.sign(record)
        PeerRecord.decode_and_verify(value, swarm=self._swarm, now=time.time())
        await self._call("announce", ANNOUNCE_DEADLINE_S, lambda n: n.announce(record, value))

    async def lookup(self, peer_id: str) -> PeerRecord | None:
        """The newest valid record of a member; None if nobody who answers has one.

        Our own id is answered as well: after a restart that tells which sequence comes next.
        """
        try:
            public_key_of(peer_id)
        except ValueError:
            return None
        return await self._call("lookup", LOOKUP_DEADLINE_S, lambda n: n.lookup(peer_id))

    async def discover(self, known: Collection[str] = ()) -> list[PeerRecord]:
        """The valid records of all members that can be found, by peer id, without our own.

        A record says where its member was, not that it lives.

        Args:
            known: peers whose records are not worth asking for.
        """
        passed_over = frozenset(known)
        return await self._call("discover", DISCOVER_DEADLINE_S, lambda n: n.discover(passed_over))

    async def set_reachable(self, *, is_reachable: bool) -> None:
        """Say whether others can dial us, as soon as that is known.

        A member that cannot be dialled asks the DHT and publishes in it, but holds nothing for
        others: they would wait for it in vain.
        """
        await self._call("mode", MODE_DEADLINE_S, lambda n: n.set_serving(is_serving=is_reachable))

    def on_discovered(self, callback: Callable[[str, tuple[str, ...]], None]) -> None:
        """Call `callback(peer_id, multiaddrs)` on this loop for each member that mDNS finds.

        The multiaddrs are made for `bootstrap`. Without `mdns=True` nothing is ever found.
        """
        if self._mdns is not None:
            self._mdns.callbacks.append(callback)

    async def wait_closed(self) -> ControlError | None:
        """Wait until the control plane has ended; what went wrong, or None after `aclose`."""
        if self._thread is None:
            raise ControlError("the control plane is not running")
        return await asyncio.shield(self._thread.closed)

    async def aclose(self) -> None:
        """Part from the peers and end the thread, within 8 s; safe to call twice.

        Raises:
            ControlError: the thread hangs. It will not keep the process from exiting.
        """
        if self._mdns is not None:
            await self._mdns.aclose()
        if self._thread is not None:
            await self._thread.aclose()

    def _open(self) -> AbstractAsyncContextManager[ControlNode]:
        """In the trio thread: import libp2p, which the rest of Covey need not wait for."""
        from .control_node import NodeSettings, open_node

        return open_node(
            NodeSettings(
                private_key=self._private_key,
                psk=self._psk,
                swarm=self._swarm,
                listen=self._listen,
                port=self._port,
            )
        )

    async def _call(
        self, operation: str, deadline_s: float, function: Callable[[ControlNode], Awaitable[R]]
    ) -> R:
        if self._thread is None or self._node is None:
            raise ControlError("the control plane is not running")
        return await self._thread.call(
            partial(function, self._node), operation=operation, deadline_s=deadline_s
        )
