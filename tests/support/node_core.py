"""Nodes reduced to their core: a real switch, stages and pipelines on links in memory.

Engines add and record, workers run in the event loop, time is virtual: every test of a session's
life takes milliseconds and always goes the same way.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

import numpy as np

from covey.node.engine.errors import UnknownSession
from covey.node.engine.lease import LeaseTable
from covey.node.engine.stage import Stage, Step, StepResult, forward_each
from covey.node.engine.tensors import EngineDtype, EngineKind, HiddenStates
from covey.node.pipeline import Pipelines
from covey.node.route import Route
from covey.node.serving import LEASE_TTL_S, LoadedStage, StageServer
from covey.node.switch import Switch
from covey.node.worker import Done, Worker, WorkerClosed
from covey.partition.plan import Pipeline, Prediction, StagePlan, make_plan
from covey.transport.errors import LinkBroken, PeerUnreachable, TransportError
from covey.transport.frame import Tensor
from covey.transport.identity import Identity
from covey.transport.memory import Conditions, MemoryLink, memory_link_pair
from covey.transport.messages import Forward
from covey.transport.peer import Peer
from covey.transport.tasks import Tasks

from .virtual_time import VirtualTimeLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PEERS = tuple(Identity(bytes([n] * 32)).peer_id for n in range(1, 6))
HIDDEN = 4
LINK_S = 0.01
MODEL_DIGEST = "ab" * 32


class CoreLoop(VirtualTimeLoop):
    """Virtual time does not wait for threads, so what would go to one runs here and now."""

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop whose clock jumps; what escapes a task or a callback fails it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        escaped: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=CoreLoop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: escaped.append(context))
            runner.run(test(*args, **kwargs))
        assert not escaped

    return run


async def settled() -> None:
    """Until everything that can happen without time passing has happened."""
    for _ in range(20):
        await asyncio.sleep(0)


class AddingStage:
    """An engine that adds one to every value and writes down what it is asked."""

    def __init__(self, n_blocks: int = 1, dtype: EngineDtype = "fp32") -> None:
        self.span = (0, n_blocks)
        self.dtype: EngineDtype = dtype
        self.hidden_size = HIDDEN
        self.weight_bytes = 0
        self.kv_bytes_per_token = 1
        self.calls: list[tuple[str, str, int, int]] = []  # (what, session, position, n_tokens)
        self.open: dict[str, int] = {}
        self.error: BaseException | None = None  # raised by the next call but for `close_session`

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        self._note("open", session, 0, n_tokens)
        self.open[session] = n_tokens
        return 0

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        self._note("forward", session, position, len(hidden))
        if session not in self.open:
            raise UnknownSession(session)
        return hidden + np.float32(1) if self.dtype == "fp32" else hidden.copy()

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        return forward_each(self, steps)

    def close_session(self, session: str) -> None:
        self.calls.append(("close", session, 0, 0))
        self.open.pop(session, None)

    @property
    def forwards(self) -> list[tuple[int, int]]:
        """(position, n_tokens) of each forward."""
        return [call[2:] for call in self.calls if call[0] == "forward"]

    def _note(self, what: str, session: str, position: int, n_tokens: int) -> None:
        self.calls.append((what, session, position, n_tokens))
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class InlineWorker(Worker):
    """Runs jobs in the event loop, in order; while `is_held` they wait for `release`."""

    def __init__(self) -> None:
        self.is_held = False
        self.waiting: list[Callable[[], None]] = []
        self._is_closed = False

    def run(self, job: Callable[[], T]) -> asyncio.Future[Done[T]]:
        future: asyncio.Future[Done[T]] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_exception(WorkerClosed())
            return future

        def call() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(Done(job(), 0.001, 0.002))
            except BaseException as error:  # noqa: BLE001 - as the thread does
                future.set_exception(error)

        if self.is_held:
            self.waiting.append(call)
        else:
            call()
        return future

    def release(self, n_jobs: int | None = None) -> None:
        """Run the first jobs that wait, all of them and those to come by default."""
        self.is_held = n_jobs is not None
        now, self.waiting = self.waiting[:n_jobs], self.waiting[len(self.waiting[:n_jobs]) :]
        for call in now:
            call()

    @property
    def is_idle(self) -> bool:
        return False  # so that nothing goes past `waiting`

    def close(self, timeout_s: float = 5.0) -> None:
        self._is_closed = True


class CoreNode:
    """One node without mesh, store and HTTP."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.peers: dict[str, Peer] = {}
        self.links: dict[str, MemoryLink] = {}
        self.lost: list[tuple[str, TransportError]] = []
        self.clock = asyncio.get_running_loop().time
        self._tasks = Tasks()
        self.worker = InlineWorker()
        self.switch = Switch(peer_id, self._find_peer)
        self.server = StageServer(self.switch, self.worker, self.clock)
        self.pipelines = Pipelines(self.switch)
        self.switch.on_message(Forward, self._take_forward)

    def load(
        self, route: Route, *, engine: Stage | None = None, capacity_tokens: int = 1000
    ) -> LoadedStage:
        """Serve this node's stage of a plan."""
        engine = engine or AddingStage()
        leases = LeaseTable(
            bytes_per_token=engine.kv_bytes_per_token,
            capacity_bytes=capacity_tokens * engine.kv_bytes_per_token,
            ttl_s=LEASE_TTL_S,
        )
        return self.server.add(route, route.peers.index(self.peer_id), engine, leases)

    def attach(self, link: MemoryLink) -> None:
        peer = Peer(link, self.switch.receive, clock=self.clock)
        self.peers[peer.peer_id], self.links[peer.peer_id] = peer, link
        self._tasks.spawn(self._read(peer), "link")

    async def _read(self, peer: Peer) -> None:
        error = await peer.run()
        self.peers.pop(peer.peer_id, None)
        self.lost.append((peer.peer_id, error))
        self.server.peer_lost(peer.peer_id)
        self.pipelines.peer_lost(peer.peer_id)

    async def _find_peer(self, peer_id: str) -> Peer:
        peer = self.peers.get(peer_id)
        if peer is None:
            raise PeerUnreachable(peer_id, "no link in this test")
        return peer

    def _take_forward(self, sender: str, message: Forward, tensors: Any) -> None:
        if not self.pipelines.take_return(sender, message, tensors):
            self.server.take_forward(sender, message, tensors)


class Net:
    """Some nodes, each linked with each; use as an async context."""

    def __init__(self, n_nodes: int, *, delay_s: float = LINK_S) -> None:
        self.nodes = [CoreNode(peer_id) for peer_id in PEERS[:n_nodes]]
        for idx, a in enumerate(self.nodes):
            for b in self.nodes[idx + 1 :]:
                ends = memory_link_pair(
                    a.peer_id, b.peer_id, conditions=Conditions(delay_s=delay_s)
                )
                a.attach(ends[0])
                b.attach(ends[1])

    async def __aenter__(self) -> list[CoreNode]:
        return self.nodes

    async def __aexit__(self, *_: object) -> None:
        for node in self.nodes:
            node.worker.release()
            await node.pipelines.aclose()
            await node.server.aclose()
            await node.switch.aclose()
            for peer in list(node.peers.values()):
                peer.abort(LinkBroken("the test is over"))
        await settled()


def route_of(
    *peer_ids: str,
    codec: str = "exact",
    engine: EngineKind = "fp32",
    spans: Sequence[tuple[int, int]] | None = None,
    epoch: int = 3,
    model_digest: str = MODEL_DIGEST,
) -> Route:
    """A plan over these peers, one block each by default."""
    spans = spans or [(idx, idx + 1) for idx in range(len(peer_ids))]
    stages = [
        StagePlan.alone(peer_id, *span) for peer_id, span in zip(peer_ids, spans, strict=True)
    ]
    prediction = Prediction(
        ttft_s=1.0,
        tpot_s=1.0,
        throughput_tok_per_s=1.0,
        memory_bytes=tuple((peer_id, 1) for peer_id in peer_ids),
    )
    return Route.of(
        make_plan(
            [Pipeline.of(stages, codecs=(codec,) * (len(stages) + 1))],
            prediction,
            model_digest=model_digest,
            epoch=epoch,
            proposer=peer_ids[0],
            engine=engine,
        )
    )


def rows(n_tokens: int, *, first: float = 0.0) -> HiddenStates:
    """Hidden states that can be told apart: row i is first + i throughout."""
    return np.repeat(np.arange(n_tokens, dtype=np.float32)[:, None] + np.float32(first), HIDDEN, 1)


def wire(hidden: HiddenStates) -> dict[str, Tensor]:
    """Hidden states as the tensors of a frame."""
    return {"hidden": Tensor("fp32", hidden.shape, hidden.tobytes())}
