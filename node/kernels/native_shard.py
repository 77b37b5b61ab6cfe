"""What a member of a tensor-parallel group computes on the native kernels: the fast `Shard`.

It packs just its rows and columns of every matrix, and keeps the keys and values of its own heads.
Each half of a block is one call; what the calls of a step have in common is made ready in `begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from covey.node.engine.errors import EngineError
from covey.node.engine.group_steps import GroupSteps, SessionRows
from covey.node.engine.sessions import SessionLength, SessionLengths
from covey.node.engine.shard import Slice
from covey.node.engine.slices import (
    check_slice,
    cut_block,
    has_columns,
    has_heads,
    slice_config,
    slice_name,
    whole_slice,
)
from covey.node.engine.stage import Step
from covey.node.engine.tensors import EngineDtype, HiddenStates, Quantization
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.tensor_source import TensorSlice

from .block_source import BlockSource, describer, load_blocks
from .library import Engine, Floats, PageTable, SpanCall, load_library
from .native_stage import KEPT_BYTES, KvDtype, kernel_shape
from .packed import PackedBlock, Packer
from .packed_cache import PackedCache
from .packed_file import ColdBlock
from .ropes import SpanRopes
from .sessions import PagedSession, PagedSessions
from .structures import KvType, Parts, Shape
from .window import StreamFacts

Held: TypeAlias = PagedSession | SessionLength


def load_native_shard(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    cut: Slice,
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
) -> NativeShard:
    """Read and pack what `cut` has of the blocks of `span`, and nothing else of the model.

    With `cache`, blocks that it does not have are read whole once, to be held against their hash.
    The other arguments are as in `load_native_stage`.

    Raises:
        ValueError: not a span or a slice of this model, or it cuts blocks of quantised numbers.
        KernelsUnavailable, UnsupportedModel, CorruptModel, CannotStream: see `load_native_stage`.
    """
    start, end = span
    config = checkpoint.config
    if not 0 <= start < end <= config.n_blocks:
        raise ValueError(f"span {span} of a model of {config.n_blocks} blocks")
    check_slice(config, cut)
    engine = engine or Engine(load_library(), threads)
    packer = Packer(engine.library, quantize)
    shape = kernel_shape(slice_config(config, cut), KvType[kv_dtype.upper()])
    name = "" if cut == whole_slice(config) else slice_name(cut)  # the whole is a stage's too

    def parts_of(block_idx: int) -> dict[str, TensorSlice]:
        return cut_block(checkpoint.block_parts(block_idx), config, cut, packer.block_columns)

    blocks = load_blocks(
        packer,
        checkpoint,
        span,
        parts_of,
        on_block,
        cache=cache,
        part=name,
        streamed_blocks=streamed_blocks,
    )
    return NativeShard(
        config, span, cut, shape, blocks, engine, kv_bytes=kv_bytes, kept_bytes=kept_bytes
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that take the same tables of angles, ready to go through the blocks."""

    call: SpanCall
    hidden: Floats  # what the call works on
    places: npt.NDArray[np.intp] | None  # among all rows of the step; None if they are all


@dataclass(frozen=True, slots=True)
class _Pass:
    """A step on its way."""

    out: Floats  # [n_rows, hidden_size], partial sums
    attention: tuple[_Rows, ...]
    mlp: SpanCall  # works on `out`


class NativeShard:
    """A `Shard` on the native library; made by `load_native_shard`."""

    def __init__(
        self,
        config: ModelConfig,
        span: tuple[int, int],
        cut: Slice,
        shape: Shape,
        blocks: Sequence[PackedBlock | ColdBlock],
        engine: Engine,
        *,
        kv_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        self.span = span
        self.slice = cut
        self.dtype: EngineDtype = "fp32"
        self.hidden_size = config.hidden_size
        self.kv_bytes_per_token = 0
        self._shape = shape
        self._ropes = SpanRopes(config, span)
        self._blocks = BlockSource(blocks, describer(engine.library, config, span, self._ropes))
        self.weight_bytes = self._blocks.memory_bytes
        self._engine = engine
        self._paged: PagedSessions | None = None
        if has_heads(cut):
            self._paged = PagedSessions(
                config, engine.library, shape, len(blocks), kv_bytes=kv_bytes, kept_bytes=kept_bytes
            )
            self.kv_bytes_per_token = self._paged.bytes_per_token
        sessions: Any = self._paged or SessionLengths(config)
        self._steps: GroupSteps[Held] = GroupSteps(sessions, self.dtype, self.hidden_size)
        self._pass: _Pass | None = None

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
        return self._paged.memory_bytes if self._paged else 0

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Shard.open_session`."""
        return self._steps.open(session, n_tokens, prefix)

    def close_session(self, session: str) -> None:
        """See `Shard.close_session`."""
        self._steps.close(session)

    def begin(self, steps: Sequence[Step]) -> list[EngineError | None]:
        """See `Shard.begin`."""
        answers, rows = self._steps.begin(steps)
        self._pass = self._new_pass(rows) if rows else None
        return answers

    def attention(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """See `Shard.attention`."""
        place, step = self._place(block_idx, hidden)
        if not has_heads(self.slice):
            return None
        block = self._blocks.take(place)
        for rows in step.attention:
            rows.hidden[:] = hidden if rows.places is None else hidden[rows.places]
            rows.call.run(block, Parts.ATTENTION | Parts.PARTIAL, place)
            if rows.places is not None:
                step.out[rows.places] = rows.hidden
        return step.out

    def mlp(self, block_idx: int, hidden: HiddenStates) -> HiddenStates | None:
        """See `Shard.mlp`."""
        place, step = self._place(block_idx, hidden)
        if block_idx == self.span[1] - 1:
            self._steps.note(hidden)
        try:
            if not has_columns(self.slice):
                return None
            step.out[:] = hidden
            step.mlp.run(self._blocks.take(place), Parts.MLP | Parts.PARTIAL, place)
            return step.out
        finally:
            self._blocks.release()  # while others are waited for, the next block comes in

    def end(self, *, is_done: bool) -> None:
        """See `Shard.end`."""
        self._pass = None
        self._blocks.release()
        self._steps.end(is_done=is_done)

    def _place(self, block_idx: int, hidden: HiddenStates) -> tuple[int, _Pass]:
        if not self.span[0] <= block_idx < self.span[1]:
            raise ValueError(f"block {block_idx} of span {self.span}")
        if self._pass is None:
            raise ValueError("no step has begun")
        self._steps.check(hidden)
        return block_idx - self.span[0], self._pass

    def _new_pass(self, rows: Sequence[SessionRows[Held]]) -> _Pass:
        out = np.empty((sum(each.n_rows for each in rows), self.hidden_size), np.float32)
        if not has_heads(self.slice):
            return _Pass(out, (), self._call([(None, each) for each in rows], out))
        short, long = (
            [
                (each.held.table, each)
                for each in rows
                if isinstance(each.held, PagedSession) and each.held.is_long == is_long
            ]
            for is_long in (False, True)
        )
        if not (short and long):
            call = self._call(short or long, out, is_long=bool(long))
            return _Pass(out, (_Rows(call, out, None),), call)
        attention = []
        for is_long, some in enumerate((short, long)):
            places = np.concatenate(
                [np.arange(each.first, each.first + each.n_rows) for _, each in some]
            )
            hidden = np.empty((len(places), self.hidden_size), np.float32)
            attention.append(_Rows(self._call(some, hidden, is_long=bool(is_long)), hidden, places))
        return _Pass(out, tuple(attention), self._call([(None, each) for each in rows], out))

    def _call(
        self,
        rows: Sequence[tuple[PageTable | None, SessionRows[Held]]],
        hidden: Floats,
        *,
        is_long: bool = False,
    ) -> SpanCall:
        runs = [(table, each.start, each.n_rows) for table, each in rows]
        ropes = self._ropes.upto(max(each.end for _, each in rows), is_long=is_long)
        return SpanCall(
            self._engine, self._shape, runs, ropes, hidden, page_blocks=self.span[1] - self.span[0]
        )
