"""`Checkpoint`: one model on disk, read block by block.

It hands out one block's weights by byte range, so whoever serves a span touches only that span;
it computes nothing and keeps no weights. A model's identity is its `digest`: SHA-256 over the
configuration and the blob list, equal on every machine that has the same file.

A blob is a self-contained part of the model (a block, the embedding, the head, the tokenizer):
a line of JSON that lists name, type and shape of its tensors, then their raw bytes in that order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .blob_cache import Blob, BlobCache
from .config import ModelConfig
from .errors import CorruptModel, ModelNotFound, UnsupportedModel
from .gguf import GgufFile
from .gguf_config import gguf_config
from .hugging_face_config import hugging_face_config
from .layouts import (
    TensorNames,
    block_parts,
    check,
    expert_field,
    gguf_names,
    hugging_face_names,
)
from .safetensors import open_safetensors, read_json
from .tensor_source import FloatArray, TensorSlice, TensorSource, slice_to_float32, to_float32
from .tokenizer import Tokenizer
from .tokenizer_spec import build_tokenizer, folder_spec, gguf_spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWeights:
    """The weights of one decoder block, fp32; matrices are [out, in] as `F.linear` takes them.

    With X experts, gate, up and down have one more dimension in front.
    """

    attn_norm: Tensor  # [D]
    q: Tensor  # [H*E, D]
    k: Tensor  # [K*E, D]
    v: Tensor  # [K*E, D]
    o: Tensor  # [D, H*E]
    ffn_norm: Tensor  # [D]
    gate: Tensor  # [intermediate, D] or [X, intermediate, D]
    up: Tensor  # like gate
    down: Tensor  # [D, intermediate] or [X, D, intermediate]
    # None where the model has none:
    q_bias: Tensor | None = None  # [H*E]
    k_bias: Tensor | None = None  # [K*E]
    v_bias: Tensor | None = None  # [K*E]
    q_norm: Tensor | None = None  # [E]
    k_norm: Tensor | None = None  # [E]
    post_attn_norm: Tensor | None = None  # [D]
    post_ffn_norm: Tensor | None = None  # [D]
    router: Tensor | None = None  # [X, D]


class Checkpoint:
    """An open model; use as a context manager or call `close`. Made by `open_checkpoint`."""

    def __init__(
        self,
        *,
        name: str,
        config: ModelConfig,
        source: TensorSource,
        names: TensorNames,
        tokenizer_spec: Mapping[str, Any],
        cache: BlobCache,
    ) -> None:
        check(source, names, config)
        self.name = name
        self.config = config
        self.source = source
        self.names = names
        self._tokenizer_spec = tokenizer_spec
        self._cache = cache

    @property
    def path(self) -> Path:
        """The file, or the index of a sharded folder."""
        return self.source.path

    def block(self, block_idx: int) -> BlockWeights:
        """Read and decode one block; the caller owns the tensors.

        Raises:
            IndexError: no such block.
        """
        import torch

        parts = self.block_parts(block_idx)
        read: dict[str, Tensor] = {}
        for name in ("gate", "up", "down") if self.config.n_experts else ():
            experts = [
                parts.pop(expert_field(name, expert)) for expert in range(self.config.n_experts)
            ]
            read[name] = torch.stack([self._slice(expert) for expert in experts])
        return BlockWeights(**read, **{name: self._slice(part) for name, part in parts.items()})

    def block_parts(self, block_idx: int) -> dict[str, TensorSlice]:
        """Field of `BlockWeights` -> where it lies, for engines that pack raw bytes.

        A field is there if the model has it. Matrices of experts are fields of their own:
        "gate.0", "up.0", "down.0" and so on (see `expert_field`). `raw` gives a slice's bytes;
        its `info` has type, [rows, columns] and offset as if it were a tensor by itself.

        Raises:
            IndexError: no such block.
        """
        if not 0 <= block_idx < self.config.n_blocks:
            raise IndexError(f"block {block_idx} of {self.config.n_blocks}")
        parts = block_parts(self.names, self.config, block_idx)
        return {name: part.resolve(self.source) for name, part in parts.items()}

    def raw(self, part: TensorSlice) -> memoryview:
        """The bytes of one slice, read-only and not copied."""
        return part.raw(self.source)

    def read(self, part: TensorSlice) -> FloatArray:
        """One slice as float32, `part.offset` added: norms and biases, for any engine."""
        return slice_to_float32(part, self.source)

    def embedding(self) -> Tensor:
        """Token embeddings [V, D], fp32."""
        return self._tensor(self.names.embedding)

    def output_norm(self) -> Tensor:
        """Weight of the final RMSNorm [D], fp32."""
        return self._slice(self.output_norm_part())

    def output_norm_part(self) -> TensorSlice:
        """Where the final RMSNorm's weight lies; `read` it."""
        info = self.source.tensors[self.names.output_norm]
        return TensorSlice.of(info, 0, info.shape[0], offset=self.names.norm_offset)

    def head(self) -> Tensor | None:
        """Output matrix [V, D], fp32; None if it is tied to the embedding."""
        return None if self.config.tied_embeddings else self._tensor(self.names.head)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; built anew by each call, about 0.2 s."""
        return build_tokenizer(self.path, self._tokenizer_spec)

    def blobs(self) -> tuple[Blob, ...]:
        """Every blob: "block.0".., "embedding", "head", "tokenizer".

        Hashes the whole model once (about a second per gigabyte) and remembers the result on disk
        for as long as the files keep size and time of change.
        """
        return self._blobs

    @cached_property
    def _blobs(self) -> tuple[Blob, ...]:
        names = self._blob_names()
        known = self._cache.load(names)
        if known is None:
            known = tuple(self._hash(name) for name in names)
            self._cache.save(known)
        return known

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of configuration and blob list: the model's identity in the swarm."""
        blobs = [[blob.name, blob.nbytes, blob.sha256] for blob in self.blobs()]
        identity = {"config": self.config.canonical(), "blobs": blobs}
        return hashlib.sha256(_canonical_json(identity)).hexdigest()

    def blob_parts(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of one blob in order, as views of the file where possible.

        Raises:
            KeyError: no blob of that name.
        """
        if name == "tokenizer":
            yield _canonical_json(self._tokenizer_spec)
            return
        tensors = [self.source.tensors[tensor] for tensor in self._blob_tensors(name)]
        listed = [[info.name, info.type, list(info.shape)] for info in tensors]
        yield _canonical_json({"blob": name, "tensors": listed}) + b"\n"
        for info in tensors:
            yield self.source.raw(info.name)

    def verify_blob(self, name: str, sha256: str | None = None) -> None:
        """Hash a blob's bytes as they are on disk now.

        Args:
            name: one of `blobs`.
            sha256: what a manifest says it is; by default what `blobs` says.

        Raises:
            KeyError: no blob of that name.
            CorruptModel: the bytes are not those.
        """
        actual = self._hash(name).sha256
        expected = sha256 or next(blob.sha256 for blob in self.blobs() if blob.name == name)
        if actual != expected:
            raise CorruptModel(self.path, name, f"expected SHA-256 {expected}")

    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""
        self.source.close()

    def __enter__(self) -> Self:
        """Nothing to do: the file is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _tensor(self, name: str) -> Tensor:
        import torch  # here, so that reading a configuration does not load torch

        return torch.from_numpy(to_float32(self.source.tensors[name], self.source.raw(name)))

    def _slice(self, part: TensorSlice) -> Tensor:
        import torch

        return torch.from_numpy(self.read(part))

    def _blob_names(self) -> tuple[str, ...]:
        blocks = (f"block.{block_idx}" for block_idx in range(self.config.n_blocks))
        return (*blocks, "embedding", "head", "tokenizer")

    def _blob_tensors(self, name: str) -> Sequence[str]:
        if name == "embedding":
            return [self.names.embedding]
        if name == "head":
            tied = self.config.tied_embeddings
            return [self.names.output_norm, *([] if tied else [self.names.head])]
        kind, _, index = name.partition(".")
        if kind != "block" or not index.isdecimal():
            raise KeyError(name)
        # A tensor that several fields share is there once.
        return list(dict.fromkeys(part.tensor for part in self.block_parts(int(index)).values()))

    def _hash(self, name: str) -> Blob:
        sha256, nbytes = hashlib.sha256(), 0
        for part in self.blob_parts(name):
            sha256.update(part)
            nbytes += len(part)
        return Blob(name, nbytes, sha256.hexdigest())


def open_checkpoint(path: Path, *, cache_dir: Path | None = None) -> Checkpoint:
    """Open a GGUF file, a `.safetensors` file with config.json beside it, or such a folder.

    Args:
        path: the file or folder.
        cache_dir: where blob hashes are remembered; by default the user's cache folder.

    Raises:
        ModelNotFound: nothing there, or nothing that looks like a model.
        CorruptModel, UnsupportedModel, ModelError: see those.
    """
    try:
        if path.is_file() and path.suffix == ".gguf":
            return _open_gguf(path, cache_dir)
        if path.is_dir() or path.suffix == ".safetensors":
            return _open_hugging_face(path, cache_dir)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ModelNotFound(f"{error.filename or path}: {reason}; is the path right?") from error
    if path.exists():
        raise UnsupportedModel(f"file {path.name!r}", ("*.gguf", "*.safetensors", "a folder"))
    raise ModelNotFound(f"no model at {path}; give a file, a folder or a name of `covey models`")


def _open_gguf(path: Path, cache_dir: Path | None) -> Checkpoint:
    file = GgufFile(path)
    try:
        name = file.metadata.get("general.name")
        config = gguf_config(file)
        return Checkpoint(
            name=name if isinstance(name, str) and name else path.stem,
            config=config,
            source=file,
            names=gguf_names(config),
            tokenizer_spec=gguf_spec(file),
            cache=BlobCache.beside([path], cache_dir),
        )
    except BaseException:
        file.close()
        raise


def _open_hugging_face(path: Path, cache_dir: Path | None) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelNotFound(f"no config.json in {folder}; a safetensors model needs it")
    values = read_json(config_path)
    source = open_safetensors(path)
    try:
        config = hugging_face_config(config_path, values, source)
        return Checkpoint(
            name=folder.resolve().name,
            config=config,
            source=source,
            names=hugging_face_names(config),
            tokenizer_spec=folder_spec(folder) if (folder / "tokenizer.json").is_file() else {},
            cache=BlobCache.beside([*source.files, *sorted(folder.glob("*.json*"))], cache_dir),
        )
    except BaseException:
        source.close()
        raise


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
