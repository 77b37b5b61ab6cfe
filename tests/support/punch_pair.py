"""Two hosts, each behind its own router, that punch and meet; inside a lab's namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.lab import Lab
from testbed.links import Link
from testbed.nat import Nat, NatKind
from testbed.observer import PORTS
from testbed.topology import OBSERVERS_V4, Host, Router, Topology

from covey.transport.addresses import format_address
from covey.transport.nat.facts import NatFacts
from covey.transport.nat.facts import NatKind as Known
from covey.transport.punch import AttemptKind, attempts

ROOT = Path(__file__).parents[2]
OBSERVER = format_address(str(OBSERVERS_V4[0]), PORTS[0])
MOST_S = 2.0  # until a direct link stands

MIRROR = {
    AttemptKind.BIRTHDAY_EASY: AttemptKind.BIRTHDAY_HARD,
    AttemptKind.BIRTHDAY_HARD: AttemptKind.BIRTHDAY_EASY,
}


@dataclass
class Pair:
    """Two hosts, each behind its own router, and the programs on them."""

    lab: Lab
    ends: tuple[subprocess.Popen[str], subprocess.Popen[str]]

    def ask(self, *orders: dict[str, Any]) -> list[dict[str, Any]]:
        """Give each end its order; what each answers."""
        for end, order in zip(self.ends, orders, strict=True):
            assert end.stdin is not None
            end.stdin.write(json.dumps(order) + "\n")
            end.stdin.flush()
        return [self._answer(end) for end in self.ends]

    def observe(self) -> list[str]:
        """Both addresses from outside, of ports that were never used before."""
        return [it["address"] for it in self.ask(*[{"do": "observe", "at": OBSERVER}] * 2)]

    def meet(self, ours: AttemptKind, theirs: AttemptKind) -> list[dict[str, Any]]:
        """Both ends at once."""
        here, there = self.observe()
        return self.ask({"do": ours, "remote": there}, {"do": theirs, "remote": here})

    def webrtc(self, *, deadline_s: float) -> list[dict[str, Any]]:
        """Both ends at once, their descriptions carried by us."""
        seen = [address.rsplit(":", 1)[0] for address in self.observe()]
        described = self.ask(
            *(
                {"do": "webrtc", "hosts": [host], "stun": OBSERVER, "deadline_s": deadline_s}
                for host in reversed(seen)
            )
        )
        return self.ask(*reversed(described))

    def _answer(self, end: subprocess.Popen[str]) -> dict[str, Any]:
        assert end.stdout is not None
        answer: dict[str, Any] = json.loads(end.stdout.readline())
        return answer


@contextmanager
def two_hosts(*, link: Link | None) -> Iterator[Pair]:
    port_restricted = Nat(NatKind.PORT_RESTRICTED)
    names = ("a", "b")
    topology = Topology(
        routers=tuple(Router(name=f"r{name}", nat=port_restricted, link=link) for name in names),
        hosts=tuple(Host(name=name, at=f"r{name}") for name in names),
    )
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with Lab(topology) as lab:
        lab.prove()
        dialer, acceptor = (
            lab.start(
                name,
                *(sys.executable, "-m", "support.punch_node", role),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            for name, role in zip(names, ("dialer", "acceptor"), strict=True)
        )
        with dialer, acceptor:
            yield Pair(lab, (dialer, acceptor))  # type: ignore[arg-type]


def facts(nat: Nat, host: str) -> NatFacts:
    """What a host behind such a router would find out."""
    udp = Known(nat.kind.value.replace(" ", "_").replace("-", "_"))
    is_strict = nat.kind.is_cone and not nat.cone_for_tcp
    tcp = Known.PORT_RESTRICTED if is_strict else udp
    return NatFacts(udp=udp, tcp=tcp, port=4000, public_hosts=(host,), measured_at=0.0)


def kinds_of(ours: Nat, theirs: Nat) -> list[AttemptKind]:
    return [it.kind for it in attempts(facts(ours, "11.22.0.1"), facts(theirs, "11.22.0.2"))]
