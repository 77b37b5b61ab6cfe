"""`covey status` and `models`: what the node knows, as tables or JSON."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from covey.client import NoLocalNode

from . import options
from .local import local_client
from .render import out, seconds, show, size, table

_STAGE_COLUMNS = "blocks", "part", "steps", "received", "computed", "sums", "disk", "free KV cache"


def status(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Show members, spans, links, sessions and speeds."""
    with local_client(home) as client:
        show(client.status(), as_json=as_json, render=_render_status)


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
            _part_text(stage),
            str(stage["forwards"]),
            size(stage["received_bytes"]),
            seconds(stage["compute_s"]),
            seconds(stage["sum_wait_s"]) if stage["role"] != "alone" else "-",
            seconds(stage["disk_wait_s"]) if stage["streamed_blocks"] else "-",
            size(stage["kv_free_bytes"]),
        )
        for stage in facts["stages"]
    ]
    if rows:
        out.print()
        table("Stages here", _STAGE_COLUMNS, rows)
    sessions = facts["sessions"]
    speed = f", last at {sessions['tok_per_s']:.1f} tok/s" if sessions["tok_per_s"] else ""
    out.print(
        f"\nsessions: {sessions['as_head']} asked from here, {sessions['as_stage']} served; "
        f"{sessions['generated_tokens']} tokens so far{speed}"
    )
    for model in facts["models"]:
        state = "ready" if model["is_ready"] else model["why_not"]
        out.print(f"model {model['name']}: {state}{_engine_text(model)}")


def _part_text(stage: dict[str, Any]) -> str:
    return "all" if stage["role"] == "alone" else f"{stage['role']} of {len(stage['members'])}"


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


def _render_models(facts: dict[str, Any]) -> None:
    for model in facts["models"]:
        state = "ready" if model["is_ready"] else model["why_not"]
        where = "" if model["is_local"] else " (no file of it here)"
        out.print(f"{model['name']}  {model['digest'][:8]}  {state}{where}")
    out.print("always known: " + ", ".join(facts["short_names"]))
