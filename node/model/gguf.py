"""A bounds-checked reader of GGUF files (versions 2 and 3, little endian) over a memory map.

Reads the header only; tensor bytes are handed out as views. It knows no architecture and decodes
no weights. Every count, length, type and offset is checked before it is used, so a hostile file
ends in `CorruptModel` or `UnsupportedModel` and takes no memory beyond the size of the file.
Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import CorruptModel, UnsupportedModel
from .tensor_source import TensorInfo

Scalar: TypeAlias = int | float | bool | str
MetadataValue: TypeAlias = Scalar | tuple[str, ...] | npt.NDArray[np.generic]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Limits that no real file comes near; they bound the work a bad header can cause.
MAX_ENTRIES = 2**14  # metadata keys
MAX_TENSORS = 2**17
MAX_KEY_BYTES = 2**16 - 1  # the format's own
MAX_TENSOR_NAME_BYTES = 256  # the format says 64; forks use more
MAX_STRING_BYTES = 2**24  # a chat template is some kilobytes
MAX_ARRAY_ITEMS = 2**22  # the largest vocabularies have 2**18 tokens and 2**19 merges
MAX_DIMENSIONS = 4  # the format's own
MAX_ALIGNMENT = 2**16

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Scalar types by number; the form serves `struct` and numpy alike.
_SCALARS: Mapping[int, str] = MappingProxyType(
    {
        0: "<B",
        1: "<b",
        2: "<H",
        3: "<h",
        4: "<I",
        5: "<i",
        6: "<f",
        _BOOL: "<B",
        10: "<Q",
        11: "<q",
        12: "<d",
    }
)

# Tensor type by number: name, elements in a block, bytes in a block (ggml-common.h).
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        20: ("IQ4_NL", 32, 18),
        23: ("IQ4_XS", 256, 136),
        30: ("BF16", 1, 2),
    }
)


class GgufFile:
    """An open GGUF file; use as a context manager or call `close`.

    Raises:
        CorruptModel: the header breaks the format or reaches past the end of the file.
        UnsupportedModel: another version, byte order, or a tensor type not in `TENSOR_TYPES`.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise CorruptModel(path, 0, "expected a GGUF file, found an empty one")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            header = _Header(path, self._map)
        except BaseException:
            self._map.close()
            raise
        self.metadata: Mapping[str, MetadataValue] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(header.tensors)

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor, read-only and not copied; KeyError for an unknown name."""
        info = self.tensors[name]
        return memoryview(self._map)[info.offset : info.offset + info.nbytes]

    def close(self) -> None:
        """Unmap the file, now or when the last view of it is gone."""
        with suppress(BufferError):  # a view is alive; the map ends with it
            self._map.close()

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


class _Header:
    """One pass over the header; the cursor never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._end = len(data)
        self._at = 0
        self.metadata: dict[str, MetadataValue] = {}
        self.tensors: dict[str, TensorInfo] = {}
        n_tensors, n_entries = self._read_preamble()
        for _ in range(n_entries):
            self._read_entry()
        alignment = self._alignment()
        declared = [self._read_tensor() for _ in range(n_tensors)]
        self._place(declared, alignment)

    def _read_preamble(self) -> tuple[int, int]:
        if self._take(4, "magic") != MAGIC:
            raise self._corrupt(0, "expected the magic 'GGUF'")
        version = self._number("<I", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            feature = "big-endian GGUF" if swapped else f"GGUF version {version}"
            raise UnsupportedModel(feature, ("little-endian GGUF version 2 or 3",))
        n_tensors = self._count("tensors", MAX_TENSORS, least_bytes=8 + 4 + 8 + 4 + 8)
        n_entries = self._count("metadata entries", MAX_ENTRIES, least_bytes=8 + 4 + 1)
        return n_tensors, n_entries

    def _read_entry(self) -> None:
        start = self._at
        key = self._string(MAX_KEY_BYTES, "metadata key")
        if key in self.metadata:
            raise self._corrupt(start, f"expected a new key, found {key!r} twice")
        self.metadata[key] = self._value(self._number("<I", "value type"), key)

    def _value(self, kind: int, key: str) -> MetadataValue:
        if kind == _STRING:
            return self._string(MAX_STRING_BYTES, key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._corrupt(self._at - 4, f"expected a value type of GGUF, found {kind}")
        form = _SCALARS[kind]
        value: int | float = struct.unpack(form, self._take(struct.calcsize(form), key))[0]
        return self._bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> MetadataValue:
        kind = self._number("<I", key)
        if kind == _ARRAY:
            raise UnsupportedModel(f"nested array {key!r}", ("arrays of numbers or strings",))
        if kind == _STRING:
            return self._strings(self._count(key, MAX_ARRAY_ITEMS, least_bytes=8), key)
        if kind not in _SCALARS:
            raise self._corrupt(self._at - 4, f"expected a value type of GGUF, found {kind}")
        dtype = np.dtype(_SCALARS[kind])
        n_items = self._count(key, MAX_ARRAY_ITEMS, least_bytes=dtype.itemsize)
        items = np.frombuffer(self._take(n_items * dtype.itemsize, key), dtype=dtype)
        return items.astype(np.bool_) if kind == _BOOL else items

    def _strings(self, n_items: int, key: str) -> tuple[str, ...]:
        # A vocabulary is 50,000 to 500,000 strings: one tight loop instead of `_string`.
        data, at, end = self._data, self._at, self._end
        start = at
        unpack = struct.Struct("<Q").unpack_from
        items: list[str] = []
        try:
            for _ in range(n_items):
                (length,) = unpack(data, at)
                start, at = at + 8, at + 8 + length
                if at > end or length > MAX_STRING_BYTES:
                    raise self._corrupt(start - 8, f"expected a string of {key!r} to end in time")
                items.append(data[start:at].decode())
        except struct.error as error:
            raise self._corrupt(at, f"expected more strings of {key!r}") from error
        except UnicodeDecodeError as error:
            raise self._corrupt(start, f"expected UTF-8 in {key!r}") from error
        self._at = at
        return tuple(items)

    def _read_tensor(self) -> tuple[TensorInfo, int]:
        start = self._at
        name = self._string(MAX_TENSOR_NAME_BYTES, "tensor name")
        n_dims = self._number("<I", name)
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._corrupt(name, f"expected 1 to {MAX_DIMENSIONS} dimensions, not {n_dims}")
        dims = struct.unpack(f"<{n_dims}Q", self._take(8 * n_dims, name))
        kind = self._number("<I", name)
        offset = self._number("<Q", name)
        if kind not in TENSOR_TYPES:
            names = (known for known, _, _ in TENSOR_TYPES.values())
            raise UnsupportedModel(f"type {kind} of tensor {name!r}", names)
        type_name, block_elements, block_bytes = TENSOR_TYPES[kind]
        if 0 in dims or dims[0] % block_elements:
            raise self._corrupt(
                name, f"expected rows of whole {type_name} blocks, found shape {dims[::-1]}"
            )
        n_elements = 1
        for size in dims:
            n_elements *= size
        nbytes = n_elements // block_elements * block_bytes
        return TensorInfo(name, type_name, tuple(dims[::-1]), offset, nbytes), start

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
            raise self._corrupt("general.alignment", "expected a multiple of 8, 64 KiB at most")
        return alignment

    def _place(self, declared: list[tuple[TensorInfo, int]], alignment: int) -> None:
        """Turn offsets into file positions; each tensor inside the file, none over another."""
        base = -(-self._at // alignment) * alignment
        for info, start in declared:
            if info.name in self.tensors:
                raise self._corrupt(start, f"expected a new tensor, found {info.name!r} twice")
            if info.offset % alignment:
                raise self._corrupt(info.name, f"expected an offset in steps of {alignment}")
            placed = TensorInfo(info.name, info.type, info.shape, base + info.offset, info.nbytes)
            if placed.offset + placed.nbytes > self._end:
                raise self._corrupt(
                    info.name, f"expected to end at {self._end} at most, the size of the file"
                )
            self.tensors[info.name] = placed
        reached = base
        for info in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if info.offset < reached:
                raise self._corrupt(info.name, "expected not to overlap another tensor")
            reached = info.offset + info.nbytes

    def _take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self._end - self._at:
            raise self._corrupt(self._at, f"expected {n_bytes} more bytes for {what!r}")
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def _number(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return value

    def _count(self, what: str, limit: int, *, least_bytes: int) -> int:
        at = self._at
        count = self._number("<Q", what)
        if count > limit or count * least_bytes > self._end - self._at:
            raise self._corrupt(at, f"expected at most {limit} items that fit for {what!r}")
        return count

    def _string(self, limit: int, what: str) -> str:
        at = self._at
        length = self._number("<Q", what)
        if length > limit:
            raise self._corrupt(at, f"expected at most {limit} bytes for {what!r}, not {length}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(at, f"expected UTF-8 in {what!r}") from error

    def _bool(self, value: float) -> bool:
        if value not in (0, 1):
            raise self._corrupt(self._at - 1, "expected a boolean, 0 or 1")
        return value == 1

    def _corrupt(self, where: int | str, expected: str) -> CorruptModel:
        return CorruptModel(self._path, where, expected)
