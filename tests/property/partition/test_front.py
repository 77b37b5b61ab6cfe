"""The front against brute force, and what must hold of every front."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from benchmarks.plan_oracle import Question, brute_force, random_question, side_by_side

from covey.partition.cost import Network
from covey.partition.errors import PlanInfeasible
from covey.partition.front import exact
from covey.partition.front.bounded import search_bounded
from covey.partition.front.chains import Found
from covey.partition.front.dominance import Objectives
from covey.partition.front.exact import search_exact
from covey.partition.front.instance import Instance, build_instance
from covey.partition.front.relaxation import balanced, least_balanced, relative_gap
from covey.partition.front.search import Front
from covey.partition.front.unit_sets import unit_sets
from covey.partition.scope import Scope

PIPELINES = Scope(max_pipelines=1, may_stream=False)
EFFORT = 1_000_000


def front_of(question: Question, scope: Scope = PIPELINES) -> Front | None:
    try:
        return question.front(scope)
    except PlanInfeasible:
        return None


def objectives_of(front: Front | None) -> list[Objectives]:
    return [] if front is None else [point.prediction.objectives for point in front.points]


def instance_of(question: Question) -> Instance:
    return build_instance(
        question.layout,
        sorted(question.devices, key=lambda one: one.peer_id),
        Network(question.links),
        request=question.request,
        head=question.head,
        index_pattern=question.index_pattern,
        max_members=4,
    )


def found_by_orders(instance: Instance) -> Found:
    """What there is when every order is tried, as where costs depend on it."""
    found, sets = Found(instance), unit_sets(instance, max_sets=exact.MAX_SETS)
    assert sets is not None
    assert exact._by_orders(instance, found, sets, EFFORT)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_what_brute_force_finds(seed: int) -> None:
    question = random_question(seed, max_devices=3, max_blocks=6)
    front = front_of(question)
    assert front is None or (front.exact and front.gap == 0.0)
    assert objectives_of(front) == brute_force(question)


@pytest.mark.parametrize("seed", [1005, 1016, 1022, 1024])
def test_the_front_of_four_devices_is_what_brute_force_finds(seed: int) -> None:
    question = random_question(seed, max_devices=4, max_blocks=6)
    assert len(question.devices) == 4
    assert objectives_of(front_of(question)) == brute_force(question)


@pytest.mark.parametrize("seed", range(6000, 6014))
def test_where_memory_is_short_no_more_streams_than_brute_force_has_to(seed: int) -> None:
    question, random = random_question(seed, max_devices=3, max_blocks=5), Random(seed)
    short = tuple(replace(one, memory_bytes=random.randint(100, 600)) for one in question.devices)
    question = replace(question, devices=short)
    front = front_of(question, replace(PIPELINES, may_stream=True))
    assert objectives_of(front) == brute_force(question, may_stream=True)


@pytest.mark.parametrize("seed", range(7000, 7012))
def test_next_to_no_pipelines_side_by_side_do_more_than_the_front(seed: int) -> None:
    drawn = random_question(seed, max_devices=3, max_blocks=5)
    request = replace(drawn.request, n_sessions=(2, 4, 5, 8)[seed % 4])
    question = replace(drawn, head=None, request=request)
    front = front_of(question, replace(PIPELINES, max_pipelines=4))
    ours = objectives_of(front)
    for one in side_by_side(question):
        assert any(
            mine[0] <= 1.05 * one[0] and mine[1] <= 1.05 * one[1] and mine[2] <= one[2] / 1.05
            for mine in ours
        )
    for point in [] if front is None else front.points:
        peers = [peer for stage in point.stages for peer in stage.peers]
        assert len(set(peers)) == len(peers)


@pytest.mark.parametrize("seed", range(2000, 2012))
def test_boxes_find_what_trying_every_order_does(seed: int) -> None:
    question = random_question(seed, max_devices=5, max_blocks=16)
    even = replace(question.layout, block_bytes=(100,) * question.layout.n_blocks)
    instance = instance_of(replace(question, layout=even, index_pattern=None))
    if not instance.units:
        return
    assert instance.is_uniform
    found = Found(instance)
    assert search_exact(instance, found, max_effort=EFFORT)
    expected = [point for point, _ in found_by_orders(instance).front]
    assert [point for point, _ in found.front] == expected


@pytest.mark.parametrize("seed", range(3000, 3010))
def test_no_plan_is_below_the_bound_and_a_bounded_search_finds_plans_above_it(seed: int) -> None:
    instance = instance_of(random_question(seed, max_devices=5, max_blocks=12))
    if not instance.units:
        return
    whole, some = Found(instance), Found(instance)
    assert search_exact(instance, whole, max_effort=EFFORT)
    search_bounded(instance, some)
    if not whole.front:
        assert not some.front
        return
    best = min(balanced(point) for point, _ in whole.front)
    assert least_balanced(instance) <= best
    if some.front:
        near = min(balanced(point) for point, _ in some.front)
        assert best <= near <= best * (1 + relative_gap(instance, some)) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4000, 4015))
def test_every_plan_covers_the_model_fits_and_is_not_dominated(seed: int) -> None:
    question = random_question(seed, max_devices=5, max_blocks=20)
    front = front_of(question)
    if front is None:
        return
    given = {one.peer_id: one for one in question.devices}
    for point in front.points:
        covered = [b for s in point.stages for b in range(s.span.start, s.span.end)]
        assert covered == list(range(question.layout.n_blocks))
        for stage in point.stages:
            stage.check_shares(question.layout)
            caps = [given[peer].max_blocks for peer in stage.peers]
            assert all(cap is None or stage.span.n_blocks <= cap for cap in caps)
        for peer_id, n_bytes in point.prediction.memory_bytes:
            assert n_bytes <= given[peer_id].memory_bytes
    for one, other in permutations(objectives_of(front), 2):
        assert not all(x <= y for x, y in zip(one, other, strict=True))
    if front.best_single is not None:
        alone = front.best_single.prediction.objectives
        assert any(
            all(x <= y for x, y in zip(point, alone, strict=True)) for point in objectives_of(front)
        )


@pytest.mark.parametrize("seed", range(5000, 5008))
def test_the_order_of_profiles_does_not_matter(seed: int) -> None:
    question, random = random_question(seed, max_devices=5, max_blocks=12), Random(seed)
    devices, links = list(question.devices), list(question.links)
    random.shuffle(devices)
    random.shuffle(links)
    shuffled = replace(question, devices=tuple(devices), links=tuple(links))
    assert front_of(shuffled) == front_of(question)
