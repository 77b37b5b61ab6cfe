"""`covey demo`: several real nodes on this machine, one plan, one text, and the proof.

The nodes are ordinary processes that were given nothing but an invite. Each may hold so few
blocks that the planner needs them all. The text must equal that of one process.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from covey.client import Client, ClientError, Generation
from covey.errors import CoveyError

from . import options
from .child import NodeProcess, uninterrupted, wait_for
from .render import err, out, print_json, seconds, size, table

PLAN_S = 120.0


def demo(
    nodes: Annotated[int, typer.Option(min=2, max=10, help="How many node processes.")] = 3,
    prompt: Annotated[
        str, typer.Option(help="What to ask.")
    ] = "Why is the sky blue? Answer in two sentences.",
    model: Annotated[str, typer.Option(help="Path, short name or owner/repository.")] = "smollm2",
    max_tokens: options.MaxTokens = 64,
    keep_logs: Annotated[bool, typer.Option(help="Keep the nodes' homes and logs.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Start several nodes here, let them share a model, and check the text they make."""
    signal.signal(signal.SIGTERM, _end)
    folder = Path(tempfile.mkdtemp(prefix="covey-demo-"))
    try:
        with ExitStack() as stack:
            facts = _demo(stack, folder, nodes, prompt, model, max_tokens, quiet=as_json)
    except CoveyError:
        _show_logs(folder)
        raise
    finally:
        if keep_logs:
            err.print(f"logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print_json(facts)
    if not facts["identical"]:
        err.print("the text differs from that of one process", style="red")
        raise typer.Exit(1)


def _demo(
    stack: ExitStack,
    folder: Path,
    n_nodes: int,
    prompt: str,
    model: str,
    max_tokens: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    with err.status("starting the engine"):
        from covey.node.catalog import open_model
        from covey.node.engines import Engines
    n_blocks = open_model(model, Engines()).checkpoint.config.n_blocks
    if n_nodes > n_blocks:
        raise CoveyError(f"{model} has {n_blocks} blocks: at most that many --nodes")
    cap = _cap(n_blocks, n_nodes)
    with err.status("starting node 0"):
        with uninterrupted():
            first = stack.enter_context(_node(folder, 0, ["up", model], cap))
        client = stack.enter_context(Client(home=Path(first.facts["home"])))
        arguments = ["join", client.invite(uses=n_nodes - 1), "--model", model]
    with err.status(f"starting {n_nodes - 1} more"):
        children = [first]
        for idx in range(1, n_nodes):
            with uninterrupted():
                children.append(stack.enter_context(_node(folder, idx, arguments, cap)))
        for child in children:
            child.wait_until_up()
    with err.status(f"waiting for a plan over {n_nodes} nodes of at most {cap} blocks each"):
        wait_for(lambda: _is_planned(client, model, n_nodes, children), PLAN_S, "no plan")
    if not quiet:
        _show_members(client.status())
    result = _ask(client, model, prompt, max_tokens, quiet=quiet)
    with err.status("the same in one process"):
        reference = _reference(model, prompt, max_tokens)
    timing = result.timing
    if timing is None:
        raise CoveyError("the node's answer carries no timing")
    facts = {
        "nodes": n_nodes,
        "stages": [list(stage.span) for stage in timing.stages],
        "identical": result.text == reference,
        "link_bytes": [*(stage.received_bytes for stage in timing.stages), timing.returned_bytes],
        "ttft_s": round(timing.ttft_s, 4),
        "tok_s": round(timing.tok_per_s or 0.0, 2),
    }
    if not quiet:
        _show_result(facts)
    return facts


def _end(_number: int, _frame: FrameType | None) -> None:
    """End as by Ctrl-C, so that a `kill` leaves no folder either."""
    sys.exit(128 + signal.SIGTERM)


def _cap(n_blocks: int, n_nodes: int) -> int:
    """The largest share with which one node less would not be enough."""
    return min((n_blocks - 1) // (n_nodes - 1), -(-n_blocks // n_nodes) + 1)


def _node(folder: Path, idx: int, arguments: list[str], cap: int) -> NodeProcess:
    return NodeProcess(
        [
            *(*arguments, "--name", f"node-{idx}", "--max-blocks", str(cap)),
            *("--host", "127.0.0.1", "--api-port", "0", "--no-mdns"),
        ],
        home=folder / f"node-{idx}",
    )


def _is_planned(client: Client, model: str, n_nodes: int, children: list[NodeProcess]) -> bool:
    for child in children:
        if not child.is_running:
            raise CoveyError(f"a node ended before there was a plan; see {child.home}")
    try:
        active = client.plan(model)["active"]
    except ClientError:
        return False
    return active is not None and len(active["stages"]) == n_nodes


def _ask(client: Client, model: str, prompt: str, max_tokens: int, *, quiet: bool) -> Generation:
    messages = [{"role": "user", "content": prompt}]
    if not quiet:
        out.print(f"\n[bold]{prompt}[/bold]")
    with client.chat(
        messages, model=model, max_tokens=max_tokens, temperature=0.0, stream=True
    ) as stream:
        for chunk in stream:
            if not quiet:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    if not quiet:
        sys.stdout.write("\n\n")
    return stream.result


def _reference(name: str, prompt: str, max_tokens: int) -> str:
    from covey.node.alone import generate_alone, load_alone
    from covey.node.catalog import open_model
    from covey.node.engines import Engines
    from covey.node.model.sampling import SamplingParams
    from covey.node.prompt import chat_tokens

    model = open_model(name, Engines())
    stage = load_alone(model)
    tokens = chat_tokens(model.tokenizer, [{"role": "user", "content": prompt}])
    return "".join(generate_alone(model, stage, tokens, SamplingParams(max_tokens=max_tokens)))


def _show_members(status: dict[str, Any]) -> None:
    rows = []
    for member in status["members"]:
        spans = ", ".join(f"{start}-{end}" for start, end in member["spans"].values())
        link = member["link"]
        rtt = "this node" if member["is_self"] else seconds(link["rtt_s"] if link else None)
        rows.append((member["name"], member["peer_id"][-8:], spans or "-", rtt))
    table("Members", ("name", "peer", "blocks", "RTT"), rows)


def _show_result(facts: dict[str, Any]) -> None:
    n_stages = len(facts["stages"])
    borders = ["head > stage 0"]
    borders += [f"stage {idx - 1} > stage {idx}" for idx in range(1, n_stages)]
    borders.append(f"stage {n_stages - 1} > head")
    rows = [(name, size(n)) for name, n in zip(borders, facts["link_bytes"], strict=True)]
    table("Hidden states", ("link", "bytes"), rows)
    out.print(
        f"first token after {seconds(facts['ttft_s'])}, {facts['tok_s']:.1f} tok/s, text "
        + ("equal to one process" if facts["identical"] else "NOT equal to one process")
    )


def _show_logs(folder: Path) -> None:
    for log_path in sorted(folder.glob("node-*/node.log")):
        lines = log_path.read_text(errors="replace").splitlines()[-5:]
        for line in lines:
            err.print(f"{log_path.parent.name}: {line}", markup=False, style="dim")
