"""What a relay's shaper promises, whoever asks when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.transport.relay.shaping import Shaper

RATE, RATE_PER_PAYER = 4e6, 1e6
FLOWS = {"a1": "a", "a2": "a", "b1": "b", "c1": "c"}
# Who asks, how much of its quantum it uses, and how long nothing happens after that.
steps = st.lists(
    st.tuples(st.sampled_from(sorted(FLOWS)), st.floats(0.0, 1.0), st.floats(0.0, 0.2)),
    max_size=200,
)


@given(steps)
def test_no_more_is_carried_than_the_rates_allow_and_nobody_waits_for_ever(
    asked: list[tuple[str, float, float]],
) -> None:
    shaper: Shaper[str] = Shaper(rate=RATE, rate_per_payer=RATE_PER_PAYER, now=0.0)
    moved = dict.fromkeys("abc", 0)
    share: dict[str, float] = {}
    waiting: set[str] = set()
    now = 0.0

    def move(flow: str) -> None:
        nbytes = int(share[flow] * shaper.quantum)
        shaper.moved(FLOWS[flow], nbytes, now=now)
        moved[FLOWS[flow]] += nbytes

    def serve() -> None:
        while (flow := shaper.pop(now=now)) is not None:
            waiting.remove(flow)
            move(flow)

    for name, part, pause_s in asked:
        serve()
        if name not in waiting:
            share[name] = part
            if shaper.ask(name, FLOWS[name], now=now):
                move(name)
            else:
                waiting.add(name)
        now += pause_s
    for payer, nbytes in moved.items():
        burst = max(RATE_PER_PAYER * 0.05, 16 << 10)
        assert nbytes <= RATE_PER_PAYER * now + burst + shaper.quantum, payer
    assert sum(moved.values()) <= RATE * now + RATE * 0.05 + shaper.quantum
    while (wake_at := shaper.next_at(now=now)) is not None:
        assert now <= wake_at <= now + 1.0
        now = wake_at
        serve()
    assert not waiting
