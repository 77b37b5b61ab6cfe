"""Cables between emulated machines: laid, slowed down while running, and ended.

Two ways to slow one down behind one interface. `Netem` leaves it to the kernel, where that has the
netem queue. `Wired` cuts the cable in two and lets `testbed.wire` carry packets across the gap,
with the kernel's token bucket (tbf) for the rate. A plain cable is one veth pair with neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from .links import Link, Way
from .namespaces import LabUnavailable, Namespace, promotion, run

GAP = "wires"  # the namespace where cut cables end
WIRE = Path(__file__).with_name("wire.py")
# If a veth happens to have its peer's number, the kernel takes it for an ordinary card and lets up
# to a second pass before it sends anything. So one end of each gets a number that no other has.
_INDEX = 1000
_OFFLOADS = ("tso", "gso", "gro")
_QUEUE_MS = 50  # what waits at a slow link before packets are dropped


@dataclass(frozen=True, slots=True)
class End:
    """Where a cable is plugged in."""

    namespace: str
    interface: str


@dataclass(frozen=True, slots=True)
class Cable:
    """One member's way to its network; `link` is None for a plain one."""

    member: str
    near: End  # at the member: what leaves here goes up
    far: End  # at the network's bridge
    link: Link | None

    @property
    def gap(self) -> tuple[str, str]:
        """What the two ends in the gap are called, if it is cut."""
        return f"u-{self.member}", f"d-{self.member}"


class Cables(Protocol):
    """How cables that do something to packets are made."""

    def lines(self, cable: Cable) -> Sequence[str]:
        """The lines for `ip -batch` that lay it."""

    def start(self, cables: Sequence[Cable]) -> None:
        """Begin to slow these down; they have been laid."""

    def change(self, cable: Cable, link: Link) -> None:
        """From the next packet on it does what `link` says."""

    def close(self) -> None:
        """End what runs for them; the interfaces go with their namespaces."""


class Netem:
    """Cables that the kernel slows down by itself."""

    def lines(self, cable: Cable) -> Sequence[str]:
        """One veth pair."""
        return [plain_line(cable)]

    def start(self, cables: Sequence[Cable]) -> None:
        """Put a queue at both ends of each."""
        for cable in cables:
            if cable.link is not None:
                self.change(cable, cable.link)

    def change(self, cable: Cable, link: Link) -> None:
        """Replace both queues."""
        for end, way in ((cable.near, link.up), (cable.far, link.down)):
            _set_offloads(end, is_on=not way.needs_small_packets)
            _tc(end, f"qdisc replace dev {end.interface} root {netem_words(way)}")

    def close(self) -> None:
        """The queues go with their interfaces."""


class Wired:
    """Cables cut in two, with a process that carries packets across the gap."""

    def __init__(self, seed: int = 0) -> None:
        """Start the process in the gap, which must be there.

        Args:
            seed: decides which packets are lost.
        """
        self._n_cables = 0
        asking = promotion()
        arguments = [str(number) for number in (seed, *asking)]
        self._process = subprocess.Popen(
            [*Namespace(GAP).prefix, sys.executable, "-I", "-S", str(WIRE), *arguments],
            pass_fds=asking,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def lines(self, cable: Cable) -> Sequence[str]:
        """Two veth pairs whose other ends are in the gap."""
        near, far = (End(GAP, interface) for interface in cable.gap)
        self._n_cables += 1
        return [
            _pair_line(cable.near, near),
            _pair_line(far, cable.far, index=_INDEX + self._n_cables),
        ]

    def start(self, cables: Sequence[Cable]) -> None:
        """Bring the gap's ends up and hand them to the process."""
        Namespace(GAP).ip(
            *(f"link set {name} addrgenmode none up" for cable in cables for name in cable.gap)
        )
        for cable in cables:
            if cable.link is not None:
                up, down = cable.gap
                self._shape(cable, cable.link, {"from": up, "to": down}, {"from": down, "to": up})

    def change(self, cable: Cable, link: Link) -> None:
        """Tell the process, and set the rate at both ends."""
        self._shape(cable, link, {}, {})

    def close(self) -> None:
        """End the process, and with it the traffic on all cables."""
        self._process.kill()
        self._process.communicate()

    def _shape(self, cable: Cable, link: Link, up: dict[str, str], down: dict[str, str]) -> None:
        for end, way in ((cable.near, link.up), (cable.far, link.down)):
            _set_offloads(end, is_on=not way.needs_small_packets)
            _tc(end, *_token_bucket(end.interface, way))
        self._tell(
            {
                "id": cable.member,
                "up": {**asdict(link.up), **up},
                "down": {**asdict(link.down), **down},
            }
        )

    def _tell(self, facts: dict[str, object]) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ValueError("the wire has no pipes")
        try:
            stdin.write(json.dumps(facts).encode() + b"\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer != b"ok\n":
            raise LabUnavailable("the process that carries packets has ended")


def kernel_has_netem(scratch: Namespace) -> bool:
    """Whether a queue of that kind can be made; tries it on the loopback of `scratch`."""
    try:
        run("tc", "-n", scratch.name, "-batch", "-", stdin="qdisc add dev lo root netem delay 1ms")
    except LabUnavailable:
        return False
    run("tc", "-n", scratch.name, "-batch", "-", stdin="qdisc delete dev lo root")
    return True


def plain_line(cable: Cable) -> str:
    """The line for `ip -batch` that lays a cable which does nothing to packets."""
    return _pair_line(cable.near, cable.far)


def burst_bytes(mbit_per_s: float) -> int:
    """How much may leave at once: what 2 ms carry, and two packets at least.

    With less, a link of 1 Gbit/s measures 0.73 (research/testbed.md, section 3).
    """
    return max(4096, round(mbit_per_s * 1e6 / 8 * 0.002))


def _pair_line(near: End, far: End, *, index: int = _INDEX) -> str:
    return (
        f"link add {near.interface} index {index} netns {near.namespace} type veth"
        f" peer name {far.interface} netns {far.namespace}"
    )


def _token_bucket(interface: str, way: Way) -> list[str]:
    if way.mbit_per_s is None:
        # `replace` first: there may be none to delete.
        return [f"qdisc replace dev {interface} root pfifo", f"qdisc delete dev {interface} root"]
    rate = f"rate {way.mbit_per_s:g}mbit burst {burst_bytes(way.mbit_per_s)}"
    return [f"qdisc replace dev {interface} root tbf {rate} latency {_QUEUE_MS}ms"]


def netem_words(way: Way) -> str:
    """What `tc` is told of the kernel's queue for one direction."""
    rate = "" if way.mbit_per_s is None else f" rate {way.mbit_per_s:g}mbit"
    delay = f"delay {way.delay_ms:g}ms {way.jitter_ms:g}ms"
    return f"netem {delay} loss {100 * way.loss:g}%{rate} limit 10000"


def _set_offloads(end: End, *, is_on: bool) -> None:
    state = "on" if is_on else "off"
    switches = [word for name in _OFFLOADS for word in (name, state)]
    run(*Namespace(end.namespace).prefix, "ethtool", "-K", end.interface, *switches)


def _tc(end: End, *lines: str) -> None:
    run("tc", "-n", end.namespace, "-batch", "-", stdin="\n".join(lines))
