"""What splitting a model over two nodes costs per token, and how fast a link is, on loopback.

    make bench-pipeline

Two real nodes, each capped to 15 of the 30 blocks of SmolLM2-135M: one in this process, which is
also the head, and one in a child. Every answer carries what each stage computed, so the cost is
read inside one run: the time of a token, less the compute of the stages and of the head. The
same prompt then runs in one process, in turn, for the ratio. Needs an idle machine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from covey.node.alone import load_alone
from covey.node.catalog import LocalModel
from covey.node.config import NodeConfig
from covey.node.engine.generate import generate
from covey.node.engine.stage import Stage
from covey.node.model.sampling import SamplingParams
from covey.node.prompt import prompt_tokens
from covey.node.runtime import Node, running_node
from covey.node.service import Delta, GenerationRequest, StepTiming

from .bench_link import link_rows
from .rows import Row, report

N_TOKENS = 256
N_ROUNDS = 3
MAX_BLOCKS = 15
PROMPT = "The history of the bicycle begins"
PLAN_S = 120.0


async def main() -> list[Row]:
    """Start both nodes, measure in turn, stop both."""
    with tempfile.TemporaryDirectory(prefix="covey-bench-") as folder:
        config = NodeConfig(
            home=Path(folder) / "head",
            name="head",
            models=("smollm2",),
            host="127.0.0.1",
            max_blocks=MAX_BLOCKS,
            mdns=False,
        )
        async with running_node(config, may_found=True) as node:
            invite = node.desk.invite(ttl_s=600, uses=1)
            async with _second_node(invite, Path(folder) / "second"):
                await _planned(node)
                return await _measure(node)


@asynccontextmanager
async def _second_node(invite: str, home: Path) -> AsyncGenerator[None, None]:
    child = subprocess.Popen(  # noqa: ASYNC220  once, before anything is measured
        [
            *(sys.executable, "-m", "covey.cli", "join", invite, "--home", str(home)),
            *("--host", "127.0.0.1", "--api-port", "0", "--no-mdns"),
            *("--max-blocks", str(MAX_BLOCKS)),
        ],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        await asyncio.to_thread(child.wait, 30)


async def _planned(node: Node) -> None:
    async with asyncio.timeout(PLAN_S):
        while True:
            model = next(iter(node.catalog))
            route = node.planning.route(model.digest)
            if route is not None and route.n_stages == 2:
                return
            await asyncio.sleep(0.1)


async def _measure(node: Node) -> list[Row]:
    model = next(iter(node.catalog))
    alone = load_alone(model)
    steps: list[StepTiming] = []
    alone_s: list[float] = []
    await _split_round(node, 16)
    for _ in range(N_ROUNDS):
        steps += await _split_round(node, N_TOKENS)
        alone_s += await asyncio.to_thread(_alone_round, model, alone)
    cost_s = [step.total_s - step.stages_s - step.head_s for step in steps]
    split_s = statistics.median(step.total_s for step in steps)
    one_s = statistics.median(alone_s)
    return [
        Row("time per token beyond all compute, median, ms", 1e3 * statistics.median(cost_s), 0.5),
        Row("  90th percentile, ms", 1e3 * statistics.quantiles(cost_s, n=10)[-1]),
        Row("  the head's own compute, median, ms", 1e3 * _median_head(steps)),
        Row("  the stages' compute, median, ms", 1e3 * _median_stages(steps)),
        Row("time per token over two nodes, median, ms", 1e3 * split_s),
        Row("time per token in one process, median, ms", 1e3 * one_s),
        Row("ratio, two nodes to one process", split_s / one_s),
    ]


def _median_head(steps: list[StepTiming]) -> float:
    return statistics.median(step.head_s for step in steps)


def _median_stages(steps: list[StepTiming]) -> float:
    return statistics.median(step.stages_s for step in steps)


async def _split_round(node: Node, n_tokens: int) -> list[StepTiming]:
    request = GenerationRequest(
        model="smollm2", prompt=PROMPT, params=SamplingParams(max_tokens=n_tokens)
    )
    return [
        event.timing
        async for event in node.desk.generate(request)
        if isinstance(event, Delta) and event.timing is not None
    ]


def _alone_round(model: LocalModel, stage: Stage) -> list[float]:
    tokens = prompt_tokens(model.tokenizer, PROMPT)
    times: list[float] = []
    last_at: float | None = None
    for _ in generate(stage, model.head, tokens, SamplingParams(max_tokens=N_TOKENS)):
        now = time.perf_counter()
        if last_at is not None:
            times.append(now - last_at)
        last_at = now
    return times


if __name__ == "__main__":
    report([*uvloop.run(main()), *link_rows()])
