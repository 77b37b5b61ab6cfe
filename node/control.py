"""The control plane of a node, and the one that takes its place when the swarm has a new secret.

libp2p's pre-shared key cannot be changed while it runs. So it ends and another one begins, at
leisure: links and the store find members meanwhile, and nothing that computes depends on it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from covey.transport.control import ControlPlane
from covey.transport.control_records import ControlError

logger = logging.getLogger(__name__)

LEISURE_S = (5.0, 30.0)  # from a new secret to the control plane that uses it: not all at once


class Control:
    """Holds the control plane of now; `run` replaces it after each `follow`."""

    def __init__(
        self,
        make: Callable[[], ControlPlane],
        *,
        on_new: Callable[[ControlPlane], None],
        rng: random.Random,
    ) -> None:
        """`on_new(plane)` is called when another plane has started."""
        self.plane = make()
        self._make = make
        self._on_new = on_new
        self._rng = rng
        self._is_outdated = asyncio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs that others may dial now."""
        return self.plane.addresses

    def follow(self) -> None:
        """The secret has changed: use that of now, soon."""
        self._is_outdated.set()

    async def start(self) -> None:
        """Start the first plane; raises ControlError."""
        await self.plane.start()

    async def run(self) -> None:
        """Replace the plane when it is time, until cancelled."""
        while True:
            await self._is_outdated.wait()
            await asyncio.sleep(self._rng.uniform(*LEISURE_S))
            self._is_outdated.clear()
            try:
                await self.restart()
            except ControlError as error:
                logger.warning("the DHT has not followed the new secret: %s", error)
                self._is_outdated.set()

    async def restart(self) -> None:
        """End the plane and start another; raises ControlError."""
        await self.plane.aclose()
        self.plane = self._make()
        await self.plane.start()
        self._on_new(self.plane)

    async def aclose(self) -> None:
        """End the plane; raises ControlError if it hangs."""
        await self.plane.aclose()
