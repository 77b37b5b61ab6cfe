"""The Pareto front of a model and which point of it runs, as JSON facts for `covey plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covey.partition.choose import Prefer, choose
from covey.partition.errors import PartitionError
from covey.partition.explain import explain, verdict
from covey.partition.plan import Pipeline, Prediction
from covey.partition.search import Candidate, Front

from .pins import Pinned, pipelines_value
from .planning_state import Outlook
from .route import Route
from .service import PlanQuery


def plan_facts(
    outlook: Outlook, query: PlanQuery, *, names: Mapping[str, str], prefer: Prefer
) -> dict[str, Any]:
    """The plans worth having, beside the one that is active.

    Args:
        names: what people call the machines.
        prefer: what to choose by.
    """
    front, model, active = outlook.front, outlook.model, outlook.active
    infeasible = named(str(front), names) if isinstance(front, PartitionError) else None
    if isinstance(front, PartitionError):
        front = Front(points=(), best_single=None, no_single_because=infeasible, exact=True)
    chosen = choose(front, prefer) if front.points else None
    single = front.best_single

    def point(candidate: Candidate) -> dict[str, Any]:
        why = explain(
            candidate,
            front,
            model.layout,
            outlook.world.devices,
            outlook.world.links,
            prefer=prefer,
            request=outlook.world.request,
            names=names,
        )
        bound = why.bounds[0]  # of one session's token
        return {
            **_figures(candidate.pipelines, candidate.prediction, names),
            "bound_by": {
                "kind": bound.kind,
                "peers": [names.get(peer, peer[-8:]) for peer in bound.peers],
                "share": bound.share,
            },
            "why": list(why.lines),
            "is_chosen": why.is_chosen,
            "is_active": active is not None and candidate.pipelines == active.plan.pipelines,
        }

    pin = outlook.pinned
    return {
        "model": model.name,
        "digest": model.digest,
        "n_blocks": model.checkpoint.config.n_blocks,
        "prefer": prefer,
        "points": [
            {"n": idx, **point(candidate)} for idx, candidate in enumerate(front.points, start=1)
        ],
        "is_exact": front.exact,
        "infeasible": infeasible,
        "single": point(single) if single is not None else None,
        "no_single_because": named(front.no_single_because or "", names) or None,
        "active": _active(active, names),
        "pinned": None if pin is None else _pinned(pin, names),
        "because": None if active is None else _because(active, pin, chosen, prefer),
        "why_not": outlook.why_not if active is None else None,
    }


def named(text: str, names: Mapping[str, str]) -> str:
    """A sentence of the planner's, with names in place of peer ids."""
    for peer_id, name in names.items():
        text = text.replace(peer_id, name)
    return text


def _active(active: Route | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    if active is None:
        return None
    return {
        **_figures(active.plan.pipelines, active.plan.prediction, names),
        "epoch": active.epoch,
        "digest": active.digest,
        "proposer": active.plan.proposer,
    }


def _pinned(pin: Pinned, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "by": names.get(pin.author, pin.author[-8:]),
        "at": pin.at,
        "why_not": None if pin.why_not is None else named(pin.why_not, names),
        **pipelines_value(pin.pipelines, names),
    }


def _because(active: Route, pin: Pinned | None, chosen: Candidate | None, prefer: Prefer) -> str:
    if pin is not None and pin.pipelines == active.plan.pipelines:
        return "it is pinned"
    if chosen is None:
        return "the members that it needs are there, though no new plan could be made now"
    if chosen.pipelines == active.plan.pipelines:
        return verdict(chosen, chosen, prefer)
    return "what would be chosen now (+) is not better by enough to move"


def _figures(
    pipelines: Sequence[Pipeline], prediction: Prediction, names: Mapping[str, str]
) -> dict[str, Any]:
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    return {
        **pipelines_value(pipelines, names),
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
