"""Which engine runs a model on this machine, and how its parts are loaded.

`native` computes on the file's own quantised weights, or on float weights that it quantises when it
packs them (`node/kernels/`); `fp32` and `bf16` are the torch reference. Torch is imported only
where it runs: a node on the native engine never does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import psutil

from .engine.shard import Shard, Slice
from .engine.slices import Split, attention_parts, split_of, stored_columns
from .engine.stage import Head, Stage
from .engine.tensors import (
    HIDDEN_DTYPES,
    NATIVE_KINDS,
    EngineKind,
    Quantization,
    is_native,
    itemsize,
    quantized_as,
)
from .errors import ConfigError
from .kernels.errors import KernelsUnavailable
from .kernels.library import Engine as NativeEngine
from .kernels.library import load_library
from .kernels.native_head import head_parts, load_native_head
from .kernels.native_shard import load_native_shard
from .kernels.native_stage import KV_ITEMSIZE, kernel_shape, load_native_stage
from .kernels.packed import Packer
from .kernels.packed_cache import PackedCache
from .model.checkpoint import Checkpoint
from .model.errors import UnsupportedModel

EngineChoice = Literal["auto", "native", "fp32", "bf16"]
ENGINE_CHOICES: tuple[EngineChoice, ...] = get_args(EngineChoice)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


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
    attention_share: float  # of the blocks' bytes


class Engines:
    """Loads stages and heads; one per process, so that the native ones share their threads.

    `choice` "auto" is native wherever the library is there and has kernels for the model.
    `quantize` is what matrices in F32, F16 and BF16 become; models that are quantised already stay
    what they are. With a `speed` below 1 the node behaves like a machine of that share of this
    one's speed. A head that is larger than `head_bytes` reads its matrices from disk for each step,
    which takes some megabytes. All three are for the native engine only.
    """

    def __init__(
        self,
        choice: EngineChoice = "auto",
        threads: int | None = None,
        cache: PackedCache | None = None,
        *,
        quantize: Quantization | None = None,
        speed: float = 1.0,
        head_bytes: int | None = None,
    ) -> None:
        self.choice = choice
        self.threads = threads or default_threads()
        self.quantize = quantize
        self.speed = speed
        self.head_bytes = head_bytes
        self._cache = cache or PackedCache()

    def kind_of(self, checkpoint: Checkpoint) -> EngineKind:
        """The engine that runs a model here.

        Raises:
            ConfigError: "native", or what only it does, was asked for and cannot be had; the text
                says why.
        """
        check_native_only(self.choice, self.quantize, self.speed)
        if self.choice in ("fp32", "bf16"):
            return self.choice
        reason = why_not_native(checkpoint, self.quantize)
        if reason is None:
            packer = Packer(load_library(), self.quantize)
            blocks = map(checkpoint.block_parts, range(checkpoint.config.n_blocks))
            return NATIVE_KINDS[self.quantize if any(map(packer.changes, blocks)) else None]
        if self.choice == "native":
            raise ConfigError(f"engine: native cannot run {checkpoint.name}: {reason}")
        for field, is_asked in (("quantize", self.quantize), ("speed", self.speed != 1.0)):
            if is_asked:
                raise ConfigError(
                    f"{field}: needs the native engine, which cannot run "
                    f"{checkpoint.name}: {reason}"
                )
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
        streamed_blocks: int = 0,
    ) -> Stage:
        """Read the blocks of `span`; see the loaders of each engine.

        With `verify` each block is hashed first: CorruptModel if it is not what it was. The
        native engine always does so when it packs one, and then keeps it on disk. `kv_bytes` is
        all that its KV cache may take, prefixes kept for later sessions included. So many as
        `streamed_blocks` are read from disk for each step; the torch engine cannot do that, and
        keeps them in memory.
        """
        if is_native(kind):
            return load_native_stage(
                checkpoint,
                span,
                engine=self._native,
                on_block=on_block,
                cache=self._cache,
                kv_bytes=kv_bytes,
                quantize=quantized_as(kind),
                streamed_blocks=streamed_blocks,
            )
        self._set_torch_threads()
        from .engine.torch_stage import load_stage

        return load_stage(checkpoint, span, HIDDEN_DTYPES[kind], on_block=on_block, verify=verify)

    def load_shard(
        self,
        checkpoint: Checkpoint,
        span: tuple[int, int],
        cut: Slice,
        kind: EngineKind,
        *,
        on_block: Callable[[int, int], None] | None = None,
        verify: bool = False,
        kv_bytes: int | None = None,
        streamed_blocks: int = 0,
    ) -> Shard:
        """Read what a member of a group holds of the blocks of `span`; the rest as `load_stage`.

        Raises:
            ValueError: not a slice of this model, or it cuts blocks of quantised numbers.
        """
        if is_native(kind):
            return load_native_shard(
                checkpoint,
                span,
                cut,
                engine=self._native,
                on_block=on_block,
                cache=self._cache,
                kv_bytes=kv_bytes,
                quantize=quantized_as(kind),
                streamed_blocks=streamed_blocks,
            )
        self._set_torch_threads()
        from .engine.torch_shard import load_shard

        return load_shard(
            checkpoint, span, cut, HIDDEN_DTYPES[kind], on_block=on_block, verify=verify
        )

    def load_head(self, checkpoint: Checkpoint, kind: EngineKind) -> Head:
        """Read embedding, final norm and output matrix."""
        if is_native(kind):
            sizes = weight_sizes(checkpoint, kind)
            return load_native_head(
                checkpoint,
                engine=self._native,
                cache=self._cache,
                quantize=quantized_as(kind),
                streams=self.head_bytes is not None
                and sizes.embedding + sizes.head > self.head_bytes,
            )
        self._set_torch_threads()
        from .engine.head import load_head

        return load_head(checkpoint, HIDDEN_DTYPES[kind])

    def why_portable(self, checkpoint: Checkpoint) -> str | None:
        """Why a model runs on torch though nobody asked for that; None if it does not."""
        is_asked = self.choice in ("fp32", "bf16")
        return None if is_asked else why_not_native(checkpoint, self.quantize)

    def facts(self) -> dict[str, Any]:
        """What `covey status` says of the engine; of each model it says more."""
        kind, isa, reason = "torch", None, None
        if self.choice in ("auto", "native"):
            try:
                kind, isa = "native", load_library().isa
            except KernelsUnavailable as error:
                kind, reason = "torch", str(error)
        return {"kind": kind, "isa": isa, "threads": self.threads, "why_portable": reason}

    @cached_property
    def _native(self) -> NativeEngine:
        return NativeEngine(load_library(), self.threads, speed=self.speed)

    def _set_torch_threads(self) -> None:
        """For the whole process: torch's results are identical only for equal numbers."""
        import torch

        torch.set_num_threads(self.threads)


def check_native_only(choice: EngineChoice, quantize: Quantization | None, speed: float) -> None:
    """Raise ConfigError if torch is asked for what only the native engine does."""
    for field, is_asked in (("quantize", quantize), ("speed", speed != 1.0)):
        if is_asked and choice in ("fp32", "bf16"):
            raise ConfigError(f"{field}: only the native engine does that, not --engine {choice}")


def why_not_native(checkpoint: Checkpoint, quantize: Quantization | None = None) -> str | None:
    """Why the native engine cannot run a model here, in a phrase; None if it can."""
    try:
        packer = Packer(load_library(), quantize)
        kernel_shape(checkpoint.config)
        for block_idx in range(checkpoint.config.n_blocks):
            packer.block_bytes(checkpoint.block_parts(block_idx))
        for parts in head_parts(checkpoint).values():
            packer.block_bytes(parts)
    except (KernelsUnavailable, UnsupportedModel) as error:
        return str(error)
    return None


def weight_sizes(checkpoint: Checkpoint, kind: EngineKind) -> WeightSizes:
    """What `kind` takes in memory; the same on every machine, for plans are judged by it."""
    config = checkpoint.config
    if is_native(kind):
        packer, ends = Packer(load_library(), quantized_as(kind)), head_parts(checkpoint)
        parts = [checkpoint.block_parts(block_idx) for block_idx in range(config.n_blocks)]
        blocks = tuple(map(packer.block_bytes, parts))
        attention = sum(packer.block_bytes(attention_parts(each)) for each in parts)
        return WeightSizes(
            blocks=blocks,
            attention_share=attention / sum(blocks),
            embedding=packer.block_bytes(ends["embedding"]),
            head=packer.block_bytes(ends["head"]),
            kv_per_token_per_block=config.kv_bytes_per_token(1, KV_ITEMSIZE),
        )
    element = itemsize(HIDDEN_DTYPES[kind])
    embedding = config.vocab_size * config.hidden_size * element
    return WeightSizes(
        blocks=(config.block_weights * element,) * config.n_blocks,
        embedding=embedding,
        head=0 if config.tied_embeddings else embedding,
        kv_per_token_per_block=config.kv_bytes_per_token(1, element),
        attention_share=config.attention_weights / config.block_weights,
    )


def split_of_model(checkpoint: Checkpoint, kind: EngineKind) -> Split | None:
    """How a group on engine `kind` can share out the blocks of a model; None if it cannot.

    Partial sums are added in fp32, so that all members have the same hidden states to the bit:
    engines that round those to fewer take no part in groups.
    """
    if HIDDEN_DTYPES[kind] != "fp32":
        return None
    if is_native(kind):
        return split_of(checkpoint, Packer(load_library(), quantized_as(kind)).block_columns)
    return split_of(checkpoint, stored_columns)
