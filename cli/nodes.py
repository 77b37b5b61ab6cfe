"""`covey up`, `join`, `invite` and `stop`: the life of a node on this machine."""

from __future__ import annotations

import asyncio
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covey.errors import CoveyError
from covey.transport.errors import InviteInvalid
from covey.transport.invite import Invite

from . import options
from .logs import configure
from .processes import until_gone, wait_until_gone
from .render import err, out, print_json

if TYPE_CHECKING:
    from covey.node.config import NodeConfig
    from covey.node.runtime import Node

STOP_S = 60.0  # generations have ten, links and threads a few more
DETACHED_START_S = 120.0  # a Raspberry Pi imports torch for half a minute

Name = Annotated[str | None, typer.Option(help="What others see; this machine's name by default.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Model this node can serve; may be given several times."),
]
Host = Annotated[str, typer.Option(help="Address that members connect to; every one by default.")]
Port = Annotated[int, typer.Option(help="Port that members connect to; 0 takes a free one.")]
ApiHost = Annotated[str, typer.Option(help="Address of the HTTP API; others need --api-key.")]
ApiPort = Annotated[int, typer.Option(help="Port of the HTTP API; 0 takes a free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="Key that clients of the API must send.", envvar="COVEY_API_KEY"),
]
MaxBlocks = Annotated[
    int | None, typer.Option(min=0, help="Most blocks to hold here; 0: only ask, never serve.")
]
Memory = Annotated[
    str | None, typer.Option(help="Most memory for weights and KV cache, like 2G or 512M.")
]
Engine = Annotated[
    str,
    typer.Option(
        help="native runs the file's own quantised weights, fp32 and bf16 are torch; "
        "auto is native where it can be. All members of a plan run the same."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of the engine; by default every core, less one if there are more than two.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Quantise weights in F32, F16 or BF16 as the native engine loads them: q8_0, q4_0 or "
        "q4_k. Models that are quantised already stay as they are. All members do the same."
    ),
]
Speed = Annotated[
    float,
    typer.Option(hidden=True, help="Behave like a machine of this share of the speed."),
]
Prefer = Annotated[str, typer.Option(help="What plans aim at: latency, throughput or balanced.")]
Context = Annotated[int, typer.Option(min=16, help="Longest session to keep room for, in tokens.")]
Mdns = Annotated[bool, typer.Option(help="Find members on the local network by themselves.")]
Relay = Annotated[
    bool, typer.Option(help="Pass links on between members that cannot reach each other.")
]
MapPort = Annotated[
    bool, typer.Option(help="Ask the router to forward the port (UPnP, NAT-PMP), if that helps.")
]
Detach = Annotated[bool, typer.Option("--detach", help="Run in the background.")]
ExitWith = Annotated[
    int | None, typer.Option("--exit-with", hidden=True, help="Stop when this process is gone.")
]
DiscardHome = Annotated[
    bool, typer.Option("--discard-home", hidden=True, help="Remove --home at the end.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to stderr.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a node comes up and what it goes down with."""

    invite: str | None = None
    may_found: bool = False
    exit_with: int | None = None  # a process id
    discard_home: bool = False
    as_json: bool


def up(
    model: Annotated[str, typer.Argument(help="Path, short name or owner/repository.")] = "smollm2",
    name: Name = None,
    home: options.Home = None,
    host: Host = "0.0.0.0",  # noqa: S104  every link is authenticated before it answers
    port: Port = 0,
    api_host: ApiHost = "127.0.0.1",
    api_port: ApiPort = 8642,
    api_key: ApiKey = None,
    max_blocks: MaxBlocks = None,
    memory: Memory = None,
    engine: Engine = "auto",
    threads: Threads = None,
    quantize: Quantize = None,
    speed: Speed = 1.0,
    prefer: Prefer = "balanced",
    context: Context = 2048,
    mdns: Mdns = True,
    relay: Relay = True,
    map_port: MapPort = True,
    detach: Detach = False,
    verbose: Verbose = False,
    exit_with: ExitWith = None,
    as_json: options.AsJson = False,
) -> None:
    """Start a swarm on this machine, or go on with the one in --home, and print an invite."""
    if detach:
        _detach(home, as_json=as_json)
        return
    config = _config(
        home,
        name,
        models=(model,),
        host=host,
        port=port,
        api_host=api_host,
        api_port=api_port,
        api_key=api_key,
        max_blocks=max_blocks,
        memory=memory,
        engine=engine,
        threads=threads,
        quantize=quantize,
        speed=speed,
        prefer=prefer,
        context_tokens=context,
        mdns=mdns,
        relay=relay,
        map_port=map_port,
    )
    how = Start(may_found=True, exit_with=exit_with, as_json=as_json)
    _run(config, how, verbose=verbose)


def join(
    invite: Annotated[
        str | None, typer.Argument(help="What `covey up` printed; not needed to come back.")
    ] = None,
    model: Models = None,
    name: Name = None,
    home: options.Home = None,
    host: Host = "0.0.0.0",  # noqa: S104  every link is authenticated before it answers
    port: Port = 0,
    api_host: ApiHost = "127.0.0.1",
    api_port: ApiPort = 8642,
    api_key: ApiKey = None,
    max_blocks: MaxBlocks = None,
    memory: Memory = None,
    engine: Engine = "auto",
    threads: Threads = None,
    quantize: Quantize = None,
    speed: Speed = 1.0,
    prefer: Prefer = "balanced",
    context: Context = 2048,
    mdns: Mdns = True,
    relay: Relay = True,
    map_port: MapPort = True,
    detach: Detach = False,
    verbose: Verbose = False,
    exit_with: ExitWith = None,
    discard_home: DiscardHome = False,
    as_json: options.AsJson = False,
) -> None:
    """Join the swarm that INVITE is from, or come back to the one in --home."""
    if detach:
        _detach(home, as_json=as_json)
        return
    config = _config(
        home,
        name,
        models=tuple(model or ("smollm2",)),
        host=host,
        port=port,
        api_host=api_host,
        api_port=api_port,
        api_key=api_key,
        max_blocks=max_blocks,
        memory=memory,
        engine=engine,
        threads=threads,
        quantize=quantize,
        speed=speed,
        prefer=prefer,
        context_tokens=context,
        mdns=mdns,
        relay=relay,
        map_port=map_port,
    )
    how = Start(invite=invite, exit_with=exit_with, discard_home=discard_home, as_json=as_json)
    _run(config, how, verbose=verbose)


def invite(
    hours: Annotated[
        float, typer.Option(min=0.01, max=720, help="How long it is good for, in hours.")
    ] = 24,
    uses: Annotated[
        int,
        typer.Option(min=1, max=1000, help="How many machines it lets in: whoever comes first."),
    ] = 1,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Print a new invite to the swarm of this machine's node; keep it as secret as a password."""
    from .local import local_client

    with local_client(home) as client:
        text = client.invite(ttl_s=hours * 3600, uses=uses)
    if as_json:
        print_json({"invite": text})
    else:
        sys.stdout.write(text + "\n")


def stop(home: options.Home = None, as_json: options.AsJson = False) -> None:
    """Stop this machine's node: it finishes its generations and says goodbye."""
    from .local import local_client, local_node

    node = local_node(home)
    with local_client(home) as client:
        client.stop()
    with err.status("waiting for its generations to finish"):
        wait_until_gone(node.pid, STOP_S)
    if as_json:
        print_json({"stopped": True, "pid": node.pid})
    else:
        out.print("stopped")


def _config(home: Path | None, name: str | None, *, memory: str | None, **rest: Any) -> NodeConfig:
    from covey.client import default_home
    from covey.node.config import NodeConfig, parse_size

    return NodeConfig(
        home=home or default_home(),
        name=name or platform.node() or "node",
        memory_bytes=None if memory is None else parse_size(memory),
        **rest,
    )


def _run(config: NodeConfig, how: Start, *, verbose: bool) -> None:
    import uvloop

    configure(verbose=verbose)
    uvloop.run(_serve(config, how))


async def _serve(config: NodeConfig, how: Start) -> None:
    if how.invite is not None:
        # A mistyped one is refused at once, and not after the engine was loaded.
        Invite.parse(how.invite, unix_time=time.time())
    with err.status("starting the engine"):
        from covey.node.runtime import running_node
    status = err.status("joining the swarm" if how.invite else "opening the model")
    status.start()
    try:
        async with running_node(config, invite=how.invite, may_found=how.may_found) as node:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, _asked_to_stop, node, number)
            status.stop()
            _announce(node, as_json=how.as_json)
            measuring = asyncio.create_task(_show_measuring(node), name="progress bar")
            try:
                await _until_stopped(node, how.exit_with)
            finally:
                measuring.cancel()
            err.print("stopping: finishing what runs (again Ctrl-C ends at once)")
    finally:
        status.stop()
    if how.discard_home:
        shutil.rmtree(config.home, ignore_errors=True)


async def _show_measuring(node: Node) -> None:
    """A progress bar while the node measures its machine; only for a person who looks on."""
    if not err.is_terminal or node.planning.measured_share >= 1.0:
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("measuring this machine"), BarColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("", total=1.0)
        while node.planning.measured_share < 1.0:
            progress.update(bar, completed=node.planning.measured_share)
            await asyncio.sleep(0.1)


async def _until_stopped(node: Node, parent_pid: int | None) -> None:
    if parent_pid is None:
        await node.wait()
        return
    watch = asyncio.create_task(until_gone(parent_pid), name="watch of the parent")
    watch.add_done_callback(lambda _: node.request_stop())
    try:
        await node.wait()
    finally:
        watch.cancel()


def _asked_to_stop(node: Node, number: signal.Signals) -> None:
    node.request_stop()
    asyncio.get_running_loop().remove_signal_handler(number)


def _announce(node: Node, *, as_json: bool) -> None:
    url = node.api.url if node.api is not None else ""
    try:
        text = node.desk.invite(ttl_s=24 * 3600, uses=8)
    except InviteInvalid:
        text = None  # restarted very often within a day: the older ones are still good
    if as_json:
        print_json(
            {"invite": text, "url": url, "peer_id": node.peer_id, "home": str(node.home.path)}
        )
        return
    out.print(f"node {node.config.name} ({node.peer_id[-8:]}) is up")
    out.print(f"API  {url}/v1")
    if text is None:
        out.print("too many invites are open: use one of today's, or `covey invite` tomorrow")
        return
    out.print("\nOn another machine:\n")
    # Not through rich: it would wrap the one string that people paste.
    sys.stdout.write(f"  covey join {text}\n\n")
    sys.stdout.flush()


def _detach(home: Path | None, *, as_json: bool) -> None:
    """Start the same command again without --detach, and wait until its API is there."""
    from covey.client import default_home
    from covey.client.local import find_local_node

    folder = home or default_home()
    log_path = folder / "node.log"
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    with ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = stack.enter_context(log_path.open("ab"))
        except OSError as error:
            raise CoveyError(
                f"cannot write the state folder {folder} ({error.strerror}): choose another --home"
            ) from error
        child = subprocess.Popen(
            [sys.executable, "-m", "covey.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + DETACHED_START_S
    node = None
    with err.status("starting"):
        while node is None or node.pid != child.pid:
            if child.poll() is not None:
                lines = log_path.read_text(errors="replace").strip().splitlines()
                raise CoveyError(lines[-1] if lines else f"the node ended at once; see {log_path}")
            if time.monotonic() > deadline:
                raise CoveyError(f"no node within {DETACHED_START_S:g} s; see {log_path}")
            time.sleep(0.1)
            node = find_local_node(folder)
    if as_json:
        print_json({"url": node.url, "pid": node.pid, "home": str(folder)})
    else:
        out.print(f"node {node.pid} runs in the background, API {node.url}/v1, log {log_path}")
