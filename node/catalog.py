"""The models whose files are on this machine.

Opening a model reads its header only; tokenizer, head and blocks are loaded when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from covey.partition.profile import ModelLayout
from covey.store.schema import BlobEntry, ModelManifest

from .engine.shard import Shard, Slice
from .engine.stage import Head, Stage
from .engine.tensors import HIDDEN_DTYPES, itemsize
from .engines import Engines, split_of_model, weight_sizes
from .errors import UnknownModel
from .model.checkpoint import Checkpoint, open_checkpoint
from .model.resolve import resolve_model, short_names
from .model.tokenizer import Tokenizer


class LocalModel:
    """One model on this disk. `name` is what people call it in this swarm.

    Raises:
        ConfigError: the engine that was asked for cannot run it.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, engines: Engines) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.engine = engines.kind_of(checkpoint)
        self._engines = engines
        self.digest = checkpoint.digest

    @property
    def threads(self) -> int:
        """Threads of its engine."""
        return self._engines.threads

    @property
    def speed(self) -> float:
        """Share of this machine's speed that its engine keeps to."""
        return self._engines.speed

    @cached_property
    def why_portable(self) -> str | None:
        """Why it runs on torch though nobody asked for that; None if it does not."""
        return self._engines.why_portable(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use, about 0.2 s."""
        return self.checkpoint.tokenizer()

    @cached_property
    def head(self) -> Head:
        """Embedding and output head; read at first use. Call it on the worker."""
        return self._engines.load_head(self.checkpoint, self.engine)

    def load_stage(
        self,
        span: tuple[int, int],
        *,
        on_block: Callable[[int, int], None] | None = None,
        verify: bool = False,
        kv_bytes: int | None = None,
        streamed_blocks: int = 0,
    ) -> Stage:
        """Blocks [start, end) on this model's engine; see `Engines.load_stage`."""
        return self._engines.load_stage(
            self.checkpoint,
            span,
            self.engine,
            on_block=on_block,
            verify=verify,
            kv_bytes=kv_bytes,
            streamed_blocks=streamed_blocks,
        )

    def load_shard(
        self,
        span: tuple[int, int],
        cut: Slice,
        *,
        on_block: Callable[[int, int], None] | None = None,
        verify: bool = False,
        kv_bytes: int | None = None,
        streamed_blocks: int = 0,
    ) -> Shard:
        """A member's part of blocks [start, end); see `Engines.load_shard`."""
        return self._engines.load_shard(
            self.checkpoint,
            span,
            cut,
            self.engine,
            on_block=on_block,
            verify=verify,
            kv_bytes=kv_bytes,
            streamed_blocks=streamed_blocks,
        )

    @cached_property
    def layout(self) -> ModelLayout:
        """What the planner needs to know of the model, as this engine holds it in memory."""
        config, sizes = self.checkpoint.config, weight_sizes(self.checkpoint, self.engine)
        split = split_of_model(self.checkpoint, self.engine)
        return ModelLayout(
            digest=self.digest,
            n_blocks=config.n_blocks,
            hidden_size=config.hidden_size,
            block_bytes=sizes.blocks,
            embedding_bytes=sizes.embedding,
            head_bytes=sizes.head,
            kv_bytes_per_token_per_block=sizes.kv_per_token_per_block,
            wire_bytes_per_token=config.hidden_size * itemsize(HIDDEN_DTYPES[self.engine]),
            n_kv_heads=split.n_kv_heads if split else 0,
            mlp_columns=split.mlp_columns if split else 0,
            mlp_quantum=split.mlp_quantum if split else 32,
            attention_share=sizes.attention_share,
        )

    def manifest(self) -> ModelManifest:
        """What the swarm is told about the model."""
        config = self.checkpoint.config
        return ModelManifest(
            name=self.name,
            digest=self.digest,
            architecture=config.architecture,
            n_blocks=config.n_blocks,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            blobs=tuple(
                BlobEntry(name=blob.name, nbytes=blob.nbytes, sha256=blob.sha256)
                for blob in self.checkpoint.blobs()
            ),
        )


class Catalog:
    """Every model that this node was given, by digest and by name."""

    def __init__(self, models: Sequence[LocalModel]) -> None:
        self._by_digest = {model.digest: model for model in models}

    @classmethod
    def open(cls, names: Sequence[str], engines: Engines) -> Catalog:
        """Resolve and open models; hashes each the first time (about 1 s per GB).

        Raises:
            ModelError: one cannot be found or read.
            ConfigError: the engine that was asked for cannot run one.
        """
        return cls([open_model(name, engines) for name in names])

    def __iter__(self) -> Iterator[LocalModel]:
        return iter(self._by_digest.values())

    def by_digest(self, digest: str) -> LocalModel | None:
        """The model with this content, if it is here."""
        return self._by_digest.get(digest)

    def by_name(self, name: str) -> LocalModel:
        """The model that a person calls `name`; a digest or its beginning (8 or more) works too.

        Raises:
            UnknownModel.
        """
        for model in self:
            if model.name == name or (len(name) >= 8 and model.digest.startswith(name)):
                return model
        raise UnknownModel(name, tuple(model.name for model in self))


def open_model(name: str, engines: Engines) -> LocalModel:
    """Resolve and open one model; raises ModelError or ConfigError."""
    path = resolve_model(name)
    return LocalModel(_public_name(name, path), open_checkpoint(path), engines)


def _public_name(name: str, path: Path) -> str:
    """What other members call the model: never a path of this machine."""
    if name in short_names():
        return name
    if Path(name).expanduser().exists():
        return path.stem if path.is_file() else path.resolve().name
    return name
