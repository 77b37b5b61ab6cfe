"""Hosts behind all kinds of NAT in the testbed, and what each of them finds out."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from testbed.lab import Lab
from testbed.nat import TABLE, Nat, NatKind
from testbed.topology import Family, Host, Router, Topology

from covey.transport.identity import Identity
from covey.transport.membership import Swarm

NODE = Path(__file__).with_name("nat_node.py")
PORT = 4000
N_AT_ONCE = 4
NATS = {
    "cone": Nat(NatKind.FULL_CONE),
    "conu": Nat(NatKind.FULL_CONE, cone_for_tcp=False),
    "addr": Nat(NatKind.ADDRESS_RESTRICTED),
    "port": Nat(NatKind.PORT_RESTRICTED),
    "sym": Nat(NatKind.SYMMETRIC),
    "office": Nat(NatKind.PORT_RESTRICTED, blocks_udp=True),
}


Said = dict[str, dict[str, Any]]


def topology() -> Topology:
    """A home for each kind of NAT and some more, and two members with public addresses."""
    routers = [Router(name=f"r-{name}", nat=nat) for name, nat in NATS.items()]
    hosts = [Host(name=name, at=f"r-{name}") for name in NATS]
    port_restricted = Nat(NatKind.PORT_RESTRICTED)
    routers += [
        Router(name="r-upnp", nat=port_restricted, has_upnp=True),
        Router(name="r-carrier", nat=port_restricted),
        Router(name="r-mobile", nat=port_restricted, has_upnp=True, at="r-carrier"),
        Router(name="r-six", nat=port_restricted, family=Family.DUAL),
    ]
    hosts += [
        Host(name="upnp", at="r-upnp"),
        Host(name="lodger", at="r-upnp"),
        Host(name="mobile", at="r-mobile"),
        Host(name="six", at="r-six", family=Family.DUAL),
        Host(name="open"),
        Host(name="first", family=Family.DUAL),
        Host(name="second", family=Family.DUAL),
    ]
    return Topology(routers=tuple(routers), hosts=tuple(hosts))


class Nodes:
    """The members' processes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.swarm = Swarm.create(Identity.generate().peer_id).to_dict()
        self.observers: list[subprocess.Popen[bytes]] = []
        self.peers: list[tuple[str, str]] = []
        self.peers_v6: list[tuple[str, str]] = []

    def start(self, name: str, **more: Any) -> subprocess.Popen[bytes]:
        seed = Identity.generate().seed.hex()
        listen = ["0.0.0.0"]  # noqa: S104 - a lab
        spec = {"seed": seed, "swarm": self.swarm, "port": PORT, "listen": listen, **more}
        return self.lab.start(
            name,
            *(sys.executable, str(NODE), json.dumps(spec)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start_observer(self, name: str, **more: Any) -> None:
        process = self.start(name, listen=["0.0.0.0", "::"], **more)  # noqa: S104
        self.observers.append(process)
        said = told(process)
        self.peers.append((said["id"], f"{self.lab.address(name)}:{PORT}"))
        self.peers_v6.append((said["id"], f"[{self.lab.address(name, v6=True)}]:{PORT}"))

    def ask(self, name: str, *, n_peers: int = 2, **more: Any) -> dict[str, Any]:
        """What a node there finds out; it ends afterwards."""
        process = self.start(name, **{"peers": self.peers[:n_peers], **more})
        said = told(process)
        end(process)
        return said


def told(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The next line of a node."""
    if process.stdout is None:
        raise ValueError("its stdout is not ours")
    said: dict[str, Any] = json.loads(process.stdout.readline())
    return said


def end(process: subprocess.Popen[bytes]) -> None:
    """Let a node end by itself."""
    process.communicate(timeout=20)


def run(lab: Lab) -> Said:
    """What each host said; one is moved to another network at the end."""
    nodes = Nodes(lab)
    nodes.start_observer("first")
    nodes.start_observer("second", peers=nodes.peers)
    dialled = told(nodes.observers[0])
    while not dialled["facts"]["n_observers"]:
        dialled = told(nodes.observers[0])
    with ThreadPoolExecutor(N_AT_ONCE) as pool:  # they mostly wait
        names = ("open", *NATS)
        said = dict(zip(names, pool.map(nodes.ask, names), strict=True))
    said |= {f"{name}, one observer": nodes.ask(name, n_peers=1) for name in ("sym", "port")}
    keeper = nodes.start("upnp", peers=nodes.peers, maps_ports=True)
    said["upnp"] = told(keeper)
    said["lodger"] = nodes.ask("lodger", maps_ports=True)  # wants the same port
    end(keeper)
    said["upnp again"] = nodes.ask("upnp", maps_ports=False)  # it was given back
    said["first, dialled by second"] = dialled
    # The same router without NAT-PMP.
    rule = ("add", "rule", "inet", TABLE, "delivering", "udp", "dport", "5351", "drop")
    lab.machines["r-upnp"].run("nft", *rule)
    said["upnp only"] = nodes.ask("upnp", maps_ports=True)
    said["upnp only, again"] = nodes.ask("upnp", maps_ports=False)
    said["mobile"] = nodes.ask("mobile", maps_ports=True)
    said["six"] = nodes.ask("six", listen=["0.0.0.0", "::"], peers=nodes.peers_v6)  # noqa: S104
    walker = nodes.start("port", peers=nodes.peers)
    said["before the walk"] = told(walker)
    lab.move("port", "r-sym")
    said["on the way"] = told(walker)
    said["after the walk"] = told(walker)
    for process in (walker, *nodes.observers):
        end(process)
    return said
