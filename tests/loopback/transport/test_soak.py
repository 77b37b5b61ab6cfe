"""Five seconds of what `make soak` does for ten minutes."""

from __future__ import annotations

import pytest

from support.soak import soak

pytestmark = [pytest.mark.network, pytest.mark.slow]


async def test_calls_that_are_cancelled_and_planes_that_die_leave_nothing() -> None:
    found = await soak(5.0, seed=2026)
    assert found.faults == []
    assert found.n_episodes > 0
    assert any("cancelled" in outcome for outcome in found.outcomes)
