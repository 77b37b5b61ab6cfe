"""The packed blocks of a span, wherever they are: some stay in memory, some come through a window.

The streamed ones are spread evenly, so that the disk has the time of those between them to catch
up. Stages and shards take their blocks from here, described to the library, and give them back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.config import ModelConfig
from covey.node.model.tensor_source import TensorSlice

from .library import Library
from .packed import PackedBlock, Packer
from .packed_cache import PackedCache
from .packed_file import ColdBlock
from .ropes import SpanRopes
from .structures import Block
from .window import N_PLACES, Extent, StreamFacts, Window

Described: TypeAlias = ctypes.Array[Block]


class BlockSource:
    """A span's blocks as the library takes them; used by one thread at a time.

    Args:
        blocks: those that stay in memory, and those that are read for each pass.
        describe: tells the library of the block at a place in the span.
    """

    def __init__(
        self,
        blocks: Sequence[PackedBlock | ColdBlock],
        describe: Callable[[int, PackedBlock], Block],
    ) -> None:
        self._describe = describe
        self._cold = {at: block for at, block in enumerate(blocks) if isinstance(block, ColdBlock)}
        self._resident = [block for block in blocks if isinstance(block, PackedBlock)]  # kept alive
        self._runs = _runs(len(blocks), self._cold)
        self._described: dict[tuple[int, int], Described] = {}  # by place and address; 0: it stays
        self._whole_runs: dict[int, Described] = {}  # resident ones, by their first place
        for run in self._runs:
            described = [
                describe(at, block) for at in run if isinstance(block := blocks[at], PackedBlock)
            ]
            if described:
                self._whole_runs[run.start] = (Block * len(described))(*described)
        self._views: list[PackedBlock] = []  # what the described ones point into
        self._order = {at: idx for idx, at in enumerate(self._cold)}
        self._window: Window | None = None
        if self._cold:
            extents = [Extent(block.file, 0, block.n_bytes) for block in self._cold.values()]
            self._window = Window(extents)
        resident_bytes = sum(block.buffer.nbytes for block in self._resident)
        self.memory_bytes = resident_bytes + (self._window.memory_bytes if self._window else 0)

    def __iter__(self) -> Iterator[tuple[int, Described]]:
        """One pass: blocks in order, with the place of the first; neighbours in memory together.

        What was yielded last is given back when the next is asked for.

        Raises:
            WeightsUnreadable: the disk failed; the next pass tries again.
        """
        for run in self._runs:
            yield run.start, self._whole_runs.get(run.start) or self._take_streamed(run.start)
            self.release()

    def take(self, at: int) -> Described:
        """The block at a place alone, valid until another one is taken or this one released.

        Raises:
            WeightsUnreadable: see `Window.take`.
        """
        if at in self._cold:
            return self._take_streamed(at)
        self.release()
        if (at, 0) not in self._described:
            first = max(start for start in self._whole_runs if start <= at)
            self._described[at, 0] = (Block * 1)(self._whole_runs[first][at - first])
        return self._described[at, 0]

    def release(self) -> None:
        """Give back the block that was taken last: what comes next can be read in its place."""
        if self._window is not None:
            self._window.release()

    @property
    def facts(self) -> StreamFacts | None:
        """What was read for passes so far; None if nothing ever is."""
        return self._window.facts if self._window is not None else None

    def _take_streamed(self, at: int) -> Described:
        if self._window is None:
            raise ValueError(f"no block at {at}")
        data = self._window.take(self._order[at])
        key = (at, data.ctypes.data)
        if key not in self._described:
            view = self._cold[at].view(data)
            self._views.append(view)
            self._described[key] = (Block * 1)(self._describe(at, view))
        return self._described[key]


def describer(
    library: Library, config: ModelConfig, span: tuple[int, int], ropes: SpanRopes
) -> Callable[[int, PackedBlock], Block]:
    """What `BlockSource` tells a library of the blocks of this span."""

    def describe(at: int, block: PackedBlock) -> Block:
        idx = span[0] + at
        return block.describe(library, window=config.window(idx), rope=ropes.index_of(idx))

    return describe


def load_blocks(
    packer: Packer,
    checkpoint: Checkpoint,
    span: tuple[int, int],
    parts_of: Callable[[int], Mapping[str, TensorSlice]],
    on_block: Callable[[int, int], None] | None = None,
    *,
    cache: PackedCache | None,
    part: str = "",
    streamed_blocks: int = 0,
) -> list[PackedBlock | ColdBlock]:
    """The blocks of a span, packed; some of them left on disk.

    Args:
        packer: that packs them.
        checkpoint: whose they are.
        span: blocks [start, end).
        parts_of: what is needed of a block.
        on_block: told (blocks loaded, blocks in all) after each.
        cache: where packed blocks are kept; None: in memory.
        part: what the parts are called in the cache, if they are not whole blocks.
        streamed_blocks: how many are left on disk; needs the cache.

    Raises:
        ValueError: not so many blocks to stream, or no cache to stream them from.
        UnsupportedModel, CorruptModel: see `Packer.pack`.
        CannotStream: see `PackedCache.open`.
    """
    n_blocks = span[1] - span[0]
    streamed = places_to_stream(n_blocks, streamed_blocks)
    if streamed and cache is None:
        raise ValueError("blocks are streamed from a cache, and there is none")
    blocks: list[PackedBlock | ColdBlock] = []
    for at, block_idx in enumerate(range(*span)):
        parts, blob = parts_of(block_idx), f"block.{block_idx}"
        if cache is None:
            blocks.append(packer.pack(checkpoint, parts))
        elif at in streamed:
            blocks.append(cache.open(packer, checkpoint, blob, parts, part))
        else:
            blocks.append(cache.load(packer, checkpoint, blob, parts, part))
        if on_block:
            on_block(len(blocks), n_blocks)
    return blocks


def places_to_stream(n_blocks: int, n_streamed: int) -> frozenset[int]:
    """Which blocks of a span to stream if so many are: spread evenly.

    With the engine slower than the disk, the disk then has as long for each as it can have; with
    the disk slower, it always has something to read, wherever they are.
    """
    if not 0 <= n_streamed <= n_blocks:
        raise ValueError(f"{n_streamed} of {n_blocks} blocks to stream")
    return frozenset((2 * i + 1) * n_blocks // (2 * n_streamed) for i in range(n_streamed))


def fewest_streamed(block_bytes: Sequence[int], memory_bytes: int) -> int | None:
    """How many blocks of a span must be streamed for it to fit; None if even all are too many."""
    for n_streamed in range(len(block_bytes) + 1):
        if span_bytes(block_bytes, n_streamed) <= memory_bytes:
            return n_streamed
    return None


def span_bytes(block_bytes: Sequence[int], n_streamed: int) -> int:
    """Memory that a span's weights take with so many blocks streamed, the window's included."""
    streamed = places_to_stream(len(block_bytes), n_streamed)
    resident = sum(size for at, size in enumerate(block_bytes) if at not in streamed)
    largest = max((block_bytes[at] for at in streamed), default=0)
    return resident + min(N_PLACES, n_streamed) * largest


def _runs(n_blocks: int, cold: Collection[int]) -> tuple[range, ...]:
    """The blocks in order, in pieces that are in memory together: a streamed one is alone."""
    runs: list[range] = []
    for at in range(n_blocks):
        if runs and at not in cold and runs[-1].start not in cold:
            runs[-1] = range(runs[-1].start, at + 1)
        else:
            runs.append(range(at, at + 1))
    return tuple(runs)
