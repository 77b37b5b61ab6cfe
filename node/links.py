"""Measures the links of this node and publishes what they can do.

Every live member that could share a plan with us is dialled and measured, one at a time, so that
the planner knows pairs that nobody has used yet. Right after a member has joined, plans are made
and blocks are loaded, and both ends answer late: a link is measured again when that is over, and
the best of these first probes counts, for what disturbs a probe only ever makes it worse.
Afterwards the round-trip time is taken from ordinary heartbeats and the loss from what the kernel
had to send again, and a bandwidth probe of megabytes follows only where the time has changed, or
the link goes another way. Each end measures the direction away from it: half the round trip, and
the bandwidth towards the other. No two clocks are compared.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from covey.partition.errors import PartitionError
from covey.partition.profile import MAX_LOSS, LinkProfile
from covey.store.replica import Replica
from covey.transport.errors import TransportError
from covey.transport.link import Packets
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer

from .planning_state import link_record

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks for links that were never measured
SETTLE_S = (4.0, 20.0)  # between the first probes of a link
REMEASURE_S = 6 * 3600.0  # a probe takes 5 MB, and idle nodes are to be quiet
REMEASURE_CHANGED_S = 600.0  # where the round-trip time has become another
RETRY_S = 15.0  # after a member that could not be reached
NOTE_EVERY_S = 30.0  # per link, at most
NOTABLE_CHANGE = 0.5  # of the RTT; less is noise, and every publication costs all members
NOTABLE_RTT_S = 1e-3  # below a millisecond the planner has nothing to win from a better figure
# Beside a session heartbeats wait for its frames and steps: less than this says nothing of the way.
NOTABLE_BUSY_RTT_S = 20e-3
NOTABLE_PROBE = 0.2  # of what a whole probe found: it is better than a heartbeat
NOTABLE_LOSS = 0.01  # share of packets: what a plan can be the worse for
LOSS_PACKETS = 200  # that one sample of the loss is made of
LOSS_WEIGHT = 0.3  # of a new sample in the moving average


class LossMeter:
    """A moving average of the share of packets that a carrier had to send again. Pure."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self._base = Packets(n_sent=0, n_resent=0)

    def skip(self, now: Packets | None) -> None:
        """What was sent until now does not count: a probe overflows queues, and that is no loss."""
        self._base = now or Packets(n_sent=0, n_resent=0)

    def look(self, now: Packets | None) -> None:
        """Take what was sent since, once it is enough."""
        if now is None:
            return
        n_sent = now.n_sent - self._base.n_sent
        n_resent = now.n_resent - self._base.n_resent
        if n_sent < 0:  # another carrier: its counts began anew
            self.skip(None)
        elif n_sent >= LOSS_PACKETS:
            # Below zero where it turns out that what was sent again had arrived.
            sample = min(max(0.0, n_resent / n_sent), MAX_LOSS)
            known = sample if self.loss is None else self.loss
            self.loss = known + LOSS_WEIGHT * (sample - known)
            self._base = now


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
        self._n_probes: dict[str, int] = {}  # of the way that a link goes now
        self._noted_at: dict[str, float] = {}
        self._losses: defaultdict[str, LossMeter] = defaultdict(LossMeter)

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
            if peer.is_needed and peer_id in self._profiles:
                return  # a session, ours or the peer's, needs it more than we need the figure
            rtt_s, bandwidth = await peer.measure()
            self._losses[peer_id].skip(peer.packets)
            self._probed(
                LinkProfile.from_value(
                    {
                        "a": self._own,
                        "b": peer_id,
                        "rtt_s": rtt_s,
                        "bandwidth_bytes_per_s": bandwidth,
                        "kind": peer.kind.value,
                        "loss": self._losses[peer_id].loss or 0.0,
                    }
                )
            )
        except (TransportError, PartitionError) as error:
            logger.debug("link not measured: %s", error, extra={"peer": peer_id[-8:]})
            self._due_at[peer_id] = self._clock() + RETRY_S

    def _probed(self, new: LinkProfile) -> None:
        """Publish what a probe found, unless it is what is known; say when the next one is due."""
        known = self._profiles.get(new.b)
        if known is not None and new.kind != known.kind:
            known = None
            self._n_probes.pop(new.b, None)
        n_before = self._n_probes.get(new.b, 0)
        if known is not None and 0 < n_before <= len(SETTLE_S):
            new = replace(
                new,
                rtt_s=min(new.rtt_s, known.rtt_s),
                bandwidth_bytes_per_s=max(new.bandwidth_bytes_per_s, known.bandwidth_bytes_per_s),
            )
        wait_s = SETTLE_S[n_before] if n_before < len(SETTLE_S) else REMEASURE_S
        self._n_probes[new.b] = n_before + 1
        self._due_at[new.b] = self._clock() + wait_s
        if known is None or _differ(known, new):
            self._publish(new)

    def _note_changes(self) -> None:
        for peer_id, peer in self._mesh.peers.items():
            known = self._profiles.get(peer_id)
            if known is None:
                continue
            now = self._clock()
            if peer.kind.value != known.kind:  # what was measured says nothing of the new way
                self._due_at[peer_id] = now
                self._losses.pop(peer_id, None)
                continue
            self._losses[peer_id].look(peer.packets)
            if now - self._noted_at[peer_id] > NOTE_EVERY_S:
                self._note(peer_id, peer, self._losses[peer_id].loss)

    def _note(self, peer_id: str, peer: Peer, loss: float | None) -> None:
        known, rtt_s = self._profiles[peer_id], peer.rtt_s
        least = max(NOTABLE_CHANGE * known.rtt_s, NOTABLE_RTT_S)
        if peer.is_needed and rtt_s is not None and rtt_s > known.rtt_s:
            # On a slow link most of them wait for a prompt to pass: one that did not counts.
            rtt_s = max(known.rtt_s, peer.least_rtt_s or rtt_s)
            least = max(least, NOTABLE_BUSY_RTT_S)
        is_rtt_new = rtt_s is not None and abs(rtt_s - known.rtt_s) > least
        is_loss_new = loss is not None and abs(loss - known.loss) > NOTABLE_LOSS
        if is_rtt_new:
            soon = self._clock() + REMEASURE_CHANGED_S
            self._due_at[peer_id] = min(self._due_at.get(peer_id, soon), soon)
        if is_rtt_new or is_loss_new:
            new: dict[str, float] = {}
            if rtt_s is not None:
                new["rtt_s"] = rtt_s
            if loss is not None:
                new["loss"] = loss
            self._publish(LinkProfile.from_value({**known.to_value(), **new}))

    def _publish(self, profile: LinkProfile) -> None:
        self._profiles[profile.b] = profile
        self._noted_at[profile.b] = self._clock()
        record = link_record(profile)
        self._replica.set(record.key, record.to_value())


def _differ(known: LinkProfile, new: LinkProfile) -> bool:
    """Whether two probes of one link found something else."""
    bandwidth = known.bandwidth_bytes_per_s
    return (
        abs(new.rtt_s - known.rtt_s) > max(NOTABLE_PROBE * known.rtt_s, 1e-4)
        or abs(new.bandwidth_bytes_per_s - bandwidth) > NOTABLE_PROBE * bandwidth
        or abs(new.loss - known.loss) > NOTABLE_LOSS
    )
