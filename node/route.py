"""A plan that this version of the engine can run, with what every frame needs looked up once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from covey.partition.plan import LayerPlan
from covey.transport.errors import ErrorCode
from covey.transport.messages import Codec

from .engine.tensors import EngineDtype
from .errors import NodeError

_CODECS: dict[str, Codec] = {name: name for name in get_args(Codec)}
_DTYPES: dict[str, EngineDtype] = {"fp32": "fp32", "bf16": "bf16"}


class UnsupportedPlan(NodeError):
    """A valid plan with a feature that this node's version does not have."""

    code = ErrorCode.UNKNOWN_PLAN


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The plan a session uses: one peer per stage, codecs and dtype that exist here."""

    plan: LayerPlan
    digest: str
    epoch: int
    peers: tuple[str, ...]  # one per stage
    spans: tuple[tuple[int, int], ...]
    codecs: tuple[Codec, ...]  # one per border, head to head
    dtype: EngineDtype

    @classmethod
    def of(cls, plan: LayerPlan) -> Route:
        """Look a plan over.

        Raises:
            UnsupportedPlan: it has groups, sparse attention, or a codec or dtype of a newer
                version.
        """
        if any(len(stage.members) != 1 for stage in plan.stages) or plan.index_pattern is not None:
            raise UnsupportedPlan("the plan has groups or sparse attention; update this node")
        if plan.dtype not in _DTYPES or not _CODECS.keys() >= set(plan.codecs):
            raise UnsupportedPlan("the plan has a dtype or codec unknown here; update this node")
        return cls(
            plan=plan,
            digest=plan.digest,
            epoch=plan.epoch,
            peers=plan.peers,
            spans=tuple((stage.span.start, stage.span.end) for stage in plan.stages),
            codecs=tuple(_CODECS[codec] for codec in plan.codecs),
            dtype=_DTYPES[plan.dtype],
        )

    @property
    def n_stages(self) -> int:
        """How many stages the pipeline has."""
        return len(self.peers)
