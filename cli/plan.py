"""`covey plan`: the plans worth having, why they are as they are, and which one is to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from covey.client import BadRequest, Client, PlanOptions

from . import options
from .local import local_client
from .plan_render import pipelines_text, render_explained, render_plans, render_what_if
from .render import out, print_json, show

MAX_FILE_BYTES = 1 << 20  # of a plan or of measured figures
ANSWER_S = 300.0  # a search over many devices that nobody has asked for yet

WHAT_IF_HELP = (
    "Plan for hardware you do not have; may be given several times. add=KIND_OR_NAME[,link=LINK]"
    "[,memory=8G][,speed=2][,count=3] adds machines (pi4, pi5, minipc, laptop, m1, desktop, or "
    "another one like a member), remove=NAME takes one away, link=NAME:LINK changes its links "
    "(lan, wifi, bad-wifi, wan, 4g, or figures like 5ms/100mbit), memory=NAME:8G and speed=NAME:2 "
    "change a machine."
)


def plan(
    model: Annotated[str, typer.Argument(help="A model of the swarm.")] = "smollm2",
    prefer: Annotated[
        str | None,
        typer.Option(
            help="What to choose by: latency (one answer soon), throughput (many at once) or "
            "balanced; the node's own by default."
        ),
    ] = None,
    max_ttft: Annotated[
        float | None,
        typer.Option(min=0.0, help="Choose among plans whose first token comes within so many s."),
    ] = None,
    min_throughput: Annotated[
        float | None,
        typer.Option(min=0.0, help="Choose among plans that do so many tokens/s, all told."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the question to predict for.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Answers in the making at once to predict for.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say of the choice what bounds it, what would help, how it compares with one "
            "machine alone.",
        ),
    ] = False,
    why: Annotated[
        str | None, typer.Option(metavar="PEER", help="Say why this machine is left out.")
    ] = None,
    what_if: Annotated[list[str] | None, typer.Option(metavar="CHANGE", help=WHAT_IF_HELP)] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the plans into this .svg, .png or .html file (`covey[plot]`)."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Measured figures to draw too: a JSON list of {label, tpot_s, "
            "throughput_tok_per_s}, ttft_s if known."
        ),
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
    """Show the plans worth having for MODEL, what each should do, and which one runs.

    None of them is beaten by another in everything: first token, each token, and all sessions
    together. The choice is marked +, the one that runs *.
    """
    if (apply is not None) + (apply_file is not None) + unpin > 1:
        raise BadRequest("--apply, --apply-file and --unpin exclude each other: give one")
    if measured is not None and plot is None:
        raise BadRequest("--measured is for a picture: give --plot as well")
    asked = PlanOptions(advice=apply is None)
    given = {
        "max_ttft_s": max_ttft,
        "min_throughput": min_throughput,
        "prompt_tokens": prompt_tokens,
        "sessions": sessions,
        "why": why,
        "what_if": what_if or None,
    }
    asked.update({name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    with local_client(home, timeout_s=ANSWER_S) as client:
        if unpin:
            show(client.unpin_plan(model), as_json=as_json, render=_render_unpinned)
            return
        if apply_file is not None:
            _pin(client, model, _read_plan(apply_file), as_json=as_json)
            return
        facts = client.plan(model, prefer, **asked)
        if apply is not None:
            _pin(client, model, _point(facts, apply), as_json=as_json)
            return
    if plot is not None:
        _draw(facts, plot, measured)
    show(facts, as_json=as_json, render=lambda facts: _render(facts, explain=explain))


def _render(facts: dict[str, Any], *, explain: bool) -> None:
    """What was asked for; the plans as they are unless it was something else."""
    if facts["what_if"] is not None:
        render_what_if(facts)
    elif facts["why"] is None:
        render_plans(facts)
    if explain:
        render_explained(facts if facts["what_if"] is None else facts["what_if"])
    if facts["why"] is not None:
        out.print(facts["why"]["text"], markup=False, soft_wrap=True)


def _draw(facts: dict[str, Any], path: Path, measured: Path | None) -> None:
    """Draw the plans; what that needs is imported here, since few commands do."""
    from .plan_plot import draw, measured_points

    points = [] if measured is None else measured_points(_read_json(measured), str(measured))
    draw(facts, path, points)


def _pin(client: Client, model: str, value: dict[str, Any], *, as_json: bool) -> None:
    done = client.pin_plan(model, value)
    if as_json:
        print_json(done)
        return
    out.print(f"pinned: {pipelines_text(done)}", markup=False, soft_wrap=True)
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


def _read_plan(path: Path) -> dict[str, Any]:
    """The plan in a file, which the node checks."""
    value = _read_json(path)
    if not isinstance(value, dict) or "pipelines" not in value:
        raise BadRequest(f'{path}: must be an object with "pipelines", as `covey plan --json` has')
    return value


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadRequest(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path}: is not JSON: {error}") from error
    return value


def _render_unpinned(done: dict[str, Any]) -> None:
    if done["was_pinned"]:
        out.print("no plan is pinned any more: the swarm chooses")
    else:
        out.print("no plan was pinned")
