"""The safetensors reader: single, sharded, and every way to be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.safetensors import SafetensorsFiles, open_safetensors
from covey.node.model.tensor_source import to_float32


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: Any, data: bytes = b"\0" * 64) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_each_type_is_decoded(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    data = values.tobytes() + values.astype(np.float16).tobytes() + bf16
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2], 0, 8),
        "b": entry("F16", [1, 2], 8, 12),
        "c": entry("BF16", [2, 1], 12, 16),
    }
    file = open_safetensors(write(tmp_path / "m.safetensors", header, data))
    for name, info in file.tensors.items():
        decoded = to_float32(info, file.raw(name))
        assert decoded.shape == info.shape
        assert decoded.ravel().tolist() == [1.5, -2.0]
    file.close()


BROKEN: dict[str, Any] = {
    "not JSON": b"{nothing",
    "not UTF-8": b'{"\xff": 1}',
    "not an object": [1],
    "a key twice": b'{"a": {}, "a": {}}',
    "entry that is no object": {"a": 3},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "shape of booleans": {"a": entry("F32", [True], 0, 4)},
    "negative size": {"a": entry("F32", [-1], 0, 4)},
    "too many dimensions": {"a": entry("F32", [1] * 5, 0, 4)},
    "offsets that are three": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "offsets the wrong way round": {"a": entry("F32", [1], 4, 0)},
    "offsets of another size": {"a": entry("F32", [2], 0, 4)},
    "past the end": {"a": entry("F32", [100], 0, 400)},
    "absurd size": {"a": entry("F32", [2**62, 2**62], 0, 2**60)},
    "overlap": {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN.keys())
def test_broken_header_is_corrupt(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(CorruptModel) as caught:
        open_safetensors(path)
    assert caught.value.path == path


@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 8, (2**40).to_bytes(8, "little")])
def test_header_longer_than_the_file_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptModel):
        SafetensorsFiles(path, {})


def test_other_types_are_unsupported_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": entry("F8_E4M3", [4], 0, 4)})
    with pytest.raises(UnsupportedModel, match="'F8_E4M3' of tensor 'a'; supported: F32, F16"):
        open_safetensors(path)


def shards(folder: Path, weight_map: dict[str, Any]) -> None:
    write(folder / "one.safetensors", {"a": entry("F32", [1], 0, 4)}, b"\0\0\x80\x3f")
    write(folder / "two.safetensors", {"b": entry("F32", [1], 0, 4)}, b"\0\0\0\x40")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    file = open_safetensors(tmp_path)
    decoded = {name: to_float32(info, file.raw(name)).item() for name, info in file.tensors.items()}
    assert decoded == {"a": 1.0, "b": 2.0}
    assert len(file.files) == 2


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        {"a": "../one.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ".."},
        {"a": 3},
        {"a": "two.safetensors", "b": "two.safetensors"},
        {"a": "one.safetensors", "c": "one.safetensors"},
    ],
)
def test_index_that_lies_is_corrupt(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(CorruptModel):
        open_safetensors(tmp_path)
