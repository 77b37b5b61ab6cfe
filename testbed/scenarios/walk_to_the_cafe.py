"""A laptop goes from home to a cafe while it talks to a server, and the home router restarts.

Shows what the lab itself does, with no Covey in it: how long nothing comes back, and that all does
in the end. A model for scenarios with nodes, which are programs like any other.
"""

from __future__ import annotations

from testbed.faults import Move, RestartRouter
from testbed.links import PRESETS
from testbed.nat import Nat, NatKind
from testbed.scenario import Do, Expect, Heal, Running, Scenario, Strike, noted
from testbed.topology import Host, Router, Topology
from testbed.traffic import rtts_ms

N_PINGS = 20


def answers(running: Running) -> float:
    """How many of the laptop's pings come back."""
    return len(rtts_ms(running.lab, "laptop", "server", n=N_PINGS))


SCENARIO = Scenario(
    name="walk-to-the-cafe",
    topology=Topology(
        routers=(
            Router(name="home", nat=Nat(NatKind.PORT_RESTRICTED), link=PRESETS["uplink"]),
            Router(name="cafe", nat=Nat(NatKind.SYMMETRIC), link=PRESETS["4g"]),
        ),
        hosts=(
            Host(name="laptop", at="home", link=PRESETS["good-wifi"]),
            Host(name="server"),
        ),
    ),
    steps=(
        Do("at home", answers),
        Strike("walk", Move("laptop", "cafe")),
        Do("in the cafe", answers),
        Heal("walk"),
        Strike("restart", RestartRouter("home", away_s=1.0)),
        Do("at home again", answers),
    ),
    expectations=(
        Expect("answers at home", noted("at home"), N_PINGS),
        Expect("answers in the cafe, of a link with loss", noted("in the cafe"), N_PINGS - 2),
        Expect("answers at home again", noted("at home again"), N_PINGS),
    ),
)
