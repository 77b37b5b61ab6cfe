"""A span of decoder blocks on the native kernels: the fast `Stage`.

The file's own quantised weights, activations as bytes, a paged KV cache that sessions with the same
beginning share. Unlike the torch stage's, its results do not depend on threads, on the chunking of
the prompt, on what else is in a batch, on shared pages or on the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from covey.node.engine.errors import (
    CacheFull,
    CacheOverflow,
    EngineError,
    NonFiniteValues,
    PositionGap,
    UnknownSession,
)
from covey.node.engine.rope import RopeTables
from covey.node.engine.stage import PAGE_TOKENS, Step, StepResult
from covey.node.engine.tensors import EngineDtype, HiddenStates, Quantization, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.errors import UnsupportedModel

from .library import Bytes, Engine, PageTable, load_library, page_memory
from .packed import PackedBlock, Packer
from .packed_cache import PackedCache
from .pages import PagePool, SessionPages
from .structures import NO_ROPE, Activation, Block, KvType, Shape

KvDtype = Literal["fp16", "int8"]
KV_ITEMSIZE = 2  # fp16, what nodes use
KEPT_BYTES = 2**28  # of pages that no session holds, unless the caller says otherwise


def load_native_stage(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    threads: int = 1,
    on_block: Callable[[int, int], None] | None = None,
    *,
    engine: Engine | None = None,
    kv_dtype: KvDtype = "fp16",
    kv_bytes: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    cache: PackedCache | None = None,
    quantize: Quantization | None = None,
) -> NativeStage:
    """Read and pack the blocks of `span`, and nothing else of the model.

    Args:
        checkpoint: open; not needed any more afterwards.
        span: blocks [start, end).
        threads: that `forward` uses, its caller's included; not looked at with `engine`.
        on_block: told (blocks loaded, blocks in all) after each.
        engine: to share with a head or another stage; by default one of its own.
        kv_dtype: how keys and values are kept; int8 takes half the memory and loses precision.
        kv_bytes: of KV cache in all; by default sessions get what they ask for.
        kept_bytes: of it, what ended sessions may leave behind for others that begin alike.
        cache: where packed blocks are kept on disk; by default they are packed into memory.
        quantize: what float matrices become; by default they stay as they are.

    Raises:
        ValueError: not a span of this model.
        KernelsUnavailable: no library.
        UnsupportedModel: a shape or tensor type that the kernels do not have; torch may.
        CorruptModel: see `Packer.pack`; or with `cache` a block is not what it was.
    """
    start, end = span
    if not 0 <= start < end <= checkpoint.config.n_blocks:
        raise ValueError(f"span {span} of a model of {checkpoint.config.n_blocks} blocks")
    engine = engine or Engine(load_library(), threads)
    packer = Packer(engine.library, quantize)
    shape = kernel_shape(checkpoint.config, KvType[kv_dtype.upper()])
    blocks = []
    for block_idx in range(start, end):
        parts = checkpoint.block_parts(block_idx)
        blocks.append(
            packer.pack(checkpoint, parts)
            if cache is None
            else cache.load(packer, checkpoint, f"block.{block_idx}", parts)
        )
        if on_block:
            on_block(len(blocks), end - start)
    return NativeStage(
        checkpoint.config, span, shape, blocks, engine, kv_bytes=kv_bytes, kept_bytes=kept_bytes
    )


@dataclass(slots=True)
class _Session:
    """A session's pages and, as the kernels take them, their addresses."""

    pages: SessionPages[Bytes]
    table: PageTable
    is_long: bool  # see `ModelConfig.is_long`


class NativeStage:
    """A `Stage` on the native library; made by `load_native_stage`."""

    def __init__(
        self,
        config: ModelConfig,
        span: tuple[int, int],
        shape: Shape,
        blocks: Sequence[PackedBlock],
        engine: Engine,
        *,
        kv_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        self.span = span
        self.dtype: EngineDtype = "fp32"
        self.hidden_size = config.hidden_size
        self.weight_bytes = sum(block.buffer.nbytes for block in blocks)
        self._config = config
        self._shape = shape
        self._blocks = blocks  # keeps alive what `_described` points to
        self._ropes = RopeTables(config, range(*span))
        # The library's tables, by index. A block without rope looks at none, but there must be one.
        kinds = self._ropes.kinds
        self._tables = tuple(kind for kind in kinds if kind != "none") or kinds[:1]
        described = [
            block.describe(engine.library, window=config.window(idx), rope=self._rope_of(idx))
            for idx, block in enumerate(blocks, span[0])
        ]
        self._described: ctypes.Array[Block] = (Block * len(blocks))(*described)
        self._engine = engine
        self._page_bytes = engine.library.page_bytes(shape, len(blocks))
        self.kv_bytes_per_token = self._page_bytes // PAGE_TOKENS
        self._pool: PagePool[Bytes] = PagePool(
            page_bytes=self._page_bytes,
            make=self._new_page,
            copy=_copy,
            limit_bytes=kv_bytes,
            kept_bytes=kept_bytes,
        )
        self._sessions: dict[str, _Session] = {}

    @property
    def memory_bytes(self) -> int:
        """Memory that pages of the KV cache take now, of open sessions and kept for others."""
        return self._pool.memory_bytes

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`."""
        if n_tokens < 1:
            raise ValueError(f"n_tokens = {n_tokens}")
        if n_tokens > self._config.context_length:
            raise CacheOverflow(
                session=session,
                needed_tokens=n_tokens,
                capacity_tokens=self._config.context_length,
            )
        self.close_session(session)  # before the new one is made, not after
        is_long = self._config.is_long(n_tokens)
        if is_long:  # its keys are rotated by other angles than a short session's
            prefix = [key + b"long" for key in prefix]
        pages = self._pool.open(n_tokens, prefix)
        self._sessions[session] = _Session(pages, self._addresses(pages), is_long)
        return pages.length

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        held = self._sessions.pop(session, None)
        if held is not None:
            self._pool.close(held.pages)

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """See `Stage.forward`."""
        result = self.forward_batch([Step(session, position, hidden)])[0]
        if isinstance(result, EngineError):
            raise result
        return result

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        """See `Stage.forward_batch`."""
        results: dict[int, StepResult] = {}
        waiting = list(enumerate(steps))
        while waiting:
            # Of each session the first; those behind it need its rows.
            first = {step.session: (i, step) for i, step in reversed(waiting)}
            self._forward_together(dict(first.values()), results)
            waiting = [(i, step) for i, step in waiting if i not in results]
        return [results[i] for i in range(len(steps))]

    def _forward_together(self, steps: dict[int, Step], results: dict[int, StepResult]) -> None:
        """Put the results of these steps, one for a session, into `results`."""
        ready: dict[int, tuple[Step, _Session]] = {}
        for i, step in steps.items():
            try:
                ready[i] = (step, self._prepare(step))
            except EngineError as error:
                results[i] = error
        for is_long in (False, True):
            group = {i: each for i, each in ready.items() if each[1].is_long == is_long}
            if group:
                self._run(group, results, is_long=is_long)

    def _run(
        self,
        ready: dict[int, tuple[Step, _Session]],
        results: dict[int, StepResult],
        *,
        is_long: bool,
    ) -> None:
        rows = [step.hidden for step, _ in ready.values()]
        out = (
            np.array(rows[0], dtype=np.float32, order="C")
            if len(rows) == 1
            else np.concatenate(rows)
        )
        runs = [(held.table, step.position, len(step.hidden)) for step, held in ready.values()]
        end = max(position + n_rows for _, position, n_rows in runs)
        tables = self._ropes.upto(end, is_long=is_long)
        ropes = [tables[kind] for kind in self._tables]
        self._engine.span_forward(self._shape, self._described, runs, ropes, out)
        at = 0
        for i, (step, held) in ready.items():
            results[i] = self._finish(step, held, out[at : at + len(step.hidden)])
            at += len(step.hidden)

    def _prepare(self, step: Step) -> _Session:
        """Check a step and make its positions writable."""
        check_hidden(step.hidden, self.dtype, self.hidden_size)
        held = self._sessions.get(step.session)
        if held is None:
            raise UnknownSession(step.session)
        pages, end = held.pages, step.position + len(step.hidden)
        if not 0 <= step.position <= pages.length:
            raise PositionGap(session=step.session, position=step.position, length=pages.length)
        self._pool.rewind(pages, step.position)
        if end > pages.capacity:
            raise CacheOverflow(
                session=step.session, needed_tokens=end, capacity_tokens=pages.capacity
            )
        if self._pool.prepare(pages, end):
            held.table = self._addresses(pages)
        return held

    def _finish(self, step: Step, held: _Session, out: HiddenStates) -> StepResult:
        if not np.isfinite(out).all():
            is_received = not bool(np.isfinite(step.hidden).all())
            return NonFiniteValues(
                session=step.session, position=step.position, is_received=is_received
            )
        if self._pool.advance(held.pages, step.position + len(out)):
            held.table = self._addresses(held.pages)
        return out

    def _rope_of(self, block_idx: int) -> int:
        kind = self._config.rope_kind(block_idx)
        return NO_ROPE if kind == "none" else self._tables.index(kind)

    def _addresses(self, pages: SessionPages[Bytes]) -> PageTable:
        return PageTable([page.memory for page in pages.table], self._page_bytes)

    def _new_page(self) -> Bytes:
        try:
            return page_memory(self._page_bytes)
        except OSError as error:
            raise CacheFull(needed_bytes=self._page_bytes, free_bytes=0) from error


_ACTIVATIONS = {"silu": Activation.SILU, "gelu_tanh": Activation.GELU_TANH}


def _copy(source: Bytes, target: Bytes) -> None:
    target[:] = source


def kernel_shape(config: ModelConfig, kv_type: KvType = KvType.FP16) -> Shape:
    """The kernels' view of a configuration.

    Raises:
        UnsupportedModel: widths that are not whole vectors.
    """
    if config.head_dim % 16:
        raise UnsupportedModel(f"head_dim = {config.head_dim}", ("multiples of 16",))
    for field in ("hidden_size", "intermediate_size"):
        if getattr(config, field) % 32:
            raise UnsupportedModel(f"{field} = {getattr(config, field)}", ("multiples of 32",))
    return Shape(
        config.hidden_size,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.intermediate_size,
        config.rope_dim,
        int(config.rope_interleaved),
        config.rms_norm_eps,
        kv_type,
        config.score_scale,
        _ACTIVATIONS[config.activation],
        config.n_experts,
        config.n_experts_used,
        int(config.normalizes_experts),
    )
