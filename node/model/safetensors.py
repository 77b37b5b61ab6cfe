"""A bounds-checked reader of safetensors files over memory maps, single or sharded by an index.

Reads headers only; tensor bytes are handed out as views. Own code rather than the library's
because blobs are hashes of raw byte ranges, which the library does not give out. Format:
the README of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from .errors import CorruptModel, UnsupportedModel
from .tensor_source import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
MAX_TEXT_BYTES = 2**26  # of configuration, index and tokenizer files
MAX_SHARDS = 4096
MAX_DIMENSIONS = 4

_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})


class SafetensorsFiles:
    """The tensors of one safetensors file, or of all the shards beside an index.

    Raises:
        CorruptModel: a header or the index breaks the format or reaches past the end of a file.
        UnsupportedModel: a tensor of a type other than F32, F16, BF16.
        OSError: a file cannot be read.
    """

    def __init__(self, path: Path, shards: Mapping[str, Path]) -> None:
        """`shards`: every tensor's file by name, or empty: then `path` is the only file."""
        self.path = path
        self._maps: dict[Path, mmap.mmap] = {}
        self._homes: dict[str, Path] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._tensors)
        try:
            for file in sorted(set(shards.values())) or [path]:
                self._add(file, shards)
            self._check_complete(shards)
        except BaseException:
            self.close()
            raise

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor, read-only and not copied; KeyError for an unknown name."""
        info = self.tensors[name]
        return memoryview(self._maps[self._homes[name]])[info.offset : info.offset + info.nbytes]

    def close(self) -> None:
        """Unmap the files, now or when the last view of each is gone."""
        for mapped in self._maps.values():
            with suppress(BufferError):  # a view is alive; the map ends with it
                mapped.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is open."""
        return tuple(self._maps)

    def _add(self, file: Path, shards: Mapping[str, Path]) -> None:
        self._maps[file] = _map_file(file)
        for name, info in _read_header(file, self._maps[file]).items():
            if shards and shards.get(name) != file:
                raise CorruptModel(file, name, "expected the tensor where the index says")
            self._tensors[name] = info
            self._homes[name] = file

    def _check_complete(self, shards: Mapping[str, Path]) -> None:
        for name in shards.keys() - self._tensors.keys():
            raise CorruptModel(shards[name], name, "expected the tensor that the index names")


def open_safetensors(path: Path) -> SafetensorsFiles:
    """Open a `.safetensors` file, or a folder with one or with an index of shards."""
    if path.is_file():
        return SafetensorsFiles(path, {})
    index = path / INDEX_NAME
    if not index.is_file():
        return SafetensorsFiles(path / SINGLE_NAME, {})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(index, "weight_map", "expected an object of tensor names")
    for name, file in weight_map.items():
        # A shard is a plain name in this folder; anything else would read the owner's files.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CorruptModel(index, name, "expected the name of a file beside the index")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CorruptModel(index, "weight_map", f"expected at most {MAX_SHARDS} shards")
    return SafetensorsFiles(index, {name: path / file for name, file in weight_map.items()})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; CorruptModel if it is anything else."""
    return _parse_object(path, _read_bounded(path))


def read_text(path: Path) -> str:
    """UTF-8 text from a file of bounded size; CorruptModel if it is anything else."""
    try:
        return _read_bounded(path).decode()
    except UnicodeDecodeError as error:
        raise CorruptModel(path, error.start, "expected UTF-8") from error


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise CorruptModel(path, MAX_TEXT_BYTES, f"expected at most {MAX_TEXT_BYTES} bytes")
    return content


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise CorruptModel(path, 0, "expected a safetensors file, found an empty one")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    length = int.from_bytes(data[:8], "little")
    base = 8 + length
    if len(data) < 8 or length > MAX_HEADER_BYTES or base > len(data):
        raise CorruptModel(path, 0, "expected the length of a header that fits the file")
    header = _parse_object(path, data[8:base])
    tensors = {
        name: _tensor(path, name, entry, base, len(data))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    reached = base
    for info in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if info.offset < reached:
            raise CorruptModel(path, info.name, "expected not to overlap another tensor")
        reached = info.offset + info.nbytes
    return tensors


def _tensor(path: Path, name: str, entry: object, base: int, end: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise CorruptModel(path, name, "expected an object with dtype, shape and data_offsets")
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise UnsupportedModel(f"type {dtype!r} of tensor {name!r}", _ITEM_BYTES)
    if not _is_sizes(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise CorruptModel(path, name, f"expected a shape of 1 to {MAX_DIMENSIONS} sizes")
    offsets = entry.get("data_offsets")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise CorruptModel(path, name, "expected data_offsets [begin, end]")
    nbytes = _ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
    if offsets[1] - offsets[0] != nbytes or base + offsets[1] > end:
        raise CorruptModel(path, name, f"expected {nbytes} bytes inside the file")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], nbytes)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _parse_object(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key twice")
        return made

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(path, 0, f"expected JSON without double keys ({error})") from error
    if not isinstance(value, dict):
        raise CorruptModel(path, 0, "expected a JSON object")
    return value
