"""Plans for people: a front as a table, and what there is to say of one point, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .render import out, seconds, size, table

MAX_SHOWN = 12  # points of a front in a table
COLUMNS = (
    "",
    "no.",
    "stages",
    "first token",
    "per token",
    "all sessions",
    "most memory",
    "most of a token",
    "what would help",
)
MAX_ADVICE = 3  # sentences on what would help

Facts = dict[str, Any]


def render_plans(facts: Facts) -> None:
    """The front, what is chosen of it, and what runs."""
    _say(_aim_text(facts))
    _render_front("Plans worth having", facts)
    _render_active(facts)
    if facts["pinned"] is not None:
        _render_pin(facts["pinned"])


def render_explained(facts: Facts) -> None:
    """Everything there is to say of the choice."""
    chosen = next((point for point in facts["points"] if point["is_chosen"]), None)
    if chosen is None:
        return
    _say(f"\nNo. {chosen['n']}: {pipelines_text(chosen)}")
    for line in chosen["why"]:
        _say(f"- {line}")
    names = {
        member["peer_id"]: _name(member)
        for pipeline in chosen["pipelines"]
        for stage in pipeline["stages"]
        for member in stage["members"]
    }
    memory = ", ".join(
        f"{names[peer]} {size(n_bytes)}" for peer, n_bytes in chosen["memory_bytes"].items()
    )
    _say(f"- memory at its peak: {memory}")
    links = ", ".join(
        f"{names.get(link['from'], link['from'][-8:])} > {names.get(link['to'], link['to'][-8:])} "
        f"{size(link['bytes'])}"
        for link in chosen["link_bytes_per_token"]
    )
    if links:
        _say(f"- a token's bytes on links: {links}")
    for advice in chosen["improve"][:MAX_ADVICE]:
        _say(f"- {advice['text']}")
    if not chosen["improve"]:
        _say("- no faster device, memory or link alone would make it much better")


def render_what_if(facts: Facts) -> None:
    """The front of other hardware, beside what is chosen now."""
    then = facts["what_if"]
    _say(_aim_text(facts))
    _render_front(f"What if {', '.join(then['changes'])}", then)
    gain, now = then["gain"], then["now"]
    if gain is not None:
        _say(
            f"the choice then against the choice now ({pipelines_text(now)}): first token "
            f"{gain['ttft']:.2f}x as fast, each token {gain['tpot']:.2f}x, all sessions together "
            f"{gain['throughput']:.2f}x; for {facts['prefer']} {gain['preferred']:.2f}x as good"
        )
    elif now is None and then["points"]:
        _say("there is no plan now: with this there would be")


def _aim_text(facts: Facts) -> str:
    workload = facts["workload"]
    return (
        f"{facts['model']}: {facts['n_blocks']} blocks, aiming at {facts['prefer']}, for questions "
        f"of {workload['prompt_tokens']} tokens and {workload['sessions']} sessions at once"
    )


def _render_front(title: str, facts: Facts) -> None:
    points = facts["points"]
    if points:
        table(title, COLUMNS, [_point_row(point) for point in _thinned(points)])
        if len(points) > MAX_SHOWN:
            _say(f"({len(points)} plans in all: --json has them)")
        if not facts["is_exact"]:
            _say("(a bounded search: there may be better ones)")
    if facts["infeasible"]:
        _say(f"no plan: {facts['infeasible']}")
    for line in facts["unmet"]:
        _say(line)
    single = facts["single"]
    if single is not None:
        _say(
            f"one machine alone: {pipelines_text(single)}, first token {seconds(single['ttft_s'])},"
            f" {seconds(single['tpot_s'])} a token, {single['throughput_tok_per_s']:.1f} tok/s"
        )
    elif facts["no_single_because"] and not facts["infeasible"]:
        _say(f"one machine alone: {facts['no_single_because']}")


def _render_active(facts: Facts) -> None:
    active = facts["active"]
    if active is None:
        _say(f"active: none yet, {facts['why_not']}")
        return
    _say(f"active: {pipelines_text(active)} (epoch {active['epoch']}), {facts['because']}")
    for point in facts["points"]:
        if point["is_active"]:
            for line in point["why"][1:]:
                _say(f"  {line}")


def _render_pin(pin: Facts) -> None:
    text = f"pinned by {pin['by']}: {pipelines_text(pin)}"
    if pin["why_not"] is not None:
        text += f"; it cannot run now: {pin['why_not']}"
    _say(text)


def _thinned(points: Sequence[Facts]) -> Sequence[Facts]:
    """Some of a long front, evenly over it, the chosen and the active point always among them."""
    if len(points) <= MAX_SHOWN:
        return points
    every = len(points) / MAX_SHOWN
    shown = {int(idx * every) for idx in range(MAX_SHOWN)}
    shown |= {idx for idx, point in enumerate(points) if point["is_chosen"] or point["is_active"]}
    return [points[idx] for idx in sorted(shown)]


def _point_row(point: Facts) -> tuple[str, ...]:
    mark = ("*" if point["is_active"] else "") + ("+" if point["is_chosen"] else "")
    return (
        mark,
        str(point["n"]),
        pipelines_text(point),
        seconds(point["ttft_s"]),
        seconds(point["tpot_s"]),
        f"{point['throughput_tok_per_s']:.1f} tok/s",
        size(max(point["memory_bytes"].values())),
        _bound_text(point["bound_by"]),
        _advice_text(point["improve"]),
    )


def _bound_text(bound: Facts) -> str:
    joint = " > " if bound["kind"] == "link" else "+"
    what = joint.join(bound["peers"]) + ("'s disk" if bound["kind"] == "disk" else "")
    return f"{what} {bound['share']:.0%}"


def _advice_text(advice: Sequence[Facts]) -> str:
    if not advice:
        return "-"
    best = advice[0]
    names = "-".join(best["names"])
    what = {
        "wire": f"{names} wired",
        "connect": f"link {names}",
        "speed": f"{names} faster",
        "memory": f"{names} more memory",
        "blocks": f"{names} more blocks",
    }[best["kind"]]
    return f"{what}: {best['gain']:.2g}x"


def pipelines_text(value: Facts) -> str:
    """Replicas are joined by "|", stages by ">"; a link's codec stands there unless `exact`."""
    return " | ".join(_pipeline_text(pipeline) for pipeline in value["pipelines"])


def _pipeline_text(pipeline: Facts) -> str:
    text = ""
    for idx, stage in enumerate(pipeline["stages"]):
        codec = pipeline["codecs"][idx]
        if idx:
            text += " > " if codec == "exact" else f" >{codec}> "
        text += _stage_text(stage)
    return text


def _stage_text(stage: Facts) -> str:
    """`attic 0-12 (3 from disk)`, or of a group `[attic* 2h/64c + barn 1h/32c] 0-12`, * the hub."""
    start, end = stage["span"]
    members = stage["members"]
    if len(members) == 1:
        return f"{_name(members[0])} {start}-{end}{_disk_text(members[0])}"
    shares = " + ".join(_share_text(member, stage["hub"]) for member in members)
    return f"[{shares}] {start}-{end}"


def _share_text(member: Facts, hub: str) -> str:
    mark = "*" if hub in (member["name"], member["peer_id"]) else ""
    shares = f"{member['kv_heads']}h/{member['mlp_columns']}c"
    return f"{_name(member)}{mark} {shares}{_disk_text(member)}"


def _disk_text(member: Facts) -> str:
    streamed = member["streamed_blocks"]
    return f" ({streamed} from disk)" if streamed else ""


def _name(member: Facts) -> str:
    return str(member["name"] or member["peer_id"][-8:])


def _say(text: str) -> None:
    """A line that may be long, with names that may hold brackets."""
    out.print(text, markup=False, soft_wrap=True)
