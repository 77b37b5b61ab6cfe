"""Which plan is active, who proposes the next one, and when it is worth it: D8 without a leader.

Pure functions of the replicated state and of who is alive; two members with the same state get
the same answer. Nothing here depends on one node's settings: all readers score with the default
`Workload` and the balanced cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from .choose import Prefer, cost, priced, score
from .cost import Network, block_cap, member_bytes
from .errors import InvalidPlan
from .plan import LayerPlan, Prediction, StagePlan
from .profile import DeviceProfile, LinkProfile, ModelLayout

__all__ = [
    "Ready",
    "active_plan",
    "highest_active_epoch",
    "is_ready",
    "priced",
    "proposer_for",
    "should_propose",
    "should_replace",
    "transfer_s",
    "valid_proposals",
]

PROPOSER_SILENT_S = 5.0  # then the next member proposes; and anybody for a model without a plan
PENDING_S = 60.0  # how long a proposal may take to load before it counts as stuck
HYSTERESIS = 0.15  # a new plan must be better by this share to be worth moving to
HORIZON_S = 600.0  # arbitrary: a move has to earn its transfer back within ten minutes of use

Ready = Mapping[str, Collection[str]]  # plan digest -> peers that said ready


def is_ready(plan: LayerPlan, ready: Ready) -> bool:
    """Whether every member of every stage has said ready."""
    return set(plan.peers) <= set(ready.get(plan.digest, ()))


def highest_active_epoch(plans: Iterable[LayerPlan], ready: Ready) -> int:
    """The highest epoch of a plan that became active; 0 if none did.

    A plan that all its stages are ready for counts, whatever its epoch and whoever is alive. So a
    member that was away catches up; and to push the epoch, members have to hold a whole model
    between them and say so, and each of them can be revoked.
    """
    return max((plan.epoch for plan in plans if is_ready(plan, ready)), default=0)


def valid_proposals(
    plans: Sequence[LayerPlan],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    ready: Ready,
    *,
    members: Collection[str] | None = None,
) -> list[LayerPlan]:
    """The plans that may be loaded, newest epoch first; their order and repeats do not matter.

    Left out: epochs that run ahead of the highest active one by more than one, plans that name or
    come from somebody outside `members` (where given; a plan's proposer has been checked against
    its document's author by then), members without a profile, shares of a group that are not all
    of each block, and members that would hold more blocks or weights than their device's owner
    gives, what streams from disk apart. The KV cache is not judged here: how much context there
    shall be room for is one node's setting, and a session that has no room is refused.
    """
    known = [
        plan
        for plan in {plan.digest: plan for plan in plans}.values()
        if members is None or {plan.proposer, *plan.peers} <= set(members)
    ]
    newest = highest_active_epoch(known, ready) + 1
    valid = [
        plan
        for plan in known
        if plan.epoch <= newest
        and plan.model_digest == layout.digest
        and plan.n_blocks == layout.n_blocks
        and _fits(plan, layout, devices)
    ]
    return sorted(valid, key=lambda plan: (-plan.epoch, plan.digest))


def active_plan(
    valid: Iterable[LayerPlan],
    ready: Ready,
    live: Collection[str],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Sequence[LinkProfile],
) -> LayerPlan | None:
    """The plan that sessions use now: of those that are ready and alive, the highest epoch, then
    the best score, then the lowest digest."""
    usable = [plan for plan in valid if is_ready(plan, ready) and set(plan.peers) <= set(live)]
    return min(
        usable,
        key=lambda plan: (
            -plan.epoch,
            score(plan, layout, devices.values(), links),
            plan.digest,
        ),
        default=None,
    )


def proposer_for(
    live: Collection[str], *, now: float, silent_since: Mapping[str, float] | None = None
) -> str | None:
    """The live member whose turn it is to propose; None while nobody is alive.

    Args:
        live: the members heard of lately.
        now: seconds, of the same clock as `silent_since`.
        silent_since: since when a member has owed a proposal without making one.
    """
    since = silent_since or {}
    awake = [peer for peer in live if now - since.get(peer, now) < PROPOSER_SILENT_S]
    return min(awake or live, default=None)


def should_propose(
    own: str,
    live: Collection[str],
    *,
    pending_for_s: float | None,
    uncovered_for_s: float | None,
    silent_for_s: Mapping[str, float] | None = None,
) -> bool:
    """Whether it is this node's turn to propose.

    Args:
        own: this node, which is alive.
        live: the members heard of lately.
        pending_for_s: how long the newest proposal that is not active has been loading; None if
            there is none.
        uncovered_for_s: how long the model has had no active plan; None if it has one.
        silent_for_s: for how long a member has owed a proposal without making one.
    """
    if pending_for_s is not None and pending_for_s < PENDING_S:
        return False
    silent_since = {peer: -silent_s for peer, silent_s in (silent_for_s or {}).items()}
    if own == (proposer_for(live, now=0.0, silent_since=silent_since) or own):
        return True
    return uncovered_for_s is not None and uncovered_for_s > PROPOSER_SILENT_S


def should_replace(
    active_now: Prediction | None,
    new: Prediction,
    prefer: Prefer,
    *,
    transfer_s: float = 0.0,
    horizon_s: float = HORIZON_S,
) -> bool:
    """Whether a new plan is enough better than what the active one does by now's profiles.

    Better by more than `HYSTERESIS`, and the time it saves in `horizon_s` of steady use is more
    than the `transfer_s` (see there) that it takes to get its weights in place.
    """
    if active_now is None:
        return True
    saved = 1.0 - cost(new, prefer) / cost(active_now, prefer)
    return saved > HYSTERESIS and saved * horizon_s > transfer_s


def transfer_s(
    active: LayerPlan | None,
    new: LayerPlan,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Iterable[LinkProfile],
) -> float:
    """Seconds until every member of `new` holds its part of its blocks; members load side by side.

    What a member runs already costs nothing, and of a block whose share grows only the rest has to
    come. It comes over its fastest link from a member of `active` and through its disk, whichever
    is slower; without such a link it is taken to be on its disk. Infinite when a member has no
    profile.
    """
    network = Network(links)
    return max(
        _load_s(stage, idx, active, layout, devices, network)
        for stage in new.stages
        for idx in range(len(stage.members))
    )


def _load_s(
    stage: StagePlan,
    idx: int,
    active: LayerPlan | None,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    network: Network,
) -> float:
    peer_id = stage.members[idx].peer_id
    if peer_id not in devices:
        return math.inf
    held = active.stage_of(peer_id) if active is not None else None
    n_bytes = _missing_bytes(stage, idx, held, layout)
    sources = active.peers if active is not None else ()
    incoming = [network.link(source, peer_id) for source in sources if source != peer_id]
    rates = [link.bandwidth_bytes_per_s for link in incoming if link is not None]
    return n_bytes / min(max(rates, default=math.inf), devices[peer_id].disk_bytes_per_s)


def _missing_bytes(
    stage: StagePlan, idx: int, held: StagePlan | None, layout: ModelLayout
) -> float:
    """Bytes of a member's part of its blocks that it does not hold as a member of `held`."""
    wanted = _part_of(stage, idx, layout)
    known = None
    if held is not None:
        known = _part_of(held, held.peers.index(stage.members[idx].peer_id), layout)
    n_bytes = 0.0
    for block_idx in range(stage.span.start, stage.span.end):
        is_held = held is not None and held.span.start <= block_idx < held.span.end
        missing = _missing_share(wanted, known if is_held else None, layout)
        n_bytes += layout.block_bytes[block_idx] * missing
    return n_bytes


_Part = tuple[tuple[float, float], tuple[float, float]]  # of the attention, of the MLP; from 0 to 1


def _part_of(stage: StagePlan, idx: int, layout: ModelLayout) -> _Part:
    if not stage.is_group:
        return (0.0, 1.0), (0.0, 1.0)
    n_heads, n_columns = max(layout.n_kv_heads, 1), max(layout.mlp_columns, 1)
    heads, columns = stage.kv_heads_of(idx), stage.mlp_columns_of(idx)
    return (
        (heads[0] / n_heads, heads[1] / n_heads),
        (columns[0] / n_columns, columns[1] / n_columns),
    )


def _missing_share(wanted: _Part, known: _Part | None, layout: ModelLayout) -> float:
    """The share of a block's bytes that `wanted` has and `known` has not."""
    weights = (layout.attention_share, 1.0 - layout.attention_share)
    share = 0.0
    for i, weight in enumerate(weights):
        start, end = wanted[i]
        overlap = 0.0
        if known is not None:
            overlap = max(0.0, min(end, known[i][1]) - max(start, known[i][0]))
        share += weight * (end - start - overlap)
    return share


def _fits(plan: LayerPlan, layout: ModelLayout, devices: Mapping[str, DeviceProfile]) -> bool:
    """Whether all its members have profiles and give what their parts take, the KV cache apart."""
    for stage in plan.stages:
        try:
            stage.check_shares(layout)
        except InvalidPlan:
            return False
        for idx, member in enumerate(stage.members):
            device = devices.get(member.peer_id)
            if device is None or device.engine != plan.engine:
                return False
            n_bytes = member_bytes(layout, stage, idx)
            if stage.span.n_blocks > block_cap(device) or n_bytes > device.memory_bytes:
                return False
    return True
