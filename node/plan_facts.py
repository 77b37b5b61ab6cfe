"""The Pareto front of a model and which point of it runs, as JSON facts for `covey plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covey.partition.choose import Prefer, choose
from covey.partition.errors import PartitionError
from covey.partition.explain import bound_by
from covey.partition.plan import Prediction, StagePlan
from covey.partition.profile import Workload
from covey.partition.search import Candidate, Front, pareto_front

from .catalog import LocalModel
from .planning_state import ModelState
from .route import Route


def plan_facts(
    model: LocalModel,
    state: ModelState,
    *,
    live: frozenset[str],
    names: Mapping[str, str],
    workload: Workload,
    prefer: Prefer,
    active: Route | None,
    why_not: str,
) -> dict[str, Any]:
    """The front as it would be computed now, beside the plan that is active."""
    devices = {peer: device for peer, device in state.devices.items() if peer in live}
    front: Front | None = None
    infeasible: str | None = None
    try:
        front = pareto_front(model.layout, devices.values(), state.links, request=workload)
    except PartitionError as error:
        infeasible = str(error)
    chosen = choose(front, prefer) if front is not None else None

    def point(candidate: Candidate) -> dict[str, Any]:
        return {
            **_figures(candidate.stages, candidate.prediction, names),
            "bound_by": bound_by(
                candidate.stages, model.layout, devices, state.links, request=workload, names=names
            ),
            "is_chosen": candidate == chosen,
            "is_active": active is not None and candidate.stages == active.plan.stages,
        }

    single = front.best_single if front is not None else None
    return {
        "model": model.name,
        "digest": model.digest,
        "n_blocks": model.checkpoint.config.n_blocks,
        "prefer": prefer,
        "points": [point(candidate) for candidate in front.points] if front is not None else [],
        "is_exact": front.exact if front is not None else None,
        "infeasible": infeasible,
        "single": point(single) if single is not None else None,
        "no_single_because": front.no_single_because if front is not None else infeasible,
        "active": _active(active, names),
        "because": None if active is None else _because(active, chosen, prefer),
        "why_not": why_not if active is None else None,
    }


def _active(active: Route | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    if active is None:
        return None
    return {
        **_figures(active.plan.stages, active.plan.prediction, names),
        "epoch": active.epoch,
        "digest": active.digest,
        "proposer": active.plan.proposer,
    }


def _because(active: Route, chosen: Candidate | None, prefer: str) -> str:
    if chosen is None:
        return "the members that it needs are there, though no new plan could be made now"
    if chosen.stages == active.plan.stages:
        return f"the best for {prefer} of the plans above"
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
