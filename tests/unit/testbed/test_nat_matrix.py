"""The figures of the NAT matrix, from outcomes."""

from __future__ import annotations

import argparse

import pytest
from testbed.labs.nat_matrix import Outcome, Pair, all_pairs, parse_pair, rows
from testbed.nat import NatKind

DIRECT = Outcome("direct", 0.2, "direct", 0.2)
RELAYED = Outcome("relayed", 0.5, "relayed")
PUNCHED = Outcome("relayed", 0.5, "punched", 1.5)
FAILED = Outcome(why="no answer at all")


def test_a_whole_matrix_has_25_pairs() -> None:
    assert len(set(all_pairs())) == 25


def test_a_matrix_that_meets_its_targets_misses_nothing() -> None:
    outcomes = dict.fromkeys(all_pairs(), PUNCHED)
    outcomes[Pair(NatKind.SYMMETRIC, NatKind.SYMMETRIC)] = RELAYED
    assert not [row for row in rows(outcomes, cone_for_tcp=True) if row.met is False]


def test_a_pair_too_many_on_the_relay_is_missed() -> None:
    outcomes = {**dict.fromkeys(all_pairs(), DIRECT), **dict.fromkeys(all_pairs()[:2], RELAYED)}
    missed = {row.figure for row in rows(outcomes, cone_for_tcp=True) if row.met is False}
    assert missed == {"cones for TCP and UDP: of these on a path of their own"}
    assert not [row for row in rows(outcomes, cone_for_tcp=False) if row.met is False]


def test_a_pair_that_does_not_connect_is_missed() -> None:
    outcomes = {**dict.fromkeys(all_pairs(), DIRECT), all_pairs()[0]: FAILED}
    connected = rows(outcomes, cone_for_tcp=True)[0]
    assert (connected.value, connected.target, connected.met) == (24, 25, False)


def test_times_are_those_of_the_slowest_pair() -> None:
    pairs = all_pairs()
    outcomes = {pairs[0]: DIRECT, pairs[1]: PUNCHED}
    figures = {row.figure: row.value for row in rows(outcomes, cone_for_tcp=True)}
    assert figures["cones for TCP and UDP: slowest first byte, s"] == 0.5
    assert figures["cones for TCP and UDP: slowest path of its own, s"] == 1.5


def test_an_outcome_reads_as_what_happened() -> None:
    assert str(DIRECT) == "direct 0.20"
    assert str(PUNCHED) == "relayed 0.50, punched 1.50"
    assert str(FAILED) == "no: no answer at all"


def test_a_pair_is_named_by_its_kinds() -> None:
    pair = Pair(NatKind.FULL_CONE, NatKind.SYMMETRIC)
    assert parse_pair("full cone, symmetric") == pair
    assert str(pair) == "full cone x symmetric"
    with pytest.raises(argparse.ArgumentTypeError, match="port-restricted"):
        parse_pair("full cone")
