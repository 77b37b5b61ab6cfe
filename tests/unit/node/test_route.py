"""A plan becomes a route only if this version can run every part of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from covey.node.route import Route, UnsupportedPlan
from covey.node.switch import code_of
from covey.partition.plan import CODECS, LayerPlan, Member, Pipeline, Span, StagePlan
from covey.transport.errors import ErrorCode
from support.node_core import PEERS, route_of

A, B, C = PEERS[:3]


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
    pair = StagePlan(Span(0, 3), (Member(A, 1, 32), Member(B, 1, 32)))
    return {"pipelines": (Pipeline.of((pair, StagePlan.alone(C, 3, 4))),)}


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
        group(),
    ],
    ids=["engine", "sparse", "sparse across borders", "group"],
)
def test_what_this_version_cannot_run_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedPlan) as caught:
        Route.of(replace(plan(), **changes))
    assert code_of(caught.value) is ErrorCode.UNKNOWN_PLAN
