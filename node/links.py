"""Measures the links of this node and publishes what they can do.

Every live member that could share a plan with us is dialled and measured once, one at a time, so
that the planner knows pairs that nobody has used yet; afterwards the round-trip time is taken from
ordinary heartbeats, and a bandwidth probe of megabytes follows only where that has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from covey.partition.errors import PartitionError
from covey.partition.profile import LinkProfile
from covey.store.replica import Replica
from covey.transport.errors import TransportError
from covey.transport.mesh import Mesh

from .planning_state import link_record

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks for links that were never measured
REMEASURE_S = 6 * 3600.0  # a probe takes 5 MB, and idle nodes are to be quiet
REMEASURE_CHANGED_S = 600.0  # where the round-trip time has become another
RETRY_S = 15.0  # after a member that could not be reached
NOTE_EVERY_S = 30.0  # per link, at most
NOTABLE_CHANGE = 0.5  # of the RTT; less is noise, and every publication costs all members


class LinkMeter:
    """Keeps this node's link profiles in the replica; `run` is its one loop."""

    def __init__(
        self,
        mesh: Mesh,
        replica: Replica,
        own_peer_id: str,
        live: Callable[[], frozenset[str]],
        clock: Callable[[], float],
    ) -> None:
        self._mesh = mesh
        self._replica = replica
        self._own = own_peer_id
        self._live = live
        self._clock = clock
        self._profiles: dict[str, LinkProfile] = {}
        self._due_at: dict[str, float] = {}
        self._noted_at: dict[str, float] = {}

    async def run(self) -> None:
        """Measure what is due, one link at a time so that probes do not disturb each other."""
        while True:
            now = self._clock()
            for peer_id in sorted(self._live() - {self._own}):
                if self._due_at.get(peer_id, 0.0) <= now:
                    await self._measure(peer_id)
            self._note_changes()
            await asyncio.sleep(LOOK_S)

    def link_up(self, peer_id: str) -> None:
        """A link came up: whoever could not be reached before is measured soon."""
        if peer_id not in self._profiles:
            self._due_at.pop(peer_id, None)

    async def _measure(self, peer_id: str) -> None:
        try:
            peer = await self._mesh.peer(peer_id)
            if peer.busy and peer_id in self._profiles:
                return  # a session needs the link more than we need the figure
            rtt_s, bandwidth = await peer.measure()
            self._publish(
                LinkProfile.from_value(
                    {
                        "a": self._own,
                        "b": peer_id,
                        "rtt_s": rtt_s,
                        "bandwidth_bytes_per_s": bandwidth,
                        "kind": peer.kind.value,
                        "loss": 0.0,
                    }
                )
            )
            self._due_at[peer_id] = self._clock() + REMEASURE_S
        except (TransportError, PartitionError) as error:
            logger.debug("link not measured: %s", error, extra={"peer": peer_id[-8:]})
            self._due_at[peer_id] = self._clock() + RETRY_S

    def _note_changes(self) -> None:
        for peer_id, peer in self._mesh.peers.items():
            known = self._profiles.get(peer_id)
            if known is None or peer.rtt_s is None:
                continue
            # Below a millisecond the planner has nothing to win from a better figure.
            change = abs(peer.rtt_s - known.rtt_s)
            is_due = self._clock() - self._noted_at[peer_id] > NOTE_EVERY_S
            if is_due and change > max(NOTABLE_CHANGE * known.rtt_s, 1e-3):
                self._publish(LinkProfile.from_value({**known.to_value(), "rtt_s": peer.rtt_s}))
                soon = self._clock() + REMEASURE_CHANGED_S
                self._due_at[peer_id] = min(self._due_at.get(peer_id, soon), soon)

    def _publish(self, profile: LinkProfile) -> None:
        self._profiles[profile.b] = profile
        self._noted_at[profile.b] = self._clock()
        record = link_record(profile)
        self._replica.set(record.key, record.to_value())
