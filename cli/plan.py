"""`covey plan`: the plans worth having, which one runs and why, and pinning one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from covey.client import BadRequest, Client

from . import options
from .local import local_client
from .render import out, print_json, seconds, show, table

MAX_SHOWN = 12  # points of a front in a table
MAX_FILE_BYTES = 1 << 20  # of a plan that is given


def plan(
    model: Annotated[str, typer.Argument(help="A model of the swarm.")] = "smollm2",
    prefer: Annotated[
        str | None, typer.Option(help="latency, throughput or balanced; the node's own by default.")
    ] = None,
    apply: Annotated[
        int | None,
        typer.Option(min=1, help="Have the swarm run the plan of this number, until --unpin."),
    ] = None,
    apply_file: Annotated[
        Path | None,
        typer.Option(help='The same with a plan of your own, {"pipelines": ...} as in --json.'),
    ] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Let the swarm choose again.")] = False,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the plans worth having for MODEL, what each should do, and which one runs."""
    if (apply is not None) + (apply_file is not None) + unpin > 1:
        raise BadRequest("--apply, --apply-file and --unpin exclude each other: give one")
    with local_client(home) as client:
        if unpin:
            show(client.unpin_plan(model), as_json=as_json, render=_render_unpinned)
        elif apply is not None:
            _pin(client, model, _point(client.plan(model, prefer), apply), as_json=as_json)
        elif apply_file is not None:
            _pin(client, model, _read(apply_file), as_json=as_json)
        else:
            show(client.plan(model, prefer), as_json=as_json, render=_render)


def _pin(client: Client, model: str, value: dict[str, Any], *, as_json: bool) -> None:
    done = client.pin_plan(model, value)
    if as_json:
        print_json(done)
        return
    out.print(f"pinned: {_pipelines_text(done)}", markup=False, soft_wrap=True)
    out.print("its members load their blocks now; `covey plan` shows when it runs")


def _point(facts: dict[str, Any], number: int) -> dict[str, Any]:
    for point in facts["points"]:
        if point["n"] == number:
            found: dict[str, Any] = point
            return found
    n_points = len(facts["points"])
    if not n_points:
        raise BadRequest(f"there is no plan to pin: {facts['infeasible']}")
    raise BadRequest(f"there is no plan number {number}: they go from 1 to {n_points}")


def _read(path: Path) -> dict[str, Any]:
    """The plan in a file, which the node checks."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadRequest(f"{path}: is larger than any plan")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict) or "pipelines" not in value:
        raise BadRequest(f'{path}: must be an object with "pipelines", as `covey plan --json` has')
    return value


def _render_unpinned(done: dict[str, Any]) -> None:
    if done["was_pinned"]:
        out.print("no plan is pinned any more: the swarm chooses")
    else:
        out.print("no plan was pinned")


def _render(facts: dict[str, Any]) -> None:
    out.print(f"{facts['model']}: {facts['n_blocks']} blocks, aiming at {facts['prefer']}")
    if facts["points"]:
        table(
            "Plans worth having",
            ("", "no.", "stages", "first token", "per token", "all sessions", "most of a token"),
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
        out.print(
            f"one machine alone: {_pipelines_text(single)}, {seconds(single['tpot_s'])} a token"
        )
    elif facts["no_single_because"]:
        out.print(f"one machine alone: {facts['no_single_because']}")
    active = facts["active"]
    if active is None:
        out.print(f"active: none yet, {facts['why_not']}")
    else:
        out.print(
            f"active: {_pipelines_text(active)} (epoch {active['epoch']}), {facts['because']}"
        )
        for point in facts["points"]:
            if point["is_active"]:
                for line in point["why"][1:]:
                    out.print(f"  {line}")
    if facts["pinned"] is not None:
        _render_pin(facts["pinned"])


def _render_pin(pin: dict[str, Any]) -> None:
    text = f"pinned by {pin['by']}: {_pipelines_text(pin)}"
    if pin["why_not"] is not None:
        text += f"; it cannot run now: {pin['why_not']}"
    out.print(text, markup=False, soft_wrap=True)


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
        str(point["n"]),
        _pipelines_text(point),
        seconds(point["ttft_s"]),
        seconds(point["tpot_s"]),
        f"{point['throughput_tok_per_s']:.1f} tok/s",
        _bound_text(point["bound_by"]),
    )


def _bound_text(bound: dict[str, Any]) -> str:
    what = " > ".join(bound["peers"]) if bound["kind"] == "link" else bound["peers"][0]
    return f"{what} {bound['share']:.0%}"


def _pipelines_text(value: dict[str, Any]) -> str:
    """Replicas are joined by "|", stages by ">", a link's codec stands at its ">" if not exact."""
    return " | ".join(_pipeline_text(pipeline) for pipeline in value["pipelines"])


def _pipeline_text(pipeline: dict[str, Any]) -> str:
    text = ""
    for idx, stage in enumerate(pipeline["stages"]):
        codec = pipeline["codecs"][idx]
        if idx:
            text += " > " if codec == "exact" else f" >{codec}> "
        text += _stage_text(stage)
    return text


def _stage_text(stage: dict[str, Any]) -> str:
    start, end = stage["span"]
    members = stage["members"]
    if len(members) == 1:
        streamed = members[0]["streamed_blocks"]
        disk = f" ({streamed} from disk)" if streamed else ""
        return f"{_name(members[0])} {start}-{end}{disk}"
    shares = ", ".join(_share_text(member, stage["hub"]) for member in members)
    return f"[{shares}] {start}-{end}"


def _share_text(member: dict[str, Any], hub: str) -> str:
    name = _name(member)
    mark = " (hub)" if hub in (member["name"], member["peer_id"]) else ""
    return f"{name} {member['kv_heads']}h {member['mlp_columns']}c{mark}"


def _name(member: dict[str, Any]) -> str:
    return str(member["name"] or member["peer_id"][-8:])
