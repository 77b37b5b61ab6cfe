"""A plan that this version of the engine can run, with what every frame needs looked up once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from covey.partition.plan import LayerPlan
from covey.partition.scope import CHAINS
from covey.transport.errors import ErrorCode
from covey.transport.messages import Codec

from .engine.tensors import HIDDEN_DTYPES, EngineDtype, EngineKind
from .errors import NodeError

_CODECS: dict[str, Codec] = {name: name for name in get_args(Codec)}
_ENGINES: dict[str, EngineKind] = {name: name for name in get_args(EngineKind)}

RUNNABLE = CHAINS  # what this version plans for: what `Route.of` takes


class UnsupportedPlan(NodeError):
    """A valid plan with a feature that this node's version does not have."""

    code = ErrorCode.UNKNOWN_PLAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The plan a session uses: one peer per stage, codecs and engine that exist here."""

    plan: LayerPlan
    digest: str
    epoch: int
    peers: tuple[str, ...]  # one per stage
    spans: tuple[tuple[int, int], ...]
    codecs: tuple[Codec, ...]  # one per border, head to head
    engine: EngineKind
    dtype: EngineDtype  # of its hidden states

    @classmethod
    def of(cls, plan: LayerPlan) -> Route:
        """Look a plan over.

        Raises:
            UnsupportedPlan: it has groups, sparse attention, or a codec or engine of a newer
                version.
        """
        pipeline = plan.pipelines[0]
        if any(stage.is_group for stage in plan.stages) or plan.index_pattern is not None:
            raise UnsupportedPlan("the plan has groups or sparse attention; update this node")
        if plan.engine not in _ENGINES or not _CODECS.keys() >= set(pipeline.codecs):
            raise UnsupportedPlan("the plan has an engine or codec unknown here; update this node")
        return cls(
            plan=plan,
            digest=plan.digest,
            epoch=plan.epoch,
            peers=plan.peers,
            spans=tuple((stage.span.start, stage.span.end) for stage in plan.stages),
            codecs=tuple(_CODECS[codec] for codec in pipeline.codecs),
            engine=_ENGINES[plan.engine],
            dtype=HIDDEN_DTYPES[_ENGINES[plan.engine]],
        )

    @property
    def n_stages(self) -> int:
        """How many stages the pipeline has."""
        return len(self.peers)
