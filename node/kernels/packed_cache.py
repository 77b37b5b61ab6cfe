"""Packed weights on disk: written once, then mapped read-only.

Several nodes on one machine share the memory of a mapping, and a restart reads nothing that the
system still holds. A file is named by the hash of the blob it was made from, by what that was
quantised to and by the part of it that a shard holds, so that it belongs to exactly these weights,
and ends with its own SHA-256, so that a damaged one is made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import platformdirs

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.tensor_source import TensorSlice

from .errors import CannotStream
from .packed import PackedBlock, Packer
from .packed_file import ColdBlock, map_packed, open_packed, write_packed

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1  # raise it when the kernels' layout of a format or a quantiser changes


class PackedCache:
    """A folder of packed blobs; by default in the user's cache folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or platformdirs.user_cache_path("covey") / "packed"

    def load(
        self,
        packer: Packer,
        checkpoint: Checkpoint,
        blob: str,
        parts: Mapping[str, TensorSlice],
        part: str = "",
    ) -> PackedBlock:
        """The parts of one blob ("block.3", "embedding", "head"), packed.

        A blob that is not in the cache is checked against its hash, packed, and put there if the
        disk has room; if not, it is kept in memory. If `parts` are not the whole blob, `part` is
        what they are in a file's name.

        Raises:
            UnsupportedModel: a tensor's type or shape has no kernel.
            CorruptModel: see `Packer.pack`; or the blob is not what it was.
        """
        size = packer.block_bytes(parts)
        path = self._path(packer, checkpoint, blob, parts, part)
        buffer = map_packed(path, size)
        if buffer is not None:
            return packer.view(parts, buffer)
        checkpoint.verify_blob(blob)
        block = packer.pack(checkpoint, parts)
        try:
            write_packed(path, [block.buffer])
        except OSError as error:
            logger.warning("packed weights stay in memory: %s: %s", path, error.strerror)
            return block
        buffer = map_packed(path, size)
        return block if buffer is None else packer.view(parts, buffer)

    def open(
        self,
        packer: Packer,
        checkpoint: Checkpoint,
        blob: str,
        parts: Mapping[str, TensorSlice],
        part: str = "",
    ) -> ColdBlock:
        """The same, left on disk: it is checked, packed and written with little memory.

        Raises:
            UnsupportedModel, CorruptModel: see `load`.
            CannotStream: the disk has no room for it.
        """
        size = packer.block_bytes(parts)
        path = self._path(packer, checkpoint, blob, parts, part)
        file = open_packed(path, size)
        if file is None:
            checkpoint.verify_blob(blob)
            try:
                write_packed(path, packer.pieces(checkpoint, parts), is_cold=True)
            except OSError as error:
                raise CannotStream(f"{path}: {error.strerror or error}") from error
            file = open_packed(path, size)
        if file is None:
            raise CannotStream(f"{path}: cannot be read as it was written")
        return ColdBlock(file, size, partial(packer.view, parts))

    def _path(
        self,
        packer: Packer,
        checkpoint: Checkpoint,
        blob: str,
        parts: Mapping[str, TensorSlice],
        part: str,
    ) -> Path:
        sha256 = next(each.sha256 for each in checkpoint.blobs() if each.name == blob)
        quantized = f".{packer.quantize}" if packer.changes(parts) else ""
        cut = f".{part}" if part else ""
        return self._folder / f"{sha256}.{LAYOUT_VERSION}{quantized}{cut}"
