"""The rules that cut cables, and scenarios that cannot be."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from testbed.devices import DEVICES
from testbed.faults import cut_rules, partition_rules
from testbed.labs.scenario import load
from testbed.scenario import End, Expect, Freeze, Program, Scenario, Start
from testbed.topology import Host, Topology


def test_what_is_sent_and_what_is_received_is_cut_apart() -> None:
    (up,) = cut_rules("p-a", "up")
    (down,) = cut_rules("p-a", "down")
    assert 'prerouting priority -300; iifname "p-a" drop' in up
    assert 'postrouting priority 0; oifname "p-a" drop' in down
    assert list(cut_rules("p-a", "both")) == [up, down]


def test_a_partition_is_cut_in_both_directions() -> None:
    (chain,) = partition_rules(["p-a", "p-b"], ["p-c"])
    assert 'iifname { "p-a", "p-b" } oifname { "p-c" } drop' in chain
    assert 'iifname { "p-c" } oifname { "p-a", "p-b" } drop' in chain


@pytest.mark.parametrize("step", [Start("b"), End("b"), Freeze("b", 1.0)])
def test_a_step_names_a_program_that_there_is(step: Start | End | Freeze) -> None:
    program = Program(name="a", host="h", command=("true",))
    with pytest.raises(ValueError, match="no such program"):
        Scenario(
            name="s",
            topology=Topology(hosts=(Host(name="h"),)),
            programs=(program,),
            steps=(step,),
        )


def test_programs_have_names_of_their_own() -> None:
    program = Program(name="a", host="h", command=("true",))
    with pytest.raises(ValueError, match="one name"):
        Scenario(name="s", topology=Topology(hosts=(Host(name="h"),)), programs=(program, program))


def test_an_expectation_without_target_is_only_reported() -> None:
    assert Expect("figure", lambda running: 1.0).target is None


def test_slower_devices_have_less_memory_too() -> None:
    devices = [DEVICES[name] for name in ("pi4", "pi5", "laptop", "desktop")]
    assert devices == sorted(devices, key=lambda device: (device.speed, device.memory_bytes))
    assert devices[0].options == ("--speed", "0.15")
    assert devices[-1].options == ()


def test_a_scenario_is_a_file_with_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from testbed.scenarios.walk_to_the_cafe import SCENARIO")
    assert load(str(file)).name == "walk-to-the-cafe"
    file.write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="has no SCENARIO"):
        load(str(file))
    with pytest.raises(argparse.ArgumentTypeError, match="is not there"):
        load(str(tmp_path / "other.py"))
