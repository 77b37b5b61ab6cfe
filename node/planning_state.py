"""What the replicated state says about one model: who could run what, what is proposed and ready.

Pure reading: records that do not check out, or speak for somebody else, are left out here, so
that the planner sees sound values only.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from covey.partition.errors import PartitionError
from covey.partition.evaluate import World
from covey.partition.front.search import Front
from covey.partition.observed import Observation, corrected
from covey.partition.plan import LayerPlan, PlanLimits
from covey.partition.profile import DeviceProfile, LinkProfile, Workload
from covey.store.schema import Pin, PlanRecord, ProfileRecord
from covey.store.views import Authored, Views

from .catalog import LocalModel
from .pins import Pinned
from .route import Route, runnable

EXPERIENCE_S = 3600.0  # what was seen longer ago is forgotten, and its subject has another chance
AHEAD_S = 600.0  # how far a clock may be ahead of ours
MAX_PROPOSALS = 8  # per proposer and model, newest first; an honest one has two or three


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model in the eyes of this replica."""

    devices: Mapping[str, DeviceProfile]  # by peer, as slow as others find them
    links: tuple[LinkProfile, ...]
    plans: tuple[LayerPlan, ...]
    ready: Mapping[str, frozenset[str]]  # plan digest -> peers whose stage is ready
    pin: Authored[Pin] | None = None
    claimed: Mapping[str, DeviceProfile] = field(default_factory=dict)  # as they say themselves

    def slowness(self, peer_id: str) -> float:
        """How many times slower than it says others find a member; 1 where nobody complains."""
        device, claimed = self.devices.get(peer_id), self.claimed.get(peer_id)
        if device is None or claimed is None:
            return 1.0
        return device.decode_s_per_block / claimed.decode_s_per_block


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """One model as the planner of this node sees it now: what `covey plan` is made of."""

    model: LocalModel
    state: ModelState
    world: World
    front: Front | PartitionError  # what the world leads to, or why it leads nowhere
    active: Route | None
    why_not: str  # no plan is active, if none is
    pinned: Pinned | None


def read_state(views: Views, model_digest: str, n_blocks: int, *, unix_time: float) -> ModelState:
    """Everything published about a model, in a fixed order."""
    claimed: dict[str, DeviceProfile] = {}
    links: list[LinkProfile] = []
    for entry in views.profiles():
        if entry.record.kind == "device":
            profile = _device_of(entry.record.value, entry.author, model_digest)
            if profile is not None:
                claimed[entry.author] = profile
        elif (link := _link_of(entry.record, entry.author)) is not None:
            links.append(link)
    plans: list[LayerPlan] = []
    for record in views.plans(model_digest):
        plan = _plan_of(record, n_blocks)
        if plan is not None:
            plans.append(plan)
    plans.sort(key=lambda plan: (-plan.epoch, plan.digest))
    plans = _without_floods(plans)
    ready = {plan.digest: _ready_peers(views, plan) for plan in plans}
    pin = views.newest_pin(model_digest)
    observations = _observations(views, model_digest, unix_time)
    devices = {peer: corrected(device, observations) for peer, device in claimed.items()}
    return ModelState(devices, tuple(links), tuple(plans), ready, pin, claimed)


def world_of(
    model: LocalModel, state: ModelState, live: Collection[str], workload: Workload
) -> World:
    """What can be planned with: the live members that run the model on our engine."""
    devices = {
        peer: device
        for peer, device in state.devices.items()
        if peer in live and device.engine == model.engine
    }
    return World(
        layout=model.layout,
        devices=devices,
        links=state.links,
        request=workload,
        scope=runnable(model.engine),
    )


def device_record(profiles: Mapping[str, DeviceProfile]) -> ProfileRecord:
    """This node's device profiles, by model digest, as one record."""
    value = {digest: profile.to_value() for digest, profile in profiles.items()}
    return ProfileRecord(kind="device", value=value)


def link_record(profile: LinkProfile) -> ProfileRecord:
    """One measured link as a record."""
    return ProfileRecord(kind="link", value=profile.to_value(), peer=profile.b)


def plan_record(plan: LayerPlan) -> PlanRecord:
    """A proposal as a record; the plan travels in its one canonical encoding."""
    return PlanRecord(
        plan={"msgpack": base64.b64encode(plan.encode()).decode()},
        digest=plan.digest,
        model=plan.model_digest,
        epoch=plan.epoch,
        proposer=plan.proposer,
    )


def _device_of(value: Mapping[str, Any], author: str, model: str) -> DeviceProfile | None:
    if model not in value:
        return None
    try:
        profile = DeviceProfile.from_value(value[model])
    except PartitionError:
        return None
    return profile if (profile.peer_id, profile.model_digest) == (author, model) else None


def _link_of(record: ProfileRecord, author: str) -> LinkProfile | None:
    try:
        profile = LinkProfile.from_value(record.value)
    except PartitionError:
        return None
    return profile if (profile.a, profile.b) == (author, record.peer) else None


def _observations(views: Views, model_digest: str, unix_time: float) -> list[Observation]:
    return [
        Observation(
            observer=entry.author,
            peer_id=peer_id,
            decode_s_per_block=seen.decode_s_per_block,
            n_sessions=seen.n_sessions,
        )
        for entry in views.experiences(model_digest)
        for peer_id, seen in entry.record.peers.items()
        if -AHEAD_S < unix_time - seen.at < EXPERIENCE_S
    ]


def _plan_of(record: PlanRecord, n_blocks: int) -> LayerPlan | None:
    encoded = record.plan.get("msgpack")
    if not isinstance(encoded, str):
        return None
    try:
        data = base64.b64decode(encoded, validate=True)
        plan = LayerPlan.decode(data, PlanLimits(n_blocks=n_blocks))
    except (ValueError, PartitionError):  # base64 raises ValueError for letters beyond ASCII
        return None
    said = (record.digest, record.model, record.epoch, record.proposer)
    is_same = said == (plan.digest, plan.model_digest, plan.epoch, plan.proposer)
    return plan if is_same else None


def _without_floods(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The first few of each proposer, so that none can crowd out the others."""
    counts: Counter[str] = Counter()
    kept: list[LayerPlan] = []
    for plan in plans:
        counts[plan.proposer] += 1
        if counts[plan.proposer] <= MAX_PROPOSALS:
            kept.append(plan)
    return kept


def _ready_peers(views: Views, plan: LayerPlan) -> frozenset[str]:
    return frozenset(
        entry.author
        for entry in views.ready(plan.digest)
        if entry.record.stage_idx < len(plan.stages)
        and any(
            member.peer_id == entry.author for member in plan.stages[entry.record.stage_idx].members
        )
    )
