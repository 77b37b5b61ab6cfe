"""`covey members`: who is in the swarm, and how somebody is removed from it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from . import options
from .local import local_client
from .render import out, print_json, show, table

Peer = Annotated[str, typer.Argument(help="Name, peer id, or the last characters of one.")]

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Show who is in the swarm; remove members."
)


@app.command("list")
def list_members(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Show the members, who of them is alive, and who was removed."""
    with local_client(home) as client:
        show(client.members(), as_json=as_json, render=_render)


@app.command()
def remove(
    peer: Peer,
    with_invited: Annotated[
        bool, typer.Option("--with-invited", help="Also those that are in only by its word.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove PEER from the swarm for good.

    All its links are cut within seconds and the swarm's secret changes; nobody else notices. What
    it has seen or downloaded so far it keeps, and so does whoever it gave that to.
    """
    with local_client(home) as client:
        if not yes:
            if not as_json:
                _warn(client.members(), peer, with_invited=with_invited)
            typer.confirm(f"remove {peer} for good?", abort=True, err=True)
        done = client.remove_member(peer, with_invited=with_invited)
    if as_json:
        print_json(done)
        return
    names = ", ".join(member["name"] for member in done["removed"])
    out.print(f"removed: {names}; links are being cut, and the secret changes", markup=False)


@app.command()
def allow(peer: Peer, home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Let PEER remove members too; only the swarm's founder may do so.

    It cannot remove the founder, nor others that may remove members. To take it back, remove PEER.
    """
    with local_client(home) as client:
        done = client.allow_member(peer)
    if as_json:
        print_json(done)
    else:
        out.print(f"{done['allowed']['name']} may remove members now", markup=False)


def _warn(facts: dict[str, Any], peer: str, *, with_invited: bool) -> None:
    """Say what a removal does and what it does not, before it is asked for."""
    out.print("its links are cut within seconds, and the swarm's secret changes for all others")
    out.print("it keeps what it has seen and downloaded so far")
    out.print("it can only come back as a new member, with a new invite")
    named = {m["peer_id"] for m in facts["members"] if _is_meant(m, peer)}
    guests = [
        m["name"] for m in facts["members"] if m["invited_by"] and named >= set(m["invited_by"])
    ]
    if guests:
        fate = "are removed too" if with_invited else "stay, unless you add --with-invited"
        out.print(f"in only by its invites: {', '.join(guests)}; they {fate}", markup=False)


def _is_meant(member: dict[str, Any], peer: str) -> bool:
    return bool(member["name"] == peer or member["peer_id"].endswith(peer))


def _render(facts: dict[str, Any]) -> None:
    names = {member["peer_id"]: member["name"] for member in facts["members"]}
    table(
        f"Members of swarm {facts['swarm'][:8]}, secret of epoch {facts['epoch']}",
        ("name", "peer", "alive", "role", "epoch", "link", "invited by"),
        [
            (
                member["name"] + (" (this node)" if member["is_self"] else ""),
                member["peer_id"][-8:],
                _seen(member),
                member["role"],
                "-" if member["epoch"] is None else str(member["epoch"]),
                member["link"] or "-",
                ", ".join(names.get(peer, peer[-8:]) for peer in member["invited_by"]) or "-",
            )
            for member in facts["members"]
        ],
    )
    if facts["removed"]:
        out.print()
        rows = [
            (m["name"], m["peer_id"][-8:], m["by_name"], _date(m["at"])) for m in facts["removed"]
        ]
        table("Removed", ("name", "peer", "by", "when"), rows)


def _seen(member: dict[str, Any]) -> str:
    if member["is_live"]:
        return "yes"
    if member["last_seen_at"] is None:
        return "not since this node started"
    return f"{_span(time.time() - member['last_seen_at'])} ago"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _date(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")
