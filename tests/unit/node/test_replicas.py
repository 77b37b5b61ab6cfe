"""A plan of several pipelines: sessions spread over them, and each stays on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from covey.node.route import Route, routes_of
from covey.partition.plan import Pipeline, StagePlan
from support.node_core import HIDDEN, PEERS, Net, in_virtual_time, route_of, rows

HEAD, A, B = PEERS[:3]


def replicas() -> tuple[Route, ...]:
    """One pipeline on A, another one on B."""
    plan = route_of(A).plan
    pipelines = tuple(Pipeline.of([StagePlan.alone(peer, 0, 1)]) for peer in (A, B))
    prediction = replace(plan.prediction, memory_bytes=((A, 1), (B, 1)))
    return routes_of(replace(plan, pipelines=pipelines, prediction=prediction))


@in_virtual_time
async def test_sessions_go_where_the_fewest_are() -> None:
    async with Net(3) as [head, *stages]:
        routes = replicas()
        loaded = [node.load(route) for node, route in zip(stages, routes, strict=True)]
        linked = head.peers.keys()
        sessions = []
        for n in range(4):
            route = head.pipelines.pick(routes, linked)
            session = await head.pipelines.open(f"s{n}", route, hidden_size=HIDDEN, n_tokens=4)
            sessions.append(session)
            result = await session.wait(await session.send(rows(1), position=0, n_return=1))
            assert result.hidden is not None
            np.testing.assert_array_equal(result.hidden, rows(1) + 1)
        assert [session.route.pipeline_idx for session in sessions] == [0, 1, 0, 1]
        assert [stage.n_forwards for stage in loaded] == [2, 2]
        head.pipelines.close(sessions[1])
        assert head.pipelines.pick(routes, linked).pipeline_idx == 1
        head.pipelines.peer_lost(B)
        assert head.pipelines.pick(routes, linked - {B}).pipeline_idx == 0


@in_virtual_time
async def test_of_two_that_are_idle_ones_own_is_taken() -> None:
    async with Net(3) as [_, _, b]:
        routes = replicas()
        assert b.pipelines.pick(routes, b.peers.keys() | {B}).peers == (B,)


@in_virtual_time
async def test_a_pipeline_three_times_as_slow_gets_every_fourth_session() -> None:
    async with Net(3) as [head, *stages]:
        fast, slow = replicas()
        routes = replace(fast, token_s=0.1), replace(slow, token_s=0.29)
        for node, route in zip(stages, routes, strict=True):
            node.load(route)
        taken = []
        for n in range(4):
            route = head.pipelines.pick(routes, head.peers.keys())
            await head.pipelines.open(f"s{n}", route, hidden_size=HIDDEN, n_tokens=4)
            taken.append(route.pipeline_idx)
        assert taken == [0, 0, 1, 0]
