"""`covey doctor` and `covey ping`: why links are as they are, and what could make them better."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .local import local_client
from .render import out, seconds, show, size, table

WAYS = {
    "dial": "dial it",
    "reverse": "be dialled by it",
    "punch": "dial each other at once",
    "birthday_easy": "guess its port",
    "birthday_hard": "have it guess our port",
    "webrtc": "WebRTC over UDP",
}


def doctor(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show each test that was made.")
    ] = False,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Find out what stands between this node and the others, and what could be changed.

    Looks at the router anew and dials members that have no link, so it takes some seconds.
    """
    with local_client(home) as client:
        facts = client.doctor()
    show(facts, as_json=as_json, render=lambda found: _render_doctor(found, verbose=verbose))


def ping(
    peer: Annotated[str, typer.Argument(help="Name, peer id, or the last characters of one.")],
    count: Annotated[int, typer.Option(min=1, max=50, help="How many to send.")] = 10,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the link to PEER: what carries it, round-trip time, loss and throughput."""
    with local_client(home) as client:
        show(client.ping(peer, count=count), as_json=as_json, render=_render_ping)


def _render_doctor(facts: dict[str, Any], *, verbose: bool) -> None:
    nat = facts["nat"]
    out.print(f"NAT for TCP: {_words(nat['tcp'])}, for UDP: {_words(nat['udp'])}")
    where = f"listening on port {nat['port']}, on this network at {_listed(nat['lan_hosts'])}"
    out.print(where, markup=False, soft_wrap=True)
    out.print(f"seen from outside as {_listed(nat['public_hosts'])}")
    if facts["relays"]:
        names = _listed([relay["name"] or relay["peer_id"][-8:] for relay in facts["relays"]])
        out.print(f"reached through {names}", markup=False, soft_wrap=True)
    out.print()
    for finding in facts["findings"]:
        out.print(f"- {finding['says']}", markup=False, soft_wrap=True)
        if finding["advice"]:
            out.print(f"  What helps: {finding['advice']}", markup=False, soft_wrap=True)
    if facts["members"]:
        out.print()
        rows = [_member_row(member) for member in facts["members"]]
        table("Members", ("name", "peer", "link", "RTT", "address"), rows)
        for member in facts["members"]:
            _render_trouble(member)
    if verbose and facts["steps"]:
        out.print()
        rows = [(step["test"], step["observer"] or "-", step["outcome"]) for step in facts["steps"]]
        table("Tests", ("test", "with", "outcome"), rows)


def _member_row(member: dict[str, Any]) -> tuple[str, ...]:
    link = member["link"]
    return (
        member["name"],
        member["peer_id"][-8:],
        link["kind"] if link else "none",
        seconds(link["rtt_s"]) if link else "-",
        (link["address"] or link["host"] or "-") if link else "-",
    )


def _render_trouble(member: dict[str, Any]) -> None:
    """What was tried in vain, where there is no link or only one through a relay."""
    if member["error"]:
        out.print(f"\n{member['name']}: {member['error']}", markup=False, soft_wrap=True)
    if member["link"] is None or member["link"]["kind"] != "relayed":
        return
    if not member["tried"]:
        text = f"\n{member['name']} is reached through a relay; nothing else was tried from here"
        out.print(text, markup=False, soft_wrap=True)
        return
    out.print(
        f"\n{member['name']} is reached through a relay; tried last:", markup=False, soft_wrap=True
    )
    for tried in member["tried"]:
        way = WAYS.get(tried["way"], tried["way"])
        outcome = tried["failure"] or "it worked, and was lost since"
        out.print(f"- {way}, {tried['took_s']:.1f} s: {outcome}", markup=False, soft_wrap=True)


def _render_ping(facts: dict[str, Any]) -> None:
    link = facts["link"]
    where = link["address"] or link["host"]
    kind = f"{link['kind']} link" + (f", {where}" if where else "")
    out.print(f"{facts['name']} ({facts['peer_id'][-8:]}): {kind}", markup=False, soft_wrap=True)
    lost = 1 - facts["answered"] / facts["sent"]
    out.print(f"{facts['answered']} of {facts['sent']} answered in time, {lost:.0%} lost")
    if facts["answered"]:
        times = [seconds(facts[f"rtt_{which}_s"]) for which in ("min", "median", "max")]
        out.print(f"round trip {times[0]} at best, {times[1]} median, {times[2]} at worst")
    if facts["bandwidth_bytes_per_s"] is not None:
        out.print(f"throughput towards it {size(facts['bandwidth_bytes_per_s'])}/s")


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _listed(items: list[str]) -> str:
    return ", ".join(items) or "not known"
