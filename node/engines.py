"""Which engine runs a model on this machine, and how its parts are loaded.

`native` computes on the file's own quantised weights (`node/kernels/`); `fp32` and `bf16` are the
torch reference. Torch is imported only where it runs: a node on the native engine never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import psutil

from .engine.stage import Head, Stage
from .engine.tensors import HIDDEN_DTYPES, EngineKind, itemsize
from .errors import ConfigError
from .kernels.errors import KernelsUnavailable
from .kernels.library import Engine as NativeEngine
from .kernels.library import load_library
from .kernels.native_head import load_native_head
from .kernels.native_stage import KV_ITEMSIZE, kernel_shape, load_native_stage
from .kernels.packed import packed_block_bytes, packed_size
from .model.checkpoint import Checkpoint
from .model.errors import UnsupportedModel

EngineChoice = Literal["auto", "native", "fp32", "bf16"]
ENGINE_CHOICES: tuple[EngineChoice, ...] = get_args(EngineChoice)


def default_threads() -> int:
    """Every core, but for one that the event loop gets on machines with more than two."""
    n_cores = psutil.cpu_count(logical=False) or 1
    return n_cores - 1 if n_cores > 2 else n_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSizes:
    """Bytes that one engine takes for the parts of a model."""

    blocks: tuple[int, ...]
    embedding: int
    head: int  # 0 if the embedding serves as the output matrix too
    kv_per_token_per_block: int


class Engines:
    """Loads stages and heads; one per process, so that the native ones share their threads.

    `choice` "auto" is native wherever the library is there and has kernels for the model.
    """

    def __init__(self, choice: EngineChoice = "auto", threads: int | None = None) -> None:
        self.choice = choice
        self.threads = threads or default_threads()

    def kind_of(self, checkpoint: Checkpoint) -> EngineKind:
        """The engine that runs a model here.

        Raises:
            ConfigError: "native" was asked for and cannot be had; the text says why.
        """
        if self.choice in ("fp32", "bf16"):
            return self.choice
        reason = why_not_native(checkpoint)
        if reason is None:
            return "native"
        if self.choice == "native":
            raise ConfigError(f"engine: native cannot run {checkpoint.name}: {reason}")
        return "fp32"

    def load_stage(
        self,
        checkpoint: Checkpoint,
        span: tuple[int, int],
        kind: EngineKind,
        *,
        on_block: Callable[[int, int], None] | None = None,
        verify: bool = False,
    ) -> Stage:
        """Read the blocks of `span`; see the loaders of each engine.

        With `verify` each block is hashed first: CorruptModel if it is not what it was.
        """
        if kind == "native":
            return load_native_stage(
                checkpoint, span, engine=self._native, on_block=on_block, verify=verify
            )
        self._set_torch_threads()
        from .engine.torch_stage import load_stage

        return load_stage(checkpoint, span, kind, on_block=on_block, verify=verify)

    def load_head(self, checkpoint: Checkpoint, kind: EngineKind) -> Head:
        """Read embedding, final norm and output matrix."""
        if kind == "native":
            return load_native_head(checkpoint, engine=self._native)
        self._set_torch_threads()
        from .engine.head import load_head

        return load_head(checkpoint, kind)

    def facts(self) -> dict[str, Any]:
        """What `covey status` says of the engine."""
        kind, isa, reason = "torch", None, None
        if self.choice in ("auto", "native"):
            try:
                kind, isa = "native", load_library().isa
            except KernelsUnavailable as error:
                kind, reason = "torch", str(error)
        return {"kind": kind, "isa": isa, "threads": self.threads, "why_portable": reason}

    @cached_property
    def _native(self) -> NativeEngine:
        return NativeEngine(load_library(), self.threads)

    def _set_torch_threads(self) -> None:
        """For the whole process: torch's results are identical only for equal numbers."""
        import torch

        torch.set_num_threads(self.threads)


def why_not_native(checkpoint: Checkpoint) -> str | None:
    """Why the native engine cannot run a model here, in a phrase; None if it can."""
    try:
        library = load_library()
        kernel_shape(checkpoint.config)
        for block_idx in range(checkpoint.config.n_blocks):
            packed_block_bytes(library, checkpoint, block_idx)
        for name in {checkpoint.names.embedding, _output_name(checkpoint)}:
            packed_size(library, checkpoint.source.tensors[name])
    except (KernelsUnavailable, UnsupportedModel) as error:
        return str(error)
    return None


def weight_sizes(checkpoint: Checkpoint, kind: EngineKind) -> WeightSizes:
    """What `kind` takes in memory; the same on every machine, for plans are judged by it."""
    config, tensors = checkpoint.config, checkpoint.source.tensors
    ends = [tensors[checkpoint.names.embedding]]
    if not config.tied_embeddings:
        ends.append(tensors[checkpoint.names.head])
    blocks = range(config.n_blocks)
    if kind == "native":
        library = load_library()
        sizes = tuple(packed_block_bytes(library, checkpoint, block_idx) for block_idx in blocks)
        end_sizes = [packed_size(library, info) for info in ends]
        kv_itemsize = KV_ITEMSIZE
    else:
        kv_itemsize = itemsize(HIDDEN_DTYPES[kind])
        sizes = (kv_itemsize * config.block_weights,) * config.n_blocks
        end_sizes = [kv_itemsize * prod(info.shape) for info in ends]
    return WeightSizes(
        blocks=sizes,
        embedding=end_sizes[0],
        head=sum(end_sizes[1:]),
        kv_per_token_per_block=config.kv_bytes_per_token(1, kv_itemsize),
    )


def _output_name(checkpoint: Checkpoint) -> str:
    names = checkpoint.names
    return names.embedding if checkpoint.config.tied_embeddings else names.head
