"""`covey status`, `plan` and `models`: what the node knows, as tables or JSON."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import typer

from covey.client import NoLocalNode

from . import options
from .local import local_client
from .render import out, seconds, show, size, table

MAX_SHOWN = 12  # points of a front in a table


def status(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Show members, spans, links, sessions and speeds."""
    with local_client(home) as client:
        show(client.status(), as_json=as_json, render=_render_status)


def plan(
    model: Annotated[str, typer.Argument(help="A model of the swarm.")] = "smollm2",
    prefer: Annotated[
        str | None, typer.Option(help="latency, throughput or balanced; the node's own by default.")
    ] = None,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the plans worth having for MODEL, what each should do, and which one runs."""
    with local_client(home) as client:
        show(client.plan(model, prefer), as_json=as_json, render=_render_plan)


def models(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """List the models of the swarm, and short names that are always known."""
    facts: dict[str, Any] = {"models": [], "short_names": ["smollm2"]}
    with suppress(NoLocalNode), local_client(home) as client:
        facts["models"] = client.status()["models"]
    show(facts, as_json=as_json, render=_render_models)


def _render_status(facts: dict[str, Any]) -> None:
    out.print(f"{facts['name']} ({facts['peer_id'][-8:]}), up {facts['uptime_s']:.0f} s")
    out.print(f"swarm {facts['swarm'][:8]}, home {facts['home']}")
    engine = facts["engine"]
    threads = f"{engine['threads']} thread{'s' * (engine['threads'] != 1)}"
    if engine["kind"] == "native":
        out.print(f"native engine ({engine['isa']}), {threads}\n")
    else:
        why = f": {engine['why_portable']}" if engine["why_portable"] else ""
        out.print(f"portable engine (torch), {threads}{why}\n")
    table(
        "Members",
        ("name", "peer", "alive", "blocks", "link", "RTT", "sent", "received"),
        [_member_row(member) for member in facts["members"]],
    )
    rows = [
        (
            f"{stage['span'][0]}-{stage['span'][1]}",
            str(stage["forwards"]),
            size(stage["received_bytes"]),
            seconds(stage["compute_s"]),
            size(stage["kv_free_bytes"]),
        )
        for stage in facts["stages"]
    ]
    if rows:
        out.print()
        table("Stages here", ("blocks", "steps", "received", "computed", "free KV cache"), rows)
    sessions = facts["sessions"]
    speed = f", last at {sessions['tok_per_s']:.1f} tok/s" if sessions["tok_per_s"] else ""
    out.print(
        f"\nsessions: {sessions['as_head']} asked from here, {sessions['as_stage']} served; "
        f"{sessions['generated_tokens']} tokens so far{speed}"
    )
    for model in facts["models"]:
        state = "ready" if model["is_ready"] else model["why_not"]
        out.print(f"model {model['name']}: {state}{_engine_text(model)}")


def _engine_text(model: dict[str, Any]) -> str:
    if model["engine"] is None:
        return ""
    if model["why_portable"]:
        return f", portable engine ({model['engine']}): {model['why_portable']}"
    return f", engine {model['engine']}"


def _member_row(member: dict[str, Any]) -> tuple[str, ...]:
    link = member["link"]
    spans = ", ".join(f"{start}-{end}" for start, end in member["spans"].values()) or "-"
    return (
        member["name"] + (" (this node)" if member["is_self"] else ""),
        member["peer_id"][-8:],
        "yes" if member["is_live"] else "no",
        spans,
        link["kind"] if link else "-",
        seconds(link["rtt_s"]) if link else "-",
        size(link["bytes_sent"]) if link else "-",
        size(link["bytes_received"]) if link else "-",
    )


def _render_plan(facts: dict[str, Any]) -> None:
    out.print(f"{facts['model']}: {facts['n_blocks']} blocks, aiming at {facts['prefer']}")
    if facts["points"]:
        table(
            "Plans worth having",
            ("", "stages", "first token", "per token", "all sessions", "most of a token"),
            [_point_row(point) for point in _thinned(facts["points"])],
        )
        if len(facts["points"]) > MAX_SHOWN:
            out.print(f"({len(facts['points'])} plans in all: --json has them)")
        if not facts["is_exact"]:
            out.print("(a bounded search: there may be better ones)")
    if facts["infeasible"]:
        out.print(f"no plan: {facts['infeasible']}")
    single = facts["single"]
    if single is not None:
        out.print(f"one machine alone: {_stages_text(single)}, {seconds(single['tpot_s'])} a token")
    elif facts["no_single_because"]:
        out.print(f"one machine alone: {facts['no_single_because']}")
    active = facts["active"]
    if active is None:
        out.print(f"active: none yet, {facts['why_not']}")
    else:
        out.print(f"active: {_stages_text(active)} (epoch {active['epoch']}), {facts['because']}")
        for point in facts["points"]:
            if point["is_active"]:
                for line in point["why"][1:]:
                    out.print(f"  {line}")


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of a long front, evenly over it, the chosen and the active point always among them."""
    if len(points) <= MAX_SHOWN:
        return points
    every = len(points) / MAX_SHOWN
    shown = {int(idx * every) for idx in range(MAX_SHOWN)}
    shown |= {idx for idx, point in enumerate(points) if point["is_chosen"] or point["is_active"]}
    return [points[idx] for idx in sorted(shown)]


def _point_row(point: dict[str, Any]) -> tuple[str, ...]:
    return (
        "*" if point["is_active"] else ("+" if point["is_chosen"] else ""),
        _stages_text(point),
        seconds(point["ttft_s"]),
        seconds(point["tpot_s"]),
        f"{point['throughput_tok_per_s']:.1f} tok/s",
        _bound_text(point["bound_by"]),
    )


def _bound_text(bound: dict[str, Any]) -> str:
    what = " > ".join(bound["peers"]) if bound["kind"] == "link" else bound["peers"][0]
    return f"{what} {bound['share']:.0%}"


def _stages_text(value: dict[str, Any]) -> str:
    return " > ".join(
        f"{stage['name']} {stage['span'][0]}-{stage['span'][1]}" for stage in value["stages"]
    )


def _render_models(facts: dict[str, Any]) -> None:
    for model in facts["models"]:
        state = "ready" if model["is_ready"] else model["why_not"]
        where = "" if model["is_local"] else " (no file of it here)"
        out.print(f"{model['name']}  {model['digest'][:8]}  {state}{where}")
    out.print("always known: " + ", ".join(facts["short_names"]))
