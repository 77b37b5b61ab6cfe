"""Which engine runs a model on this machine, and how its parts are loaded.

`native` computes on the file's own quantised weights (`node/kernels/`); `fp32` and `bf16` are the
torch reference. Torch is imported only where it runs: a node on the native engine never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import psutil

from .engine.stage import Head, Stage
from .engine.tensors import HIDDEN_DTYPES, EngineKind, itemsize
from .errors import ConfigError
from .kernels.errors import KernelsUnavailable
from .kernels.library import Engine as NativeEngine
from .kernels.library import load_library
from .kernels.native_head import head_parts, load_native_head
from .kernels.native_stage import KV_ITEMSIZE, kernel_shape, load_native_stage
from .kernels.packed import block_bytes
from .kernels.packed_cache import PackedCache
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
    head: int  # without the embedding, which may serve as the output matrix too
    kv_per_token_per_block: int


class Engines:
    """Loads stages and heads; one per process, so that the native ones share their threads.

    `choice` "auto" is native wherever the library is there and has kernels for the model.
    """

    def __init__(
        self,
        choice: EngineChoice = "auto",
        threads: int | None = None,
        cache: PackedCache | None = None,
    ) -> None:
        self.choice = choice
        self.threads = threads or default_threads()
        self._cache = cache or PackedCache()

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
        kv_bytes: int | None = None,
    ) -> Stage:
        """Read the blocks of `span`; see the loaders of each engine.

        With `verify` each block is hashed first: CorruptModel if it is not what it was. The
        native engine always does so when it packs one, and then keeps it on disk. `kv_bytes` is
        all that its KV cache may take, prefixes kept for later sessions included.
        """
        if kind == "native":
            return load_native_stage(
                checkpoint,
                span,
                engine=self._native,
                on_block=on_block,
                cache=self._cache,
                kv_bytes=kv_bytes,
            )
        self._set_torch_threads()
        from .engine.torch_stage import load_stage

        return load_stage(checkpoint, span, kind, on_block=on_block, verify=verify)

    def load_head(self, checkpoint: Checkpoint, kind: EngineKind) -> Head:
        """Read embedding, final norm and output matrix."""
        if kind == "native":
            return load_native_head(checkpoint, engine=self._native, cache=self._cache)
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
            block_bytes(library, checkpoint.block_parts(block_idx))
        for parts in head_parts(checkpoint).values():
            block_bytes(library, parts)
    except (KernelsUnavailable, UnsupportedModel) as error:
        return str(error)
    return None


def weight_sizes(checkpoint: Checkpoint, kind: EngineKind) -> WeightSizes:
    """What `kind` takes in memory; the same on every machine, for plans are judged by it."""
    config = checkpoint.config
    if kind == "native":
        library, ends = load_library(), head_parts(checkpoint)
        return WeightSizes(
            blocks=tuple(
                block_bytes(library, checkpoint.block_parts(block_idx))
                for block_idx in range(config.n_blocks)
            ),
            embedding=block_bytes(library, ends["embedding"]),
            head=block_bytes(library, ends["head"]),
            kv_per_token_per_block=config.kv_bytes_per_token(1, KV_ITEMSIZE),
        )
    element = itemsize(HIDDEN_DTYPES[kind])
    embedding = config.vocab_size * config.hidden_size * element
    return WeightSizes(
        blocks=(config.block_weights * element,) * config.n_blocks,
        embedding=embedding,
        head=0 if config.tied_embeddings else embedding,
        kv_per_token_per_block=config.kv_bytes_per_token(1, element),
    )
