"""A span of Llama-type blocks on the native kernels: the fast `Stage`.

The file's own quantised weights, activations as bytes, an fp16 KV cache. Unlike the torch stage's,
its results do not depend on threads, on the chunking of the prompt or on the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from covey.node.engine.errors import CacheOverflow, NonFiniteValues, PositionGap, UnknownSession
from covey.node.engine.rope import RopeTable
from covey.node.engine.stage import Stage
from covey.node.engine.tensors import EngineDtype, HiddenStates, check_hidden
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.errors import UnsupportedModel

from .library import Block, Cache, Engine, Shape, cache_arrays, load_library
from .packed import PackedBlock, pack_block

KV_ITEMSIZE = 2  # fp16


def load_native_stage(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    threads: int = 1,
    on_block: Callable[[int, int], None] | None = None,
    *,
    engine: Engine | None = None,
    verify: bool = False,
) -> Stage:
    """Read and pack the blocks of `span`, and nothing else of the model.

    Args:
        checkpoint: open; not needed any more afterwards.
        span: blocks [start, end).
        threads: that `forward` uses, its caller's included; not looked at with `engine`.
        on_block: told (blocks loaded, blocks in all) after each.
        engine: to share with a head or another stage; by default one of its own.
        verify: hash each block first, against `checkpoint.blobs()`.

    Raises:
        ValueError: not a span of this model.
        KernelsUnavailable: no library.
        UnsupportedModel: a shape or tensor type that the kernels do not have; torch may.
        CorruptModel: a weight's scale is NaN or infinite, or with `verify` a block is not what
            `checkpoint.blobs` says.
    """
    start, end = span
    if not 0 <= start < end <= checkpoint.config.n_blocks:
        raise ValueError(f"span {span} of a model of {checkpoint.config.n_blocks} blocks")
    engine = engine or Engine(load_library(), threads)
    shape = kernel_shape(checkpoint.config)
    blocks = []
    for block_idx in range(start, end):
        if verify:
            checkpoint.verify_block(block_idx)
        blocks.append(pack_block(engine.library, checkpoint, block_idx))
        if on_block:
            on_block(len(blocks), end - start)
    return NativeStage(checkpoint.config, span, shape, blocks, engine)


@dataclass(slots=True)
class _Session:
    """KV cache of which the first `length` positions are filled; the arrays own its memory."""

    cache: Cache
    arrays: tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]
    capacity: int  # what was asked for; the cache has room for whole tiles
    length: int = 0


class NativeStage:
    """A `Stage` on the native library; made by `load_native_stage`."""

    def __init__(
        self,
        config: ModelConfig,
        span: tuple[int, int],
        shape: Shape,
        blocks: Sequence[PackedBlock],
        engine: Engine,
    ) -> None:
        self.span = span
        self.dtype: EngineDtype = "fp32"
        self.hidden_size = config.hidden_size
        self.weight_bytes = sum(block.buffer.nbytes for block in blocks)
        self.kv_bytes_per_token = config.kv_bytes_per_token(len(blocks), KV_ITEMSIZE)
        self._config = config
        self._shape = shape
        self._blocks = blocks  # keeps alive what `_described` points to
        described = [block.describe(engine.library) for block in blocks]
        self._described: ctypes.Array[Block] = (Block * len(blocks))(*described)
        self._engine = engine
        self._rope = RopeTable(config)
        self._sessions: dict[str, _Session] = {}

    def open_session(self, session: str, n_tokens: int) -> None:
        """See `Stage.open_session`."""
        if n_tokens < 1:
            raise ValueError(f"n_tokens = {n_tokens}")
        config = self._config
        if n_tokens > config.context_length:
            raise CacheOverflow(
                session=session, needed_tokens=n_tokens, capacity_tokens=config.context_length
            )
        self._sessions.pop(session, None)  # before the new one is made, not after
        cache, *arrays = cache_arrays(
            len(self._blocks), config.n_kv_heads, config.head_dim, n_tokens
        )
        self._sessions[session] = _Session(cache, (arrays[0], arrays[1]), n_tokens)

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`."""
        self._sessions.pop(session, None)

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """See `Stage.forward`."""
        check_hidden(hidden, self.dtype, self.hidden_size)
        held = self._rewind(session, position)
        end = position + len(hidden)
        if end > held.capacity:
            raise CacheOverflow(session=session, needed_tokens=end, capacity_tokens=held.capacity)
        cosines, sines = (table[position:end] for table in self._rope.upto(end))
        out = np.array(hidden, dtype=np.float32, order="C")
        self._engine.span_forward(
            self._shape, self._described, held.cache, (cosines, sines), position, out
        )
        if not np.isfinite(out).all():
            is_received = not bool(np.isfinite(hidden).all())
            raise NonFiniteValues(session=session, position=position, is_received=is_received)
        held.length = end
        return out

    def _rewind(self, session: str, position: int) -> _Session:
        held = self._sessions.get(session)
        if held is None:
            raise UnknownSession(session)
        if not 0 <= position <= held.length:
            raise PositionGap(session=session, position=position, length=held.length)
        held.length = position
        return held


def kernel_shape(config: ModelConfig) -> Shape:
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
    )
