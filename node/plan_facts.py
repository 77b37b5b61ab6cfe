"""What `covey plan` shows, as JSON facts: a model's front, which point runs, and why no other.

Pure: an outlook and a question in, facts out. Some questions are searches of their own and take
seconds, so whoever asks does it beside the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from covey.partition.advice.explain import BoundKind, compare, explain, verdict
from covey.partition.advice.improve import Improvement, improvements, replanned
from covey.partition.advice.left_out import why_left_out
from covey.partition.choose import Choice, Limits, Prefer, choose_within, cost
from covey.partition.errors import PartitionError
from covey.partition.evaluate import World, evaluate, front_or_reason
from covey.partition.front.search import Candidate, Front
from covey.partition.plan import Pipeline, Prediction

from .pins import Pinned, pipelines_value
from .planning_state import ModelState, Outlook
from .route import Route
from .service import PlanQuery

MAX_IMPROVED = 40  # points of a front that are each told what would help; the chosen one always is

Names = Mapping[str, str]  # peer id -> what people call the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A query with everything looked up that only a node can look up."""

    query: PlanQuery
    prefer: Prefer
    names: Names
    why: str | None = None  # peer id
    why_unplanned: str | None = None  # why that one has no say in plans at all, in a sentence
    what_if: World | None = None  # after the changes that the query names
    what_if_names: Names | None = None  # of the devices that they add


def plan_facts(outlook: Outlook, question: Question) -> dict[str, Any]:
    """The plans worth having, beside the one that is active, and answers to what else is asked."""
    query = question.query
    world = _for_workload(outlook.world, query)
    front = outlook.front if world == outlook.world else front_or_reason(world)
    shown = _Shown(front, world, question, outlook.active)
    active, pin = outlook.active, outlook.pinned
    return {
        "model": outlook.model.name,
        "digest": outlook.model.digest,
        "n_blocks": world.layout.n_blocks,
        "prefer": question.prefer,
        "limits": {
            "max_ttft_s": query.max_ttft_s,
            "min_throughput_tok_per_s": query.min_throughput_tok_per_s,
        },
        "workload": {
            "prompt_tokens": world.request.prompt_tokens,
            "sessions": world.request.n_sessions,
            "context_tokens": world.request.context_tokens,
        },
        **shown.facts(),
        "active": active_facts(active, world, question.names),
        "pinned": None if pin is None else _pinned(pin, question.names),
        "because": None if active is None else _because(active, pin, shown, question.prefer),
        "why_not": outlook.why_not if active is None else None,
        "why": None if question.why is None else _why(question, shown, outlook.state),
        "what_if": None if question.what_if is None else _what_if(question, shown),
    }


def named(text: str, names: Names) -> str:
    """A sentence of the planner's, with names in place of peer ids."""
    for peer_id, name in names.items():
        text = text.replace(peer_id, name)
    return text


class _Shown:
    """One front with what is chosen of it, as facts."""

    def __init__(
        self,
        front: Front | PartitionError,
        world: World,
        question: Question,
        active: Route | None = None,
    ) -> None:
        names = {**question.names, **(question.what_if_names or {})}
        self.world, self.names, self._question, self._active = world, names, question, active
        self.infeasible = named(str(front), names) if isinstance(front, PartitionError) else None
        if isinstance(front, PartitionError):
            why = self.infeasible
            front = Front(points=(), best_single=None, no_single_because=why, exact=True)
        self.front = front
        query = question.query
        limits = Limits(max_ttft_s=query.max_ttft_s, min_throughput=query.min_throughput_tok_per_s)
        self.choice: Choice | None = (
            choose_within(front, question.prefer, limits) if front.points else None
        )

    @property
    def chosen(self) -> Candidate | None:
        return None if self.choice is None else self.choice.candidate

    def facts(self) -> dict[str, Any]:
        """Points, the best single machine, and what is missing."""
        front, single = self.front, self.front.best_single
        return {
            "points": [
                {"n": idx, **self.point(candidate, is_early=idx <= MAX_IMPROVED)}
                for idx, candidate in enumerate(front.points, start=1)
            ],
            "is_exact": front.exact,
            "infeasible": self.infeasible,
            "unmet": [] if self.choice is None else list(self.choice.unmet),
            "single": None if single is None else self.point(single, is_early=False),
            "no_single_because": named(front.no_single_because or "", self.names) or None,
        }

    def point(self, candidate: Candidate, *, is_early: bool) -> dict[str, Any]:
        """One point, with why it is as it is and, where asked for, what would make it better."""
        question = self._question
        why = explain(
            candidate,
            self.front,
            self.world,
            prefer=question.prefer,
            chosen=self.chosen,
            names=self.names,
        )
        bound, comparison = why.bounds[0], why.comparison  # of one session's token
        return {
            **_figures(candidate.pipelines, candidate.prediction, self.names),
            "bound_by": self._bound(bound.kind, bound.peers, bound.share),
            "throughput_bound_by": self._bound(why.bounds[1].kind, why.bounds[1].peers, 1.0),
            "against_single": None
            if comparison is None
            else {
                "ttft": comparison.ttft,
                "tpot": comparison.tpot,
                "throughput": comparison.throughput,
                "worse_in": list(comparison.worse_in),
            },
            "why": list(why.lines),
            "is_chosen": why.is_chosen,
            "is_active": self._active is not None
            and candidate.pipelines == self._active.plan.pipelines,
            "improve": self._improve(candidate, is_chosen=why.is_chosen)
            if question.query.advice and (is_early or why.is_chosen)
            else [],
        }

    def _improve(self, candidate: Candidate, *, is_chosen: bool) -> list[dict[str, Any]]:
        """What would help, most first; the chosen point is planned anew for it."""
        find = replanned if is_chosen else improvements
        found = find(candidate, self.world, prefer=self._question.prefer, names=self.names)
        return [self._improvement(one) for one in found]

    def _improvement(self, one: Improvement) -> dict[str, Any]:
        return {**one.to_value(), "names": [_name(peer, self.names) for peer in one.peers]}

    def _bound(self, kind: BoundKind, peers: Sequence[str], share: float) -> dict[str, Any]:
        called = [_name(peer, self.names) for peer in peers]
        return {"kind": kind, "peers": called, "share": share}


def _for_workload(world: World, query: PlanQuery) -> World:
    request = world.request
    if query.prompt_tokens is not None:
        request = replace(request, prompt_tokens=query.prompt_tokens)
    if query.n_sessions is not None:
        request = replace(request, n_sessions=query.n_sessions)
    return replace(world, request=request)


def active_facts(active: Route | None, world: World, names: Names) -> dict[str, Any] | None:
    """The plan that runs, with what it should do by the profiles of now, like all points."""
    if active is None:
        return None
    try:
        prediction = evaluate(active.plan.pipelines, world).prediction
    except PartitionError:  # a member's profile is gone: what its proposer reckoned
        prediction = active.plan.prediction
    return {
        **_figures(active.plan.pipelines, prediction, names),
        "epoch": active.epoch,
        "digest": active.digest,
        "proposer": active.plan.proposer,
    }


def _pinned(pin: Pinned, names: Names) -> dict[str, Any]:
    return {
        "by": _name(pin.author, names),
        "at": pin.at,
        "why_not": None if pin.why_not is None else named(pin.why_not, names),
        **pipelines_value(pin.pipelines, names),
    }


def _because(active: Route, pin: Pinned | None, shown: _Shown, prefer: Prefer) -> str:
    if pin is not None and pin.pipelines == active.plan.pipelines:
        return "it is pinned"
    if shown.chosen is None:
        return "the members that it needs are there, though no new plan could be made now"
    if shown.chosen.pipelines == active.plan.pipelines:
        return verdict(shown.chosen, shown.chosen, prefer)
    return "what would be chosen now (+) is not better by enough to move"


def _why(question: Question, shown: _Shown, state: ModelState) -> dict[str, Any]:
    """Why a member is left out of what is chosen."""
    peer = question.why or ""
    slowness = state.slowness(peer)
    doubt = (
        f"; others find it {slowness:.1f} times slower than it says, and plans are made with that"
        if slowness > 1.0
        else ""
    )
    facts: dict[str, Any] = {
        "peer_id": peer,
        "name": _name(peer, shown.names),
        "slower_than_said": slowness,
    }
    unplanned = question.why_unplanned
    if unplanned is not None or shown.chosen is None:
        text = unplanned or f"there is no plan at all: {shown.infeasible}"
        return {**facts, "reason": "unplanned", "text": text, "times_worse": None, "with_it": None}
    told = why_left_out(
        peer,
        shown.chosen,
        shown.front.points,
        shown.world,
        prefer=question.prefer,
        names=shown.names,
    )
    with_it = told.with_it
    return {
        **facts,
        **told.to_value(),
        "text": told.text + doubt,
        "with_it": None
        if with_it is None
        else _figures(with_it.pipelines, with_it.prediction, shown.names),
    }


def _what_if(question: Question, now: _Shown) -> dict[str, Any]:
    """The front of other hardware, and how its choice compares with now's."""
    if question.what_if is None:
        raise ValueError("no question")
    world = _for_workload(question.what_if, question.query)
    then = _Shown(front_or_reason(world), world, question)
    before, after = now.chosen, then.chosen
    comparison = None if before is None or after is None else compare(after, before)
    return {
        "changes": list(question.query.what_if),
        **then.facts(),
        "now": None if before is None else _figures(before.pipelines, before.prediction, now.names),
        "gain": None
        if before is None or after is None or comparison is None
        else {
            "ttft": comparison.ttft,
            "tpot": comparison.tpot,
            "throughput": comparison.throughput,
            "preferred": cost(before.prediction, question.prefer)
            / cost(after.prediction, question.prefer),
        },
    }


def _figures(pipelines: Sequence[Pipeline], prediction: Prediction, names: Names) -> dict[str, Any]:
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    return {
        **pipelines_value(pipelines, names),
        "stages": [
            {
                "peer_id": stage.hub,
                "name": _name(stage.hub, names),
                "span": [stage.span.start, stage.span.end],
            }
            for stage in stages
        ],
        "ttft_s": prediction.ttft_s,
        "tpot_s": prediction.tpot_s,
        "throughput_tok_per_s": prediction.throughput_tok_per_s,
        "stall_s": prediction.stall_s,
        "memory_bytes": dict(prediction.memory_bytes),
        "link_bytes_per_token": [
            {"from": sender, "to": receiver, "bytes": n_bytes}
            for sender, receiver, n_bytes in prediction.link_bytes
        ],
    }


def _name(peer_id: str, names: Names) -> str:
    return names.get(peer_id, peer_id[-8:])
