"""Which relays are kept warm, and which one is taken."""

from __future__ import annotations

from covey.transport.relay.choose import Candidate, choose_kept, order_for_dial


def test_the_fastest_are_kept() -> None:
    candidates = [Candidate("a", "192.0.2.1", 0.2), Candidate("b", "192.0.2.2", 0.01)]
    assert choose_kept([*candidates, Candidate("c", "192.0.2.3", 0.05)], ()) == ("b", "c")
    assert choose_kept(candidates, ()) == ("b", "a")
    assert choose_kept([], {"gone"}) == ()


def test_one_that_was_never_measured_counts_as_slow() -> None:
    candidates = [Candidate("a"), Candidate("b", None, 0.1), Candidate("c", None, 2.0)]
    assert choose_kept(candidates, ()) == ("b", "a")


def test_two_at_one_site_are_less_than_two() -> None:
    near = [Candidate("a", "192.0.2.1", 0.01), Candidate("b", "192.0.2.1", 0.01)]
    assert choose_kept([*near, Candidate("c", "198.51.100.1", 0.08)], ()) == ("a", "c")
    assert choose_kept([*near, Candidate("c", "198.51.100.1", 0.5)], ()) == ("a", "b")


def test_a_household_is_one_site_by_ipv6_too() -> None:
    candidates = [
        Candidate("a", "2001:db8:1:2::1", 0.01),
        Candidate("b", "2001:db8:1:2:3:4:5:6", 0.02),
        Candidate("c", "2001:db8:1:3::1", 0.03),
        Candidate("d", "not an address : at all", 0.04),
    ]
    assert choose_kept(candidates, ()) == ("a", "c")


def test_small_differences_move_nobody_and_large_ones_do() -> None:
    def chosen(rtt_s: float) -> set[str]:
        candidates = [Candidate("a", None, 0.1), Candidate("b", None, 0.1)]
        return set(choose_kept([*candidates, Candidate("c", None, rtt_s)], {"a", "b"}))

    assert chosen(0.08) == {"a", "b"}
    assert "c" in chosen(0.06)


def test_the_shortest_way_is_by_both_halves() -> None:
    announced = {"a": 0.01, "b": 0.1, "c": None, "d": 0.02}
    ours = {"a": 0.3, "b": 0.02, "d": 0.05}
    assert order_for_dial(announced, ours) == ("d", "b", "a", "c")
    assert order_for_dial({}, ours) == ()


def test_only_so_many_are_tried() -> None:
    assert len(order_for_dial(dict.fromkeys(map(str, range(100))), {})) == 4
