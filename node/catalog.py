"""The models whose files are on this machine.

Opening a model reads its header only; tokenizer, head and blocks are loaded when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from covey.partition.profile import ModelLayout
from covey.store.schema import BlobEntry, ModelManifest

from .engine.head import load_head
from .engine.stage import Head
from .engine.tensors import NUMPY_DTYPES, EngineDtype
from .errors import UnknownModel
from .model.checkpoint import Checkpoint, open_checkpoint
from .model.resolve import resolve_model, short_names
from .model.tokenizer import Tokenizer


class LocalModel:
    """One model on this disk. `name` is what people call it in this swarm."""

    def __init__(self, name: str, checkpoint: Checkpoint, dtype: EngineDtype) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.dtype: EngineDtype = dtype
        self.digest = checkpoint.digest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built at first use, about 0.2 s."""
        return self.checkpoint.tokenizer()

    @cached_property
    def head(self) -> Head:
        """Embedding and output head; read at first use. Call it on the worker."""
        return load_head(self.checkpoint, self.dtype)

    @cached_property
    def layout(self) -> ModelLayout:
        """What the planner needs to know of the model, as this engine holds it in memory."""
        config, itemsize = self.checkpoint.config, NUMPY_DTYPES[self.dtype].itemsize
        block_bytes = config.block_weights * itemsize
        embedding_bytes = config.vocab_size * config.hidden_size * itemsize
        return ModelLayout(
            digest=self.digest,
            n_blocks=config.n_blocks,
            hidden_size=config.hidden_size,
            block_bytes=(block_bytes,) * config.n_blocks,
            embedding_bytes=embedding_bytes,
            head_bytes=0 if config.tied_embeddings else embedding_bytes,
            kv_bytes_per_token_per_block=config.kv_bytes_per_token(1, itemsize),
            wire_bytes_per_token=config.hidden_size * itemsize,
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
    def open(cls, names: Sequence[str], dtype: EngineDtype) -> Catalog:
        """Resolve and open models; hashes each the first time (about 1 s per GB).

        Raises:
            ModelError: one cannot be found or read.
        """
        return cls([open_model(name, dtype) for name in names])

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


def open_model(name: str, dtype: EngineDtype) -> LocalModel:
    """Resolve and open one model; raises ModelError."""
    path = resolve_model(name)
    return LocalModel(_public_name(name, path), open_checkpoint(path), dtype)


def _public_name(name: str, path: Path) -> str:
    """What other members call the model: never a path of this machine."""
    if name in short_names():
        return name
    if Path(name).expanduser().exists():
        return path.stem if path.is_file() else path.resolve().name
    return name
