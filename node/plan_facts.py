"""The Pareto front of a model and which point of it runs, as JSON facts for `covey plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covey.partition.choose import Prefer, choose
from covey.partition.errors import PartitionError
from covey.partition.explain import explain, verdict
from covey.partition.plan import Prediction, StagePlan
from covey.partition.profile import DeviceProfile, Workload
from covey.partition.search import Candidate, Front

from .catalog import LocalModel
from .planning_state import ModelState
from .route import Route


def plan_facts(
    model: LocalModel,
    state: ModelState,
    *,
    devices: Mapping[str, DeviceProfile],
    front: Front | PartitionError,
    names: Mapping[str, str],
    workload: Workload,
    prefer: Prefer,
    active: Route | None,
    why_not: str,
) -> dict[str, Any]:
    """The plans worth having, beside the one that is active.

    Args:
        devices: profiles of the members that are alive.
        front: what `devices` and the links of `state` lead to, or why there is none.
        names: what people call the machines.
        why_not: why no plan is active, if none is.
    """
    infeasible = _named(str(front), names) if isinstance(front, PartitionError) else None
    if isinstance(front, PartitionError):
        front = Front(points=(), best_single=None, no_single_because=infeasible, exact=True)
    chosen = choose(front, prefer) if front.points else None
    single = front.best_single

    def point(candidate: Candidate) -> dict[str, Any]:
        why = explain(
            candidate,
            front,
            model.layout,
            devices,
            state.links,
            prefer=prefer,
            request=workload,
            names=names,
        )
        bound = why.bounds[0]  # of one session's token
        return {
            **_figures(candidate.stages, candidate.prediction, names),
            "bound_by": {
                "kind": bound.kind,
                "peers": [names.get(peer, peer[-8:]) for peer in bound.peers],
                "share": bound.share,
            },
            "why": list(why.lines),
            "is_chosen": why.is_chosen,
            "is_active": active is not None and candidate.pipelines == active.plan.pipelines,
        }

    return {
        "model": model.name,
        "digest": model.digest,
        "n_blocks": model.checkpoint.config.n_blocks,
        "prefer": prefer,
        "points": [point(candidate) for candidate in front.points],
        "is_exact": front.exact,
        "infeasible": infeasible,
        "single": point(single) if single is not None else None,
        "no_single_because": _named(front.no_single_because or "", names) or None,
        "active": _active(active, names),
        "because": None if active is None else _because(active, chosen, prefer),
        "why_not": why_not if active is None else None,
    }


def _named(text: str, names: Mapping[str, str]) -> str:
    """A sentence of the planner's, with names in place of peer ids."""
    for peer_id, name in names.items():
        text = text.replace(peer_id, name)
    return text


def _active(active: Route | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    if active is None:
        return None
    return {
        **_figures(active.plan.stages, active.plan.prediction, names),
        "epoch": active.epoch,
        "digest": active.digest,
        "proposer": active.plan.proposer,
    }


def _because(active: Route, chosen: Candidate | None, prefer: Prefer) -> str:
    if chosen is None:
        return "the members that it needs are there, though no new plan could be made now"
    if chosen.pipelines == active.plan.pipelines:
        return verdict(chosen, chosen, prefer)
    return "what would be chosen now (+) is not better by enough to move"


def _figures(
    stages: Sequence[StagePlan], prediction: Prediction, names: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "stages": [
            {
                "peer_id": stage.hub,
                "name": names.get(stage.hub, stage.hub[-8:]),
                "span": [stage.span.start, stage.span.end],
            }
            for stage in stages
        ],
        "ttft_s": prediction.ttft_s,
        "tpot_s": prediction.tpot_s,
        "throughput_tok_per_s": prediction.throughput_tok_per_s,
        "memory_bytes": dict(prediction.memory_bytes),
    }
