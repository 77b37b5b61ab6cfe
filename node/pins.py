"""Plans that a person pinned: from JSON and back, and whether one can run now.

The JSON names members as people do, by name or peer id; what is stored has peer ids only. Whether
a pin is the newest is for the store's view to say, and when it is acted on for the planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from covey.partition.codecs import codecs_for
from covey.partition.errors import InvalidPlan, PartitionError
from covey.partition.evaluate import World, evaluate
from covey.partition.front.search import Candidate
from covey.partition.group import group_term
from covey.partition.memory import block_cap, member_bytes
from covey.partition.network import Network
from covey.partition.plan import (
    MAX_MEMBERS,
    MAX_PIPELINES,
    MAX_STAGES,
    SUM_CODECS,
    Member,
    Pipeline,
    Span,
    StagePlan,
    check_pipelines,
)
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


def read_pipelines(value: object, world: World, find: Find) -> tuple[Pipeline, ...]:
    """The pipelines that a person's JSON asks for, checked against the model.

    What is left open, shares of a group and codecs, becomes what the planner would take.

    Raises:
        InvalidRequest: names the part that is wrong, and how.
    """
    try:
        plan = msgspec.convert(value, _PlanJson)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise InvalidRequest(f"plan{where.rstrip('`')}", what[:1].lower() + what[1:]) from error
    pipelines = [
        _pipeline(pipeline, world, find, f"plan.pipelines[{idx}]")
        for idx, pipeline in enumerate(plan.pipelines)
    ]
    with _named("plan.pipelines"):
        check_pipelines(pipelines)
    n_blocks = world.layout.n_blocks
    if pipelines[0].n_blocks != n_blocks:
        raise InvalidRequest("plan.pipelines", f"must cover all {n_blocks} blocks of the model")
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


def pinned(entry: Authored[Pin] | None, world: World) -> Pinned | None:
    """What a pin asks for and whether it can be done; None where nothing is pinned.

    A pin that does not check out is none: whoever published it is wrong.

    Args:
        world: its devices are the members that are alive and run the model on our engine.
    """
    if entry is None or entry.record.plan is None:
        return None
    try:
        pipelines = read_pipelines(entry.record.plan, world, find=lambda peer_id: peer_id)
    except InvalidRequest:
        return None
    why_not, candidate = why_infeasible(pipelines, world), None
    if why_not is None:
        try:
            candidate = evaluate(pipelines, world)
        except PartitionError as error:
            why_not = str(error)
    return Pinned(
        author=entry.author,
        at=entry.record.at,
        pipelines=pipelines,
        candidate=candidate,
        why_not=why_not,
    )


def why_infeasible(pipelines: Sequence[Pipeline], world: World) -> str | None:
    """Which member is missing or lacks room, in a phrase that names its peer id; None if none is.

    As with every plan, the KV cache is not judged: a session that has no room is refused.
    """
    for stage in (stage for pipeline in pipelines for stage in pipeline.stages):
        for idx, member in enumerate(stage.members):
            device = world.devices.get(member.peer_id)
            if device is None:
                return f"{member.peer_id} is not there, or does not offer the model on our engine"
            n_blocks, cap = stage.span.n_blocks, block_cap(device)
            if n_blocks > cap:
                return f"{member.peer_id} takes at most {cap} blocks, not {n_blocks}"
            missing = member_bytes(world.layout, stage, idx) - device.memory_bytes
            if missing > 0:
                return f"{member.peer_id} lacks {missing / 1e6:.1f} MB for {n_blocks} blocks"
    return None


def _pipeline(pipeline: _PipelineJson, world: World, find: Find, where: str) -> Pipeline:
    stages = [
        _stage(stage, world, find, f"{where}.stages[{idx}]")
        for idx, stage in enumerate(pipeline.stages)
    ]
    codecs = pipeline.codecs
    if codecs is None:
        hubs, network = [stage.hub for stage in stages], Network(world.links)
        codecs = [*codecs_for(hubs, world.layout, network.link, world.request)]
    with _named(where):
        return Pipeline.of(stages, codecs=codecs)


def _stage(stage: _StageJson, world: World, find: Find, where: str) -> StagePlan:
    called: dict[str, str] = {}  # what the file calls a member -> its peer id
    members = []
    for idx, member in enumerate(stage.members):
        text = member.peer_id or member.name
        if text is None:
            raise InvalidRequest(f"{where}.members[{idx}]", "needs a name or a peer_id")
        peer_id = find(text)
        called |= {said: peer_id for said in (member.name, member.peer_id, peer_id) if said}
        with _named(f"{where}.members[{idx}]"):
            members.append(
                Member(peer_id, member.kv_heads, member.mlp_columns, member.streamed_blocks)
            )
    if stage.hub is not None and stage.hub not in called:
        raise InvalidRequest(f"{where}.hub", f"{stage.hub!r} is none of the stage's members")
    members.sort()  # the order of ranks, by peer id: the same however the file lists them
    hub = called[stage.hub] if stage.hub is not None else members[0].peer_id
    if len(members) > 1 and not any(member.kv_heads or member.mlp_columns for member in members):
        members = _shared_out(members, world, hub, stage.sum_codec, where)
    hub_idx = [member.peer_id for member in members].index(hub)
    with _named(where):
        made = StagePlan(Span(*stage.span), tuple(members), hub_idx, stage.sum_codec)
        made.check_shares(world.layout)
    return made


def _shared_out(
    members: Sequence[Member], world: World, hub: str, sum_codec: str, where: str
) -> list[Member]:
    """The members with the shares that the planner would give them."""
    devices = [world.devices.get(member.peer_id) for member in members]
    term = None
    if sum_codec in SUM_CODECS and all(devices):
        known = [device for device in devices if device is not None]
        network = Network(world.links)
        term = group_term(world.layout, known, network, world.request, hub=hub, sum_codec=sum_codec)
    if term is None:
        raise InvalidRequest(where, "give the group's shares: none follow from what is measured")
    return [
        replace(shared, streamed_blocks=member.streamed_blocks)
        for shared, member in zip(term.members, members, strict=True)
    ]


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Let errors of the planner name the part of the JSON they are about."""
    try:
        yield
    except InvalidPlan as error:
        raise InvalidRequest(where, str(error).removeprefix("plan.")) from error


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
