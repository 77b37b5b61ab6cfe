"""A scenario does its steps in order, measures, and keeps what a failed one leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from testbed.devices import GB, Device
from testbed.faults import Cut
from testbed.links import both_ways
from testbed.scenario import (
    Do,
    End,
    Expect,
    Freeze,
    Heal,
    Program,
    Running,
    Scenario,
    Start,
    Strike,
    noted,
    run,
)
from testbed.topology import Host, Topology
from testbed.traffic import rtts_ms

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

TOPOLOGY = Topology(hosts=(Host(name="near", link=both_ways(delay_ms=1)), Host(name="far")))
# Says where it is, and then waits.
SCRIPT = "import sys, time; print('at', sys.argv[1], flush=True); time.sleep(60)"
SPEAKER = Program(
    name="speaker",
    host="near",
    command=(sys.executable, "-c", SCRIPT, "{host}"),
    device=Device(name="any", speed=1.0, memory_bytes=GB),
)


def answers(running: Running) -> float:
    return len(rtts_ms(running.lab, "near", "far", n=4, timeout_s=0.5))


def is_running(running: Running) -> float:
    return float(running.processes["speaker"].poll() is None)


def test_steps_are_done_in_order_and_figures_measured(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = Scenario(
        name="pull-the-plug",
        topology=TOPOLOGY,
        programs=(SPEAKER,),
        steps=(
            Start("speaker"),
            Freeze("speaker", 0.01),
            Do("while it runs", is_running),
            Do("before it", answers),
            Strike("plug", Cut("near")),
            Do("while cut", answers),
            Heal("plug"),
            Do("after it", answers),
            End("speaker", is_sudden=True),
        ),
        expectations=(
            Expect("answers before it", noted("before it"), 4),
            Expect("answers while cut", noted("while cut"), 0, "at most"),
            Expect("answers after it", noted("after it"), 4),
            Expect("it ran", noted("while it runs"), 1),
        ),
    )
    rows = run(scenario, inside)
    assert [row.value for row in rows] == [4, 0, 4, 1]
    said = capsys.readouterr().out
    assert said.index("Cut(member='near'") < said.index("Heal(name='plug')")
    assert "speaker: memory held by" in said
    assert "what failed" not in said


def test_a_missed_expectation_leaves_logs_and_captures(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = Scenario(
        name="too-much",
        topology=TOPOLOGY,
        programs=(SPEAKER,),
        steps=(Start("speaker"), Do("answers", answers)),
        expectations=(Expect("answers", noted("answers"), 1000),),
    )
    (row,) = run(scenario, inside, has_captures=True)
    assert row.met is False
    folder = Path(capsys.readouterr().out.split("what failed: ")[1].strip()) / "too-much"
    assert (folder / "speaker.log").read_text().startswith("at 11.22.")
    capture = (folder / "near.pcap").read_bytes()
    assert capture[:4] == b"\xd4\xc3\xb2\xa1"  # pcap, little-endian
    assert len(capture) > 24
