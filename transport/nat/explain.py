"""NAT facts in words: what they mean for links, and what the user could change. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from covey.transport.addresses import format_address

from .facts import NatFacts, NatKind, same_family

_TCP = {
    NatKind.OPEN: "Nothing stands between this machine and the internet for TCP.",
    NatKind.FULL_CONE: "The router lets anyone in to a TCP port that is in use.",
    NatKind.ADDRESS_RESTRICTED: "The router lets TCP in from machines that were dialled before.",
    NatKind.PORT_RESTRICTED: (
        "The router, or a firewall, lets TCP in only from a port that was dialled before:"
        " two such machines can still connect, by dialling each other at once."
    ),
    NatKind.SYMMETRIC: (
        "The router gives every TCP connection another port: direct links work with easier"
        " routers, sometimes after some tries, and go through a member with others like it."
    ),
}
_UDP = {
    NatKind.OPEN: "Nothing stands in the way of UDP.",
    NatKind.FULL_CONE: "The router lets anyone in to a UDP port that is in use.",
    NatKind.ADDRESS_RESTRICTED: "The router lets UDP in from machines that were sent to before.",
    NatKind.PORT_RESTRICTED: "The router lets UDP in only from a port that was sent to before.",
    NatKind.SYMMETRIC: "The router gives every UDP destination another port.",
    NatKind.BLOCKED: "No UDP packet comes back: a firewall blocks it. Links use TCP only.",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is so, and what may be done about it; no advice if all is well."""

    says: str
    advice: str = ""


def explain(
    facts: NatFacts, *, claimed_address: str | None, mapping_reason: str
) -> tuple[Finding, ...]:
    """What to tell a person.

    Args:
        facts: as they are.
        claimed_address: what the router says leads here, tried or not.
        mapping_reason: why the router gave no port; empty if it did or was not asked.
    """
    if facts.lan_hosts and all(map(_is_loopback, facts.lan_hosts)):
        return (
            Finding(
                "This node listens for programs of this machine only.",
                "Start it without --host, so that other machines reach it.",
            ),
        )
    if not facts.public_hosts:
        findings = [
            Finding(
                "No member outside this network has a link to this node, so nobody can say how it"
                " looks from there.",
                "If the swarm is to span several homes, let at least one member have a public"
                " address or a forwarded port.",
            )
        ]
    else:
        findings = [_reachability(facts)]
        findings += [
            Finding(words[kind])
            for words, kind in ((_TCP, facts.tcp), (_UDP, facts.udp))
            if kind in words
        ]
    if not facts.is_reachable and not facts.mapped_addresses:
        findings += _mapping(facts, claimed_address, mapping_reason)
    return tuple(findings)


def _reachability(facts: NatFacts) -> Finding:
    if facts.mapped_addresses:
        return Finding(f"The router opened {facts.mapped_addresses[0]}, and members reach it.")
    seen = ", ".join(facts.public_hosts)
    if facts.is_reachable:
        return Finding(f"Members reach this node's port {facts.port} from outside, at {seen}.")
    if set(facts.public_hosts) & set(facts.lan_hosts):
        return Finding(
            f"This machine has a public address, {seen}, but nobody gets in to its port"
            f" {facts.port}.",
            f"Allow TCP port {facts.port} in this machine's firewall and, for IPv6, the router's.",
        )
    return Finding(
        f"Seen from outside this node is {seen}, and nobody gets in to its port {facts.port}.",
        f"Forward TCP port {facts.port} in the router to {_lan_address(facts)}.",
    )


def _mapping(facts: NatFacts, claimed_address: str | None, reason: str) -> list[Finding]:
    if claimed_address is not None and facts.public_hosts:
        return [
            Finding(
                f"The router says that it opened {claimed_address}, but members do not get in.",
                "Look for a second router before it (a modem with a router inside), or a firewall"
                " on this machine.",
            )
        ]
    if claimed_address is not None:
        return [Finding(f"The router says that it opened {claimed_address}; nobody has tried it.")]
    if "no public address" in reason:
        return [
            Finding(
                "The router has no public IPv4 address itself: the provider, or another router,"
                " shares one between many.",
                "Ask the provider for a public IPv4 address or for IPv6; opening ports in this"
                " router does not help.",
            )
        ]
    if reason:
        return [
            Finding(
                f"The router opens no port by itself ({reason}).",
                "Switch on UPnP or NAT-PMP in the router's settings.",
            )
        ]
    return []


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _lan_address(facts: NatFacts) -> str:
    hosts = same_family("0.0.0.0", facts.lan_hosts) or facts.lan_hosts  # noqa: S104 - any IPv4
    return format_address(hosts[0], facts.port) if hosts else "this machine"
