"""A span of decoder blocks on the native kernels: the fast `Stage`.

The file's own quantised weights, activations as bytes, a paged KV cache that sessions with the same
beginning share. Unlike the torch stage's, its results do not depend on threads, on the chunking of
the prompt, on what else is in a batch, on shared pages or on the instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from covey.node.engine.errors import EngineError, NonFiniteValues
from covey.node.engine.stage import Step, StepResult
from covey.node.engine.tensors import EngineDtype, HiddenStates, Quantization, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.errors import UnsupportedModel

from .block_source import BlockSource, describer, load_blocks
from .errors import WeightsUnreadable
from .library import Engine, SpanCall, load_library
from .packed import PackedBlock, Packer
from .packed_cache import PackedCache
from .packed_file import ColdBlock
from .ropes import SpanRopes
from .sessions import PagedSession, PagedSessions
from .structures import Activation, KvType, Parts, Shape
from .window import StreamFacts

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
    streamed_blocks: int = 0,
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
        streamed_blocks: how many blocks are read from disk for each step, see `fewest_streamed`;
            for this there must be a cache.

    Raises:
        ValueError: not a span of this model, or not so many blocks to stream.
        KernelsUnavailable: no library.
        UnsupportedModel: a shape or tensor type that the kernels do not have; torch may.
        CorruptModel: see `Packer.pack`; or with `cache` a block is not what it was.
        CannotStream: the disk has no room for packed blocks.
    """
    start, end = span
    if not 0 <= start < end <= checkpoint.config.n_blocks:
        raise ValueError(f"span {span} of a model of {checkpoint.config.n_blocks} blocks")
    engine = engine or Engine(load_library(), threads)
    packer = Packer(engine.library, quantize)
    shape = kernel_shape(checkpoint.config, KvType[kv_dtype.upper()])
    blocks = load_blocks(
        packer,
        checkpoint,
        span,
        checkpoint.block_parts,
        on_block,
        cache=cache,
        streamed_blocks=streamed_blocks,
    )
    return NativeStage(
        checkpoint.config, span, shape, blocks, engine, kv_bytes=kv_bytes, kept_bytes=kept_bytes
    )


class NativeStage:
    """A `Stage` on the native library; made by `load_native_stage`."""

    def __init__(
        self,
        config: ModelConfig,
        span: tuple[int, int],
        shape: Shape,
        blocks: Sequence[PackedBlock | ColdBlock],
        engine: Engine,
        *,
        kv_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        self.span = span
        self.dtype: EngineDtype = "fp32"
        self.hidden_size = config.hidden_size
        self._shape = shape
        self._ropes = SpanRopes(config, span)
        self._blocks = BlockSource(blocks, describer(engine.library, config, span, self._ropes))
        self.weight_bytes = self._blocks.memory_bytes
        self._engine = engine
        self._sessions = PagedSessions(
            config,
            engine.library,
            shape,
            span[1] - span[0],
            kv_bytes=kv_bytes,
            kept_bytes=kept_bytes,
        )
        self.kv_bytes_per_token = self._sessions.bytes_per_token

    @property
    def streaming(self) -> StreamFacts | None:
        """What was read from disk for steps, and waited for; None if all blocks are in memory."""
        return self._blocks.facts

    @property
    def stall_s(self) -> float:
        """Seconds that steps have waited for the disk, in all."""
        return facts.stall_s if (facts := self.streaming) else 0.0

    @property
    def memory_bytes(self) -> int:
        """Memory that pages of the KV cache take now, of open sessions and kept for others."""
        return self._sessions.memory_bytes

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`."""
        return self._sessions.open(session, n_tokens, prefix)

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        self._sessions.close(session)

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
        ready: dict[int, tuple[Step, PagedSession]] = {}
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
        ready: dict[int, tuple[Step, PagedSession]],
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
        ropes = self._ropes.upto(end, is_long=is_long)
        n_blocks = self.span[1] - self.span[0]
        call = SpanCall(self._engine, self._shape, runs, ropes, out, page_blocks=n_blocks)
        try:
            for first, blocks in self._blocks:
                call.run(blocks, Parts.BLOCK, first)
        except WeightsUnreadable as error:
            results.update(dict.fromkeys(ready, error))
            return
        at = 0
        for i, (step, held) in ready.items():
            results[i] = self._finish(step, held, out[at : at + len(step.hidden)])
            at += len(step.hidden)

    def _prepare(self, step: Step) -> PagedSession:
        """Check a step and make its positions writable."""
        check_hidden(step.hidden, self.dtype, self.hidden_size)
        return self._sessions.prepare(step.session, step.position, len(step.hidden))

    def _finish(self, step: Step, held: PagedSession, out: HiddenStates) -> StepResult:
        if not np.isfinite(out).all():
            is_received = not bool(np.isfinite(step.hidden).all())
            return NonFiniteValues(
                session=step.session, position=step.position, is_received=is_received
            )
        self._sessions.advance(held, step.position + len(out))
        return out


_ACTIVATIONS = {"silu": Activation.SILU, "gelu_tanh": Activation.GELU_TANH}


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
