"""`covey run` and `covey chat`: text from the swarm, or from this machine alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from covey.client import Client, Generation, NotReady, TextStream, find_local_node
from covey.client.local import default_home

from . import options
from .render import err, out, print_json, seconds

READY_S = 60.0  # how long a question waits for a plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What every request of one command has in common."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None

    def body(self) -> dict[str, Any]:
        """The keywords of the client."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return body if self.seed is None else {**body, "seed": self.seed}


def run(
    model: Annotated[str, typer.Argument(help="Path, short name or owner/repository.")],
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    raw: options.Raw = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Use this machine only, even if a node runs.")
    ] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    home: options.Home = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer one PROMPT: with the swarm of this machine's node, or with this machine alone."""
    if prompt == "-":
        prompt = sys.stdin.read()
    ask = Ask(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    if alone or (url is None and not _has_swarm(home)):
        _run_alone(ask, prompt, raw=raw, as_json=as_json)
        return
    with _client(url, api_key, home) as client:
        if raw:
            stream = _when_ready(lambda: client.generate(prompt, stream=True, **ask.body()))
        else:
            messages = [{"role": "user", "content": prompt}]
            stream = _when_ready(partial(_chat, client, ask, messages))
        with stream:
            for chunk in stream:
                _write(chunk.text, quiet=as_json)
        _finish(stream.result, as_json=as_json)


def chat(
    model: Annotated[str, typer.Argument(help="Path, short name or owner/repository.")] = "smollm2",
    system: Annotated[str | None, typer.Option(help="How the model should behave.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    home: options.Home = None,
) -> None:
    """Talk to MODEL. Ctrl-C stops an answer, Ctrl-D or /exit ends, /clear starts over."""
    ask = Ask(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    with _client(url, api_key, home) as client:
        for line in _lines():
            if line == "/clear":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            with _when_ready(partial(_chat, client, ask, messages)) as stream:
                try:
                    for chunk in stream:
                        answer += chunk.text
                        _write(chunk.text, quiet=False)
                except KeyboardInterrupt:
                    err.print(" (stopped)")
            _write("\n", quiet=False)
            messages.append({"role": "assistant", "content": answer})


def _chat(client: Client, ask: Ask, messages: list[dict[str, str]]) -> TextStream:
    return client.chat(messages, stream=True, **ask.body())


def _when_ready(ask: Callable[[], TextStream]) -> TextStream:
    """Ask until there is a plan: a swarm that has just met needs some seconds.

    Raises:
        NotReady: there was none within `READY_S`.
    """
    give_up_at = time.monotonic() + READY_S
    with err.status("") as status:
        while True:
            try:
                return ask()
            except NotReady as error:
                if time.monotonic() + error.retry_after_s > give_up_at:
                    raise
                status.update(f"waiting: {error}")
                time.sleep(error.retry_after_s)


def _lines() -> Iterator[str]:
    """What the person types, until they end it."""
    while True:
        try:
            line = out.input("[bold]>[/bold] ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() in {"/exit", "/quit"}:
            return
        if line.strip():
            yield line.strip()


def _has_swarm(home: Path | None) -> bool:
    folder = home or default_home()
    return find_local_node(folder) is not None or (folder / "swarm.json").exists()


def _client(url: str | None, api_key: str | None, home: Path | None) -> Client:
    folder = home or default_home()
    if url is not None or find_local_node(folder) is not None:
        return Client(url, api_key=api_key, home=home)
    with err.status("starting a node that only asks"):
        return Client(home=home)


def _write(text: str, *, quiet: bool) -> None:
    if not quiet:
        sys.stdout.write(text)
        sys.stdout.flush()


def _finish(result: Generation, *, as_json: bool) -> None:
    timing = result.timing
    if as_json:
        print_json(
            {
                "text": result.text,
                "finish_reason": result.finish_reason,
                "prompt_tokens": result.usage.prompt_tokens,
                "completion_tokens": result.usage.completion_tokens,
                "ttft_s": timing.ttft_s if timing else None,
                "tok_per_s": timing.tok_per_s if timing else None,
                "stages": [list(stage.span) for stage in timing.stages] if timing else None,
            }
        )
        return
    _write("\n", quiet=False)
    if timing is not None and err.is_terminal:
        n_stages = len(timing.stages)
        err.print(
            f"{result.usage.completion_tokens} tokens, first after {seconds(timing.ttft_s)}, "
            f"{timing.tok_per_s or 0:.1f} tok/s over {n_stages} stage{'s' * (n_stages != 1)}",
            style="dim",
        )


def _run_alone(ask: Ask, prompt: str, *, raw: bool, as_json: bool) -> None:
    with err.status("starting the engine"):
        from covey.node.alone import generate_alone, load_alone
        from covey.node.catalog import open_model
        from covey.node.engines import Engines
        from covey.node.model.sampling import SamplingParams
        from covey.node.prompt import chat_tokens, prompt_tokens

    params = SamplingParams(
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        seed=ask.seed,
    )
    model = open_model(ask.model, Engines())
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task(f"loading {model.name}", total=model.checkpoint.config.n_blocks)
        stage = load_alone(model, on_block=lambda done, _: progress.update(task, completed=done))
    if raw:
        tokens = prompt_tokens(model.tokenizer, prompt)
    else:
        tokens = chat_tokens(model.tokenizer, [{"role": "user", "content": prompt}])
    began_at = time.perf_counter()
    first_at: float | None = None
    text = ""
    pieces = generate_alone(model, stage, tokens, params)
    reason = "stop"
    while True:
        try:
            piece = next(pieces)
        except StopIteration as ended:
            reason = ended.value
            break
        first_at = first_at or time.perf_counter()
        text += piece
        _write(piece, quiet=as_json)
    if not as_json:
        _write("\n", quiet=False)
        return
    print_json(
        {
            "text": text,
            "finish_reason": reason,
            "prompt_tokens": len(tokens),
            "ttft_s": None if first_at is None else first_at - began_at,
            "stages": [[0, model.checkpoint.config.n_blocks]],
        }
    )
