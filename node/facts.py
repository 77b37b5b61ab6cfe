"""What a node says of itself and its swarm: JSON facts for `covey status` and the metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from covey import __version__
from covey.store.schema import MAX_MAPPED, MAX_RELAYS, MemberCard

from .loading import Held
from .service import ModelEntry

if TYPE_CHECKING:
    from .runtime import Node


def status_facts(node: Node) -> dict[str, Any]:
    """Identity, members, links, stages, sessions and speeds, all as of now."""
    live = node.live_peers()
    cards = node.views.members()
    return {
        "peer_id": node.peer_id,
        "name": node.config.name,
        "swarm": node.swarm.id,
        "version": __version__,
        "uptime_s": round(time.time() - node.started_at, 1),
        "home": str(node.home.path),
        "engine": node.engines.facts(),
        "members": [_member(node, card, is_live=peer in live) for peer, card in cards.items()],
        "models": _models(node),
        "stages": _stages(node),
        "sessions": {
            "as_head": node.generator.n_active,
            "as_stage": node.server.n_sessions,
            "generated_tokens": node.generator.n_tokens,
            "tok_per_s": node.generator.tok_per_s,
        },
        "reach": {
            "is_reachable": node.reach.is_reachable,
            "relays": list(node.reach.relays),
            "circuits": node.reach.server.n_circuits,
        },
        "discovery": {"found_by_dht": node.discovery.n_found_by_dht},
        "store": {
            "authors": len(node.replica.authors()),
            "refused": {reason.value: n for reason, n in node.replica.rejected.items()},
            "refused_beats": {reason.value: n for reason, n in node.awareness.rejected.items()},
            "unreadable_records": len(node.views.skipped),
        },
    }


def member_facts(node: Node) -> dict[str, Any]:
    """Who is in the swarm, and who was removed and by whom, as of now."""
    members, standing = node.members, node.members.standing
    live = node.live_peers()
    states = node.awareness.live(node.clock())
    inviters = members.inviters()
    roles = {standing.founder: "founder", **dict.fromkeys(standing.delegates, "delegate")}
    listed = []
    for peer_id, card in members.known().items():
        link = node.mesh.peers.get(peer_id)
        epoch = states.get(peer_id, {}).get("epoch")
        listed.append(
            {
                "peer_id": peer_id,
                "name": card.name if card is not None else peer_id[-8:],
                "is_self": peer_id == node.peer_id,
                "is_live": peer_id in live,
                "last_seen_at": members.last_seen.get(peer_id),
                "role": roles.get(peer_id, "member"),
                "invited_by": sorted(inviters.get(peer_id, ())),
                "epoch": epoch if isinstance(epoch, int) else None,
                "link": link.kind.value if link is not None else None,
            }
        )
    return {
        "swarm": node.swarm.id,
        "epoch": node.swarm.epoch,
        "may_remove": node.peer_id in standing.authorities,
        "members": listed,
        "removed": [
            {
                "peer_id": peer_id,
                "name": revocation.name,
                "by": revocation.by,
                "by_name": members.name_of(revocation.by),
                "at": revocation.at,
            }
            for peer_id, revocation in sorted(standing.removed.items())
        ],
    }


def own_card(node: Node) -> MemberCard:
    """What this node tells all members of itself."""
    config, reach = node.config, node.reach
    return MemberCard(
        peer_id=node.peer_id,
        name=config.name,
        addresses=tuple(node.mesh.addresses[:16]),
        control_addresses=tuple(node.control.addresses[:16]),
        models=tuple(model.digest for model in node.catalog),
        max_blocks=config.max_blocks,
        memory_bytes=config.memory_bytes,
        version=__version__,
        started_at=node.started_at,
        relays=reach.relays[:MAX_RELAYS],
        is_reachable=reach.is_reachable,
        mapped=reach.mapped_addresses[:MAX_MAPPED],
        is_relay=config.relay and bool(reach.is_reachable),
    )


def relays_on_offer(node: Node) -> dict[str, str | None]:
    """Members that relay and are alive, and at which host."""
    live = node.live_peers() - {node.peer_id}
    cards = node.views.members()
    return {
        peer_id: card.public_host
        for peer_id, card in cards.items()
        if card.is_relay and peer_id in live
    }


def model_entries(node: Node) -> list[ModelEntry]:
    """Every model that some member serves, by name."""
    entries = {
        entry.record.digest: ModelEntry(
            id=entry.record.name,
            created=int(node.started_at),
            digest=entry.record.digest,
            context_length=entry.record.context_length,
            is_ready=node.planning.route(entry.record.digest) is not None,
        )
        for entry in node.views.manifests()
    }
    return sorted(entries.values(), key=lambda entry: entry.id)


def _member(node: Node, card: MemberCard, *, is_live: bool) -> dict[str, Any]:
    peer = node.mesh.peers.get(card.peer_id)
    link = None
    if peer is not None:
        link = {
            "kind": peer.kind.value,
            "rtt_s": peer.rtt_s,
            "bytes_sent": peer.bytes_sent,
            "bytes_received": peer.bytes_received,
        }
    return {
        "peer_id": card.peer_id,
        "name": card.name,
        "is_self": card.peer_id == node.peer_id,
        "is_live": is_live,
        "addresses": list(card.addresses),
        "max_blocks": card.max_blocks,
        "memory_bytes": card.memory_bytes,
        "version": card.version,
        "spans": {
            model.name: list(span)
            for model in node.catalog
            for route in node.planning.routes(model.digest)
            for stage, span in zip(route.stages, route.spans, strict=True)
            if card.peer_id in stage.peers
        },
        "link": link,
    }


def _models(node: Node) -> list[dict[str, Any]]:
    facts = []
    for entry in model_entries(node):
        local = node.catalog.by_digest(entry.digest)
        facts.append(
            {
                "name": entry.id,
                "digest": entry.digest,
                "context_length": entry.context_length,
                "is_local": local is not None,
                "is_ready": entry.is_ready,
                "why_not": None if entry.is_ready else node.planning.why_not(entry.digest),
                "engine": None if local is None else local.engine,
                "why_portable": None if local is None else local.why_portable,
            }
        )
    return facts


def _stages(node: Node) -> list[dict[str, Any]]:
    return [_part(node, held) for held in node.planning.loading if held.is_serving]


def _part(node: Node, held: Held) -> dict[str, Any]:
    """One stage or shard; seconds are those of all its steps together."""
    stage, member = held.stage, held.member
    facts: dict[str, Any] = {
        "plan": held.route.digest,
        "model": held.route.plan.model_digest,
        "stage": held.stage_idx,
        "span": list(held.route.spans[held.stage_idx]),
        "role": held.role,
        "members": list(stage.peers),
        "kv_heads": member.kv_heads,
        "mlp_columns": member.mlp_columns,
        "streamed_blocks": member.streamed_blocks,
        "disk_wait_s": round(held.stall_s, 6),
        "sum_wait_s": round(held.sum_wait_s, 6),
        "arrival_spread": None if held.group is None else held.group.spread(),
    }
    if held.spoke is not None:
        spoke = held.spoke
        return facts | {
            "forwards": spoke.n_runs,
            "received_bytes": 0,  # by links; the group's lanes are not counted here
            "compute_s": round(spoke.compute_s, 6),
            "kv_free_bytes": max(held.kv_bytes - spoke.leased_bytes, 0),
        }
    loaded = node.server.stages[held.route.digest]
    return facts | {
        "forwards": loaded.n_forwards,
        "received_bytes": loaded.received_bytes,
        "compute_s": round(loaded.compute_s, 6),
        "kv_free_bytes": loaded.leases.free_bytes,
    }
