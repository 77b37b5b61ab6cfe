"""One pipeline of a plan that this version of the engine can run, looked up once for every frame.

Sessions, their frames and their hidden states know stages by their place in the pipeline, and talk
to hubs only; the plan, by its digest, is what all pipelines have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from covey.partition.plan import LayerPlan, StagePlan
from covey.partition.scope import Scope
from covey.transport.errors import ErrorCode
from covey.transport.messages import Codec

from .engine.tensors import HIDDEN_DTYPES, NATIVE_KINDS, EngineDtype, EngineKind
from .errors import NodeError

_CODECS: dict[str, Codec] = {name: name for name in get_args(Codec)}
_ENGINES: dict[str, EngineKind] = {name: name for name in get_args(EngineKind)}


class UnsupportedPlan(NodeError):
    """A valid plan with a feature that this node's version does not have."""

    code = ErrorCode.UNKNOWN_PLAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The pipeline a session runs on: one hub per stage, codecs and engine that exist here."""

    plan: LayerPlan
    pipeline_idx: int
    digest: str  # of the plan
    epoch: int
    stages: tuple[StagePlan, ...]
    peers: tuple[str, ...]  # the hubs, one per stage
    members: frozenset[str]  # all peers, hubs included
    spans: tuple[tuple[int, int], ...]
    codecs: tuple[Codec, ...]  # one per border, head to head
    engine: EngineKind
    dtype: EngineDtype  # of its hidden states
    token_s: float = 1.0  # of a session alone, asked for here; only to choose between pipelines by

    @classmethod
    def of(cls, plan: LayerPlan, pipeline_idx: int = 0) -> Route:
        """Look one pipeline of a plan over.

        Raises:
            UnsupportedPlan: it has sparse attention, a group on an engine that has no groups, or a
                codec or engine of a newer version.
        """
        pipeline = plan.pipelines[pipeline_idx]
        if plan.index_pattern is not None:
            raise UnsupportedPlan("the plan has sparse attention; update this node")
        if plan.engine not in _ENGINES or not _CODECS.keys() >= set(pipeline.codecs):
            raise UnsupportedPlan("the plan has an engine or codec unknown here; update this node")
        dtype = HIDDEN_DTYPES[_ENGINES[plan.engine]]
        if dtype != "fp32" and any(stage.is_group for stage in pipeline.stages):
            raise UnsupportedPlan(f"the plan has groups, which engine {plan.engine} has not")
        return cls(
            plan=plan,
            pipeline_idx=pipeline_idx,
            digest=plan.digest,
            epoch=plan.epoch,
            stages=pipeline.stages,
            peers=tuple(stage.hub for stage in pipeline.stages),
            members=frozenset(pipeline.peers),
            spans=tuple((stage.span.start, stage.span.end) for stage in pipeline.stages),
            codecs=tuple(_CODECS[codec] for codec in pipeline.codecs),
            engine=_ENGINES[plan.engine],
            dtype=dtype,
        )

    @classmethod
    def for_member(cls, plan: LayerPlan, peer_id: str) -> Route:
        """The pipeline that `peer_id` is a member of. Raises UnsupportedPlan."""
        for idx, pipeline in enumerate(plan.pipelines):
            if peer_id in pipeline.peers:
                return cls.of(plan, idx)
        raise UnsupportedPlan("the plan has no stage for this member")

    @property
    def n_stages(self) -> int:
        """How many stages the pipeline has."""
        return len(self.peers)

    def stage_of(self, peer_id: str) -> int:
        """The place of the stage that `peer_id` is a member of; raises ValueError if of none."""
        for idx, stage in enumerate(self.stages):
            if peer_id in stage.peers:
                return idx
        raise ValueError(f"{peer_id} has no stage in this pipeline")

    def place_in_plan(self, stage_idx: int) -> int:
        """The place of a stage among those of all pipelines, as members say that it is ready."""
        before = self.plan.pipelines[: self.pipeline_idx]
        return sum(len(pipeline.stages) for pipeline in before) + stage_idx


def routes_of(plan: LayerPlan) -> tuple[Route, ...]:
    """One route for each pipeline. Raises UnsupportedPlan if one of them cannot be run."""
    return tuple(Route.of(plan, idx) for idx in range(len(plan.pipelines)))


def runnable(engine: EngineKind) -> Scope:
    """What plans for an engine may be made of: what `Route.of` and the engine take."""
    may_stream = engine in NATIVE_KINDS.values()
    if HIDDEN_DTYPES[engine] == "fp32":
        return Scope(may_stream=may_stream)
    return Scope(max_members=1, may_stream=may_stream)
