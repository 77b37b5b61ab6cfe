"""A slow machine out of a fast one."""

from __future__ import annotations

import pytest

from covey.node.kernels.pacer import Pacer


class Machine:
    """Time that passes by working and by sleeping, the latter `too_long_s` longer than asked."""

    def __init__(self, too_long_s: float = 0.0) -> None:
        self.cpu_s = self.now_s = 0.0
        self.too_long_s = too_long_s

    def work(self, cpu_s: float, elapsed_s: float) -> None:
        self.cpu_s += cpu_s
        self.now_s += elapsed_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.too_long_s

    def pacer(self, speed: float) -> Pacer:
        return Pacer(
            speed, cpu_clock=lambda: self.cpu_s, clock=lambda: self.now_s, sleep=self.sleep
        )


def test_a_call_takes_as_long_as_on_a_machine_of_that_speed() -> None:
    machine = Machine()
    with machine.pacer(0.25):
        machine.work(2.0, 2.0)
    assert machine.now_s == pytest.approx(8.0)


def test_time_without_work_is_not_stretched() -> None:
    machine = Machine()
    with machine.pacer(0.5):
        machine.work(1.0, 10.0)
    assert machine.now_s == pytest.approx(11.0)


def test_sleeping_too_long_is_made_good_by_later_calls() -> None:
    machine = Machine(too_long_s=0.01)
    pacer = machine.pacer(0.5)
    for _ in range(1000):
        with pacer:
            machine.work(0.003, 0.003)
    assert machine.now_s == pytest.approx(6.0, rel=0.01)


def test_a_sleep_that_lasted_for_ever_is_not_made_good() -> None:
    machine = Machine(too_long_s=100.0)
    pacer = machine.pacer(0.5)
    with pacer:
        machine.work(1.0, 1.0)
    machine.too_long_s = 0.0
    before = machine.now_s
    with pacer:
        machine.work(1.0, 1.0)
    assert machine.now_s - before == pytest.approx(1.95)


def test_the_sleep_comes_also_after_a_call_that_raised() -> None:
    machine = Machine()

    def fail() -> None:
        with machine.pacer(0.5):
            machine.work(1.0, 1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert machine.now_s == pytest.approx(2.0)


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.5, float("nan")])
def test_a_speed_that_no_machine_has_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match="speed"):
        Pacer(speed)
