"""Token buckets by name under one for all."""

from __future__ import annotations

from covey.transport.nat.budget import MAX_TRACKED, Budget, Rate


def test_a_name_has_its_burst_and_then_its_rate() -> None:
    budget = Budget(Rate(burst=3, per_s=2), Rate(burst=100, per_s=100))
    assert [budget.take("a", now=0.0) for _ in range(4)] == [True, True, True, False]
    assert budget.take("b", now=0.0)
    assert [budget.take("a", now=1.0) for _ in range(3)] == [True, True, False]


def test_all_together_have_a_limit_too() -> None:
    budget = Budget(Rate(burst=10, per_s=0), Rate(burst=5, per_s=1))
    assert sum(budget.take(str(n), now=0.0) for n in range(9)) == 5
    assert budget.take("9", now=1.0)


def test_a_refused_use_costs_nothing() -> None:
    budget = Budget(Rate(burst=1, per_s=0), Rate(burst=2, per_s=0))
    assert [budget.take("a", now=0.0) for _ in range(50)].count(True) == 1
    assert budget.take("b", now=0.0)


def test_a_flood_of_names_is_forgotten() -> None:
    budget = Budget(Rate(burst=1, per_s=0), Rate(burst=1e9, per_s=0))
    for n in range(3 * MAX_TRACKED):
        budget.take(str(n), now=0.0)
    assert len(budget._buckets) == MAX_TRACKED


def test_a_clock_that_steps_back_gives_nothing() -> None:
    budget = Budget(Rate(burst=1, per_s=1), Rate(burst=10, per_s=1))
    assert budget.take("a", now=10.0)
    assert not budget.take("a", now=0.0)
