"""A plan becomes a route only if this version can run every part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from covey.node.route import Route, UnsupportedPlan, routes_of
from covey.node.switch import code_of
from covey.partition.plan import CODECS, LayerPlan, Member, Pipeline, Span, StagePlan
from covey.transport.errors import ErrorCode
from support.node_core import PEERS, route_of

A, B, C, D, E = PEERS


def plan() -> LayerPlan:
    return route_of(A, B, C, spans=[(0, 1), (1, 3), (3, 4)]).plan


def test_a_route_holds_what_every_frame_needs() -> None:
    route = Route.of(with_codecs("exact", "fp16", "exact", "fp16"))
    assert route.peers == (A, B, C)
    assert route.spans == ((0, 1), (1, 3), (3, 4))
    assert route.codecs == ("exact", "fp16", "exact", "fp16")
    assert (route.n_stages, route.epoch, route.engine, route.dtype) == (3, 3, "fp32", "fp32")
    assert route.digest == route.plan.digest


def group() -> dict[str, Any]:
    pair = StagePlan(Span(0, 3), (Member(A, 1, 32), Member(B, 1, 32)), hub_idx=1)
    return {"pipelines": (Pipeline.of((pair, StagePlan.alone(C, 3, 4))),)}


def test_borders_lead_to_the_hub_of_a_group() -> None:
    route = Route.of(replace(plan(), **group()))
    assert route.peers == (B, C)
    assert route.members == {A, B, C}
    assert route.spans == ((0, 3), (3, 4))
    assert [route.stage_of(peer) for peer in (A, B, C)] == [0, 0, 1]


def test_each_pipeline_is_a_route_of_its_own() -> None:
    pipelines = tuple(
        Pipeline.of([StagePlan.alone(first, 0, 2), StagePlan.alone(second, 2, 4)])
        for first, second in ((A, B), (C, D))
    )
    memory = tuple((peer, 1) for peer in (A, B, C, D))
    prediction = replace(plan().prediction, memory_bytes=memory)
    both = replace(plan(), pipelines=pipelines, prediction=prediction)
    first, second = routes_of(both)
    assert (first.peers, second.peers) == ((A, B), (C, D))
    assert first.digest == second.digest == both.digest
    own = Route.for_member(both, D)
    assert own == second
    assert (own.stage_of(D), own.place_in_plan(own.stage_of(D))) == (1, 3)
    with pytest.raises(UnsupportedPlan):
        Route.for_member(both, E)
    with pytest.raises(ValueError, match="no stage"):
        first.stage_of(C)


def with_codecs(*codecs: str) -> LayerPlan:
    (pipeline,) = plan().pipelines
    return replace(plan(), pipelines=(replace(pipeline, codecs=codecs),))


def sparse(pattern: str) -> dict[str, Any]:
    (pipeline,) = plan().pipelines
    carrying = Pipeline.of(pipeline.stages, index_pattern=pattern)
    return {"pipelines": (carrying,), "index_pattern": pattern}


def test_every_codec_that_a_plan_may_name_is_understood() -> None:
    assert Route.of(with_codecs(*CODECS)).codecs == CODECS


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "fp8"},
        # Shared layers all inside a stage: no border carries indices, yet dense attention would
        # compute something else than the plan says.
        {"index_pattern": "FFSF"},
        sparse("FSFS"),
        {**group(), "engine": "bf16"},
    ],
    ids=["engine", "sparse", "sparse across borders", "group in bf16"],
)
def test_what_this_version_cannot_run_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedPlan) as caught:
        Route.of(replace(plan(), **changes))
    assert code_of(caught.value) is ErrorCode.UNKNOWN_PLAN
