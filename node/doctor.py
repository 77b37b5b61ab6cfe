"""Why links are as they are: JSON facts for `covey doctor` and `covey ping`.

Asks and dials on purpose, so it takes seconds. What NAT is in the way and what it means is found
in `transport/nat`; this page only puts it beside the members.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import msgspec

from covey.transport.addresses import format_address
from covey.transport.errors import LinkTimeout, TransportError
from covey.transport.mesh import Mesh
from covey.transport.peer import Peer
from covey.transport.reach import Reach

MAX_DIALLED = 32  # members; whoever has more does not look at each
DIALS_AT_ONCE = 4
DIAL_S = 20.0  # for all of them; the client hangs up after 30
PING_S = 2.0
BETWEEN_PINGS_S = 0.1
PINGS_S = 12.0  # for all of them; a measurement of ten seconds at most follows


async def doctor_facts(reach: Reach, mesh: Mesh, names: Mapping[str, str]) -> dict[str, Any]:
    """What NAT is in the way, what could be changed, and how each member is reached.

    Args:
        reach: of this node.
        mesh: its links.
        names: by peer id, of each other member that is alive; who has no link is dialled.
    """
    chosen = list(names)[:MAX_DIALLED]
    facts, errors = await asyncio.gather(reach.nat.refresh(), _dial(mesh, chosen))
    card = msgspec.to_builtins(facts.to_card(now=facts.measured_at))
    links = mesh.peers
    return {
        "nat": {key: value for key, value in card.items() if key != "age_s"},
        "findings": [asdict(finding) for finding in reach.nat.explain()],
        "steps": [asdict(step) for step in reach.nat.steps],
        "relays": [{"peer_id": relay, "name": names.get(relay)} for relay in reach.relays],
        "members": [
            {
                "peer_id": peer_id,
                "name": names[peer_id],
                "link": _link(links[peer_id]) if peer_id in links else None,
                "error": errors.get(peer_id),
                "tried": _tried(reach, peer_id),
            }
            for peer_id in chosen
        ],
    }


async def ping_facts(peer: Peer, name: str, *, count: int) -> dict[str, Any]:
    """Round-trip times, answers that did not come, and what the link carries towards the peer.

    Raises:
        LinkClosed, LinkBroken: the link ended.
    """
    rtts_s: list[float] = []
    n_sent = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(PINGS_S):
            for n_sent in range(1, count + 1):  # noqa: B007 - the last one counts
                with suppress(LinkTimeout):
                    rtts_s.append(await peer.ping(timeout_s=PING_S))
                await asyncio.sleep(BETWEEN_PINGS_S)
    bandwidth = None
    if rtts_s:
        with suppress(LinkTimeout):
            _, bandwidth = await peer.measure()
    return {
        "peer_id": peer.peer_id,
        "name": name,
        "link": _link(peer),
        "sent": n_sent,
        "answered": len(rtts_s),
        "rtt_min_s": min(rtts_s, default=None),
        "rtt_median_s": statistics.median(rtts_s) if rtts_s else None,
        "rtt_max_s": max(rtts_s, default=None),
        "bandwidth_bytes_per_s": bandwidth,
    }


async def _dial(mesh: Mesh, peer_ids: list[str]) -> dict[str, str]:
    """Get a link to each; why there is none to some."""
    slots = asyncio.Semaphore(DIALS_AT_ONCE)
    errors = dict.fromkeys(peer_ids, f"no way was found within {DIAL_S:g} s")

    async def dial(peer_id: str) -> None:
        async with slots:
            try:
                await mesh.peer(peer_id)
            except TransportError as error:
                errors[peer_id] = str(error)
            else:
                del errors[peer_id]

    dialling = [asyncio.create_task(dial(peer_id)) for peer_id in peer_ids]
    if dialling:
        await asyncio.wait(dialling, timeout=DIAL_S)
    for task in dialling:
        task.cancel()
    await asyncio.gather(*dialling, return_exceptions=True)
    return errors


def _link(peer: Peer) -> dict[str, Any]:
    dialled = peer.dialled_address
    return {
        "kind": peer.kind.value,
        "rtt_s": peer.rtt_s,
        "host": peer.remote_host,
        "address": format_address(*dialled) if dialled is not None else None,
    }


def _tried(reach: Reach, peer_id: str) -> list[dict[str, Any]]:
    """The last attempts to find a better way than through a relay, in order."""
    return [
        {
            "way": tried.attempt.kind.value,
            "addresses": list(tried.attempt.addresses),
            "took_s": round(tried.took_s, 3),
            "failure": tried.failure or None,
        }
        for tried in reach.upgrader.tried.get(peer_id, ())
    ]
