"""Plans that a person pinned: from JSON and back, and whether one can run now.

The JSON names members as people do, by name or peer id; what is stored has peer ids only. Whether
a pin is the newest is for the store's view to say, and when it is acted on for the planner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from covey.partition.cost import Network, block_cap, member_bytes, price
from covey.partition.errors import InvalidPlan, PartitionError
from covey.partition.plan import (
    MAX_MEMBERS,
    MAX_PIPELINES,
    MAX_STAGES,
    Member,
    Pipeline,
    Prediction,
    Span,
    StagePlan,
    check_pipelines,
)
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout, Workload
from covey.partition.search import Candidate
from covey.store.schema import MAX_VERSION, Pin
from covey.store.views import Authored, Views

from .errors import InvalidRequest

Find = Callable[[str], str]  # the peer id of the member called so; raises InvalidRequest

_Text = Annotated[str, Meta(min_length=1, max_length=128)]
_Whole = Annotated[int, Meta(ge=0, le=1 << 30)]


class _MemberJson(msgspec.Struct, forbid_unknown_fields=True):
    name: _Text | None = None
    peer_id: _Text | None = None
    kv_heads: _Whole = 0
    mlp_columns: _Whole = 0
    streamed_blocks: _Whole = 0


class _StageJson(msgspec.Struct, forbid_unknown_fields=True):
    span: tuple[_Whole, _Whole]
    members: Annotated[list[_MemberJson], Meta(min_length=1, max_length=MAX_MEMBERS)]
    hub: _Text | None = None
    sum_codec: _Text = "fp16"


class _PipelineJson(msgspec.Struct, forbid_unknown_fields=True):
    stages: Annotated[list[_StageJson], Meta(min_length=1, max_length=MAX_STAGES)]
    codecs: Annotated[list[_Text], Meta(max_length=MAX_STAGES + 1)] | None = None


class _PlanJson(msgspec.Struct, forbid_unknown_fields=True):
    pipelines: Annotated[list[_PipelineJson], Meta(min_length=1, max_length=MAX_PIPELINES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """The newest pin of a model, seen from now."""

    author: str  # whose wish it is
    at: float  # unix seconds
    pipelines: tuple[Pipeline, ...]
    candidate: Candidate | None  # None: it cannot run now
    why_not: str | None  # then, in a phrase that names peer ids


def read_pipelines(value: object, layout: ModelLayout, find: Find) -> tuple[Pipeline, ...]:
    """The pipelines that a person's JSON asks for, checked against the model.

    Raises:
        InvalidRequest: names the part that is wrong, and how.
    """
    try:
        plan = msgspec.convert(value, _PlanJson)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise InvalidRequest(f"plan{where.rstrip('`')}", what[:1].lower() + what[1:]) from error
    pipelines = []
    for idx, pipeline in enumerate(plan.pipelines):
        where = f"plan.pipelines[{idx}]"
        stages = [
            _stage(stage, layout, find, f"{where}.stages[{stage_idx}]")
            for stage_idx, stage in enumerate(pipeline.stages)
        ]
        try:
            pipelines.append(Pipeline.of(stages, codecs=pipeline.codecs))
        except InvalidPlan as error:
            raise InvalidRequest(where, _reason(error)) from error
    try:
        check_pipelines(pipelines)
    except InvalidPlan as error:
        raise InvalidRequest("plan.pipelines", _reason(error)) from error
    if pipelines[0].n_blocks != layout.n_blocks:
        raise InvalidRequest(
            "plan.pipelines", f"must cover all {layout.n_blocks} blocks of the model"
        )
    return tuple(pipelines)


def pipelines_value(
    pipelines: Sequence[Pipeline], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON of pipelines, which `read_pipelines` reads; without `names`, by peer ids alone."""
    return {
        "pipelines": [
            {
                "stages": [_stage_value(stage, names) for stage in pipeline.stages],
                "codecs": list(pipeline.codecs),
            }
            for pipeline in pipelines
        ]
    }


def next_pin(
    views: Views, model_digest: str, pipelines: Sequence[Pipeline] | None, *, at: float
) -> Pin:
    """The record that pins `pipelines`, or nothing any more, over whatever was pinned."""
    newest = views.newest_pin(model_digest)
    return Pin(
        model=model_digest,
        version=1 if newest is None else min(newest.record.version + 1, MAX_VERSION),
        at=at,
        plan=None if pipelines is None else pipelines_value(pipelines),
    )


def pinned(
    entry: Authored[Pin] | None,
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Sequence[LinkProfile],
    workload: Workload,
) -> Pinned | None:
    """What a pin asks for and whether it can be done; None where nothing is pinned.

    A pin that does not check out is none: whoever published it is wrong.

    Args:
        devices: of the members that are alive and run the model on our engine.
    """
    if entry is None or entry.record.plan is None:
        return None
    try:
        pipelines = read_pipelines(entry.record.plan, layout, find=lambda peer_id: peer_id)
    except InvalidRequest:
        return None
    why_not = why_infeasible(pipelines, layout, devices)
    candidate = None
    if why_not is None:
        try:
            candidate = priced_candidate(pipelines, layout, devices, links, workload)
        except PartitionError as error:
            why_not = str(error)
    return Pinned(
        author=entry.author,
        at=entry.record.at,
        pipelines=pipelines,
        candidate=candidate,
        why_not=why_not,
    )


def why_infeasible(
    pipelines: Sequence[Pipeline], layout: ModelLayout, devices: Mapping[str, DeviceProfile]
) -> str | None:
    """Which member is missing or lacks room, in a phrase that names its peer id; None if none is.

    As with every plan, the KV cache is not judged: a session that has no room is refused.
    """
    for stage in (stage for pipeline in pipelines for stage in pipeline.stages):
        for idx, member in enumerate(stage.members):
            device = devices.get(member.peer_id)
            if device is None:
                return f"{member.peer_id} is not there, or does not offer the model on our engine"
            n_blocks, cap = stage.span.n_blocks, block_cap(device)
            if n_blocks > cap:
                return f"{member.peer_id} takes at most {cap} blocks, not {n_blocks}"
            missing = member_bytes(layout, stage, idx) - device.memory_bytes
            if missing > 0:
                return f"{member.peer_id} lacks {missing / 1e6:.1f} MB for {n_blocks} blocks"
    return None


def priced_candidate(
    pipelines: Sequence[Pipeline],
    layout: ModelLayout,
    devices: Mapping[str, DeviceProfile],
    links: Sequence[LinkProfile],
    workload: Workload,
) -> Candidate:
    """Pipelines with what they should do by the profiles of now.

    Raises:
        PartitionError: the profiles do not say.
    """
    network = Network(links)
    parts = [
        price(
            pipeline.stages,
            layout,
            devices,
            network,
            request=workload,
            codecs=pipeline.codecs,
        ).prediction()
        for pipeline in pipelines
    ]
    prediction = Prediction(
        ttft_s=min(part.ttft_s for part in parts),
        tpot_s=min(part.tpot_s for part in parts),
        throughput_tok_per_s=sum(part.throughput_tok_per_s for part in parts),
        memory_bytes=tuple(entry for part in parts for entry in part.memory_bytes),
    )
    return Candidate(pipelines=tuple(pipelines), prediction=prediction)


def _stage(stage: _StageJson, layout: ModelLayout, find: Find, where: str) -> StagePlan:
    called: dict[str, str] = {}  # what the file calls a member -> its peer id
    members = []
    for idx, member in enumerate(stage.members):
        text = member.peer_id or member.name
        if text is None:
            raise InvalidRequest(f"{where}.members[{idx}]", "needs a name or a peer_id")
        peer_id = find(text)
        called |= {said: peer_id for said in (member.name, member.peer_id, peer_id) if said}
        try:
            members.append(
                Member(peer_id, member.kv_heads, member.mlp_columns, member.streamed_blocks)
            )
        except InvalidPlan as error:
            raise InvalidRequest(f"{where}.members[{idx}]", _reason(error)) from error
    if stage.hub is not None and stage.hub not in called:
        raise InvalidRequest(f"{where}.hub", f"{stage.hub!r} is none of the stage's members")
    members.sort()  # the order of ranks, by peer id: the same however the file lists them
    hub = called[stage.hub] if stage.hub is not None else members[0].peer_id
    hub_idx = [member.peer_id for member in members].index(hub)
    try:
        made = StagePlan(Span(*stage.span), tuple(members), hub_idx, stage.sum_codec)
        made.check_shares(layout)
    except InvalidPlan as error:
        raise InvalidRequest(where, _reason(error)) from error
    return made


def _stage_value(stage: StagePlan, names: Mapping[str, str] | None) -> dict[str, Any]:
    return {
        "span": [stage.span.start, stage.span.end],
        "members": [
            {
                **({} if names is None else {"name": names.get(member.peer_id)}),
                "peer_id": member.peer_id,
                "kv_heads": member.kv_heads,
                "mlp_columns": member.mlp_columns,
                "streamed_blocks": member.streamed_blocks,
            }
            for member in stage.members
        ],
        "hub": stage.hub if names is None else _hub_name(stage, names),
        "sum_codec": stage.sum_codec,
    }


def _hub_name(stage: StagePlan, names: Mapping[str, str]) -> str:
    """What people call the hub, unless another member of the stage is called the same."""
    called = [names.get(peer_id) for peer_id in stage.peers]
    name = names.get(stage.hub)
    return name if name is not None and called.count(name) == 1 else stage.hub


def _reason(error: InvalidPlan) -> str:
    """An error of the planner's without the "plan." that the place already says."""
    return str(error).removeprefix("plan.")
