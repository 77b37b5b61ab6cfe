"""Packed weights on disk: written once, then mapped read-only.

Several nodes on one machine share the memory of a mapping, and a restart reads nothing that the
system still holds. A file is named by the hash of the blob it was made from, by what that was
quantised to and by the part of it that a shard holds, so that it belongs to exactly these weights,
and ends with its own SHA-256, so that a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import platformdirs

from covey.node.model.checkpoint import Checkpoint
from covey.node.model.tensor_source import TensorSlice

from .library import Bytes
from .packed import PackedBlock, Packer

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1  # raise it when the kernels' layout of a format or a quantiser changes
_DIGEST_BYTES = 32


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
        sha256 = next(each.sha256 for each in checkpoint.blobs() if each.name == blob)
        quantized = f".{packer.quantize}" if packer.changes(parts) else ""
        cut = f".{part}" if part else ""
        path = self._folder / f"{sha256}.{LAYOUT_VERSION}{quantized}{cut}"
        buffer = _mapped(path, size)
        if buffer is not None:
            return packer.view(parts, buffer)
        checkpoint.verify_blob(blob)
        block = packer.pack(checkpoint, parts)
        try:
            _write(path, block.buffer)
        except OSError as error:
            logger.warning("packed weights stay in memory: %s: %s", path, error.strerror)
            return block
        buffer = _mapped(path, size)
        return block if buffer is None else packer.view(parts, buffer)


def _mapped(path: Path, size: int) -> Bytes | None:
    """The content of a whole and undamaged file of `size` bytes and a digest, else None."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size + _DIGEST_BYTES:
                return None
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError):
        return None
    buffer = data[:size]
    if hashlib.sha256(buffer.data).digest() != data[size:].tobytes():
        logger.warning("packed weights in %s are damaged; they are made anew", path)
        return None
    return buffer


def _write(path: Path, buffer: Bytes) -> None:
    """Put a file there whole or not at all; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as file:
            file.write(buffer.data)
            file.write(hashlib.sha256(buffer.data).digest())
        half.replace(path)
    except OSError:
        with suppress(OSError):
            half.unlink()
        raise
