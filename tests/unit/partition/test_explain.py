"""What `covey plan` says of a candidate."""

from __future__ import annotations

import json

from covey.partition.advice.explain import Explanation, explain
from covey.partition.cost import predict
from covey.partition.evaluate import World
from covey.partition.front.search import Candidate, Front, pareto_front
from covey.partition.plan import Pipeline
from covey.partition.profile import LinkProfile, Workload
from covey.partition.scope import CHAINS
from support.plans import device, layout, link, stages

DEVICES = {"a": device("a"), "b": device("b")}
REQUEST = Workload(n_sessions=8)
NAMES = {"a": "attic", "b": "barn"}


def front_over(links: list[LinkProfile]) -> Front:
    return pareto_front(layout(4), DEVICES.values(), links, request=REQUEST, scope=CHAINS)


def explained(spans: list[tuple[str, int, int]], links: list[LinkProfile]) -> Explanation:
    made = stages(*spans)
    prediction = predict(made, layout(4), DEVICES.values(), links, n_sessions=8)
    return explain(
        Candidate(pipelines=(Pipeline.of(made),), prediction=prediction),
        front_over(links),
        World(layout=layout(4), devices=DEVICES, links=tuple(links), request=REQUEST),
        prefer="latency",
        names=NAMES,
    )


def test_the_best_single_machine_is_named_as_such() -> None:
    told = explained([("a", 0, 4)], [link("a", "b")])
    assert told.is_chosen
    assert told.verdict.startswith("chosen for latency: a reply of 128 tokens takes")
    assert told.lines[-1] == "this is the best single machine, attic"


def test_a_plan_worse_than_one_machine_says_so() -> None:
    told = explained([("a", 0, 2), ("b", 2, 4)], [link("a", "b")])
    assert told.comparison is not None
    assert told.comparison.worse_in == ("ttft", "tpot")
    assert "WORSE in first token and each token" in told.comparison.text
    assert not told.is_chosen
    assert "worse than the choice" in told.verdict


def test_a_slow_link_is_what_bounds_a_token() -> None:
    told = explained([("a", 0, 2), ("b", 2, 4)], [link("a", "b", rtt_s=1.0)])
    assert (told.bounds[0].kind, told.bounds[0].peers) == ("link", ("a", "b"))
    assert "the direct link from attic to barn" in told.bounds[0].text


def test_a_thin_link_is_what_bounds_the_throughput() -> None:
    told = explained([("a", 0, 2), ("b", 2, 4)], [link("a", "b", bandwidth=1e4)])
    assert (told.bounds[1].objective, told.bounds[1].kind) == ("throughput", "link")


def test_a_busy_device_is_what_bounds_the_throughput() -> None:
    told = explained([("a", 0, 3), ("b", 3, 4)], [link("a", "b")])
    assert told.bounds[1].peers == ("a",)


def test_the_value_form_is_json() -> None:
    told = explained([("a", 0, 2), ("b", 2, 4)], [link("a", "b")])
    assert json.loads(json.dumps(told.to_value()))["is_chosen"] is False
