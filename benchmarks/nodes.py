"""The figures of whole nodes, as a person starts them: a pipeline over loopback, and memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from covey.cli.child import NodeProcess, wait_for
from covey.client import Client, ClientError
from covey.errors import CoveyError
from covey.node.model.checkpoint import open_checkpoint

from .contest import ContestantFailed, Turn
from .lab import THREADS, Lab, threads_text

MODEL = "smollm2"
PROMPT = "The history of the bicycle begins"
N_TOKENS = 64
PLAN_S = 120.0
MEGABYTE = 1e6


def pipeline(lab: Lab) -> None:
    """Greedy text from one node and from two that hold half of the blocks each, in turn."""
    for threads in THREADS:
        figure = f"smollm2: pipeline on loopback, {N_TOKENS} tokens, {threads_text(threads)}"
        with _folder() as folder, ExitStack() as stack:
            clients = {
                "one node": stack.enter_context(_swarm(folder / "one", lab, threads, n_nodes=1)),
                "two nodes": stack.enter_context(_swarm(folder / "two", lab, threads, n_nodes=2)),
            }
            turns = {name: _turn(client) for name, client in clients.items()}
            contest = lab.hold(figure, turns)
            kind = clients["one node"].status()["engine"]["kind"]
        name = f"{figure} a node, {kind} engine, two nodes over one"
        lab.ratio(contest, name, "two nodes", ["one node"], 0.93)


def _turn(client: Client) -> Turn:
    def run() -> float:
        try:
            result = client.generate(PROMPT, model=MODEL, max_tokens=N_TOKENS, temperature=0.0)
        except ClientError as error:
            raise ContestantFailed(str(error)) from error
        if result.timing is None or result.timing.tok_per_s is None:
            raise ContestantFailed("the answer carries no timing")
        return result.timing.tok_per_s

    return run


@contextmanager
def _swarm(folder: Path, lab: Lab, threads: int, *, n_nodes: int) -> Iterator[Client]:
    """A client of the first of `n_nodes` nodes that share the model evenly."""
    folder.mkdir()
    with open_checkpoint(lab.files[lab.shipped]) as checkpoint:
        cap = -(-checkpoint.config.n_blocks // n_nodes)
    with ExitStack() as stack:
        nodes = [stack.enter_context(_node(folder / "0", ["up", MODEL], cap, threads))]
        client = stack.enter_context(Client(home=Path(nodes[0].facts["home"])))
        for idx in range(1, n_nodes):
            arguments = ["join", client.invite(), "--model", MODEL]
            nodes.append(stack.enter_context(_node(folder / str(idx), arguments, cap, threads)))
        wait_for(lambda: _is_planned(client, nodes), PLAN_S, f"no plan over {n_nodes} nodes")
        yield client


def _node(home: Path, arguments: list[str], cap: int, threads: int) -> NodeProcess:
    options = ["--max-blocks", str(cap), "--threads", str(threads), "--name", home.name]
    network = ["--host", "127.0.0.1", "--api-port", "0", "--no-mdns"]
    return NodeProcess([*arguments, *options, *network], home=home)


def _is_planned(client: Client, nodes: list[NodeProcess]) -> bool:
    for node in nodes:
        if not node.is_running:
            raise CoveyError(f"a node ended before there was a plan: {node.log_tail(1)}")
    try:
        active = client.plan(MODEL)["active"]
    except ClientError:
        return False
    return active is not None and len(active["stages"]) == len(nodes)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Resident:
    """What is resident of a process, in bytes."""

    total: int
    packed: int  # of mapped files in the model cache, where packed blocks are
    checkpoint: int  # of a mapped checkpoint
    has_torch: bool


def memory(lab: Lab) -> None:
    """What a real node keeps in memory: weights, and everything else before its first token."""
    with _folder() as folder, _swarm(folder / "one", lab, 1, n_nodes=1) as client:
        pid = json.loads((folder / "one" / "0" / "api.json").read_text())["pid"]
        before = resident(pid)
        kind = client.status()["engine"]["kind"]
        _turn(client)()
        after = resident(pid)
    with open_checkpoint(lab.files[lab.shipped]) as checkpoint:
        n_bytes = sum(tensor.nbytes for tensor in checkpoint.source.tensors.values())
    name = f"memory of a node, {kind} engine"
    figure = f"{name}, weights held after a token over the file's bytes"
    if after.packed < n_bytes:
        why = (
            f"of {n_bytes} B only {after.packed} are in mapped packed files, the rest is anonymous"
        )
        lab.failures.append((figure, why))
    else:
        lab.add(figure, (after.packed + after.checkpoint) / n_bytes, 1.05)
    rest = before.total - before.packed - before.checkpoint
    lab.add(f"{name}, all but mapped weights before the first token, MB", rest / MEGABYTE, 200)
    lab.add(f"{name}, resident in all after a token, MB", after.total / MEGABYTE)
    lab.add(f"{name}, torch is loaded (1: yes)", float(before.has_torch), 0)


def resident(pid: int) -> Resident:
    """Read /proc/PID/smaps: resident bytes, and those of mapped weights among them."""
    by_kind = {"packed": 0, "checkpoint": 0, "": 0}
    kind, has_torch = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(" ")
        if not key.endswith(":"):  # the head of a mapping; its file, if any, comes last
            path = value.split(maxsplit=4)[-1]
            kind = _kind_of(path)
            has_torch = has_torch or "libtorch" in path
        elif key == "Rss:":
            by_kind[kind] += int(value.split()[0]) * 1024
    total = sum(by_kind.values())
    return Resident(total, by_kind["packed"], by_kind["checkpoint"], has_torch)


def _kind_of(path: str) -> str:
    """What a mapped file holds: checkpoint, packed weights, or neither."""
    if path.endswith((".gguf", ".safetensors")):
        return "checkpoint"
    return "packed" if path.startswith(platformdirs.user_cache_dir("covey")) else ""
