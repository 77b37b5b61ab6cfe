"""The GGUF reader: what it reads, and that every broken header is named for what it is."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covey.node.model.errors import CorruptModel, UnsupportedModel
from covey.node.model.gguf import TENSOR_TYPES, GgufFile
from covey.node.model.tensor_source import to_float32
from support.tiny_models import gguf_header, string, tensor_entry, value, write_gguf

F32, Q8_0 = 0, 8


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "text": "häß",
        "yes": True,
        "count": 7,
        "real": 0.5,
        "words": ["a", "", "ö"],
        "numbers": [1, -2],
    }
    with GgufFile(write(tmp_path, gguf_header(metadata, []))) as file:
        assert file.metadata["numbers"].tolist() == [1, -2]  # type: ignore[union-attr] # an array
        assert {k: v for k, v in file.metadata.items() if k != "numbers"} == {
            "text": "häß",
            "yes": True,
            "count": 7,
            "real": 0.5,
            "words": ("a", "", "ö"),
        }


def test_tensor_comes_back_as_it_was_written(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_gguf(tmp_path / "m.gguf", {}, {"a": matrix, "b": matrix + 1})
    with GgufFile(path) as file:
        info = file.tensors["b"]
        assert (info.type, info.shape, info.nbytes) == ("F32", (2, 3), 24)
        assert np.array_equal(to_float32(info, file.raw("b")), matrix + 1)


def test_views_outlive_the_file(tmp_path: Path) -> None:
    matrix = np.ones((1, 8), np.float32)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", {}, {"a": matrix}))
    view = file.raw("a")
    file.close()
    assert bytes(view) == matrix.tobytes()
    assert view.readonly


def test_version_2_is_read(tmp_path: Path) -> None:
    assert not GgufFile(write(tmp_path, gguf_header({}, [], version=2))).tensors


@pytest.mark.parametrize(
    ("version", "feature"), [(1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "big-endian")]
)
def test_other_versions_are_unsupported(tmp_path: Path, version: int, feature: str) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        GgufFile(write(tmp_path, gguf_header({}, [], version=version)))


def header(n_tensors: int, n_entries: int, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_entries) + body


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + items


PAD = b"\0" * 64
BROKEN = {
    "empty": b"",
    "shorter than the magic": b"GG",
    "another magic": b"GGML" + PAD,
    "no counts": b"GGUF" + struct.pack("<I", 3),
    "more tensors than fit": header(2**40, 0, PAD),
    "more entries than fit": header(0, 2**60, PAD),
    "key longer than the file": header(0, 1, struct.pack("<Q", 2**62) + PAD),
    "key that is not UTF-8": header(0, 1, string(b"\xff") + value(1) + PAD),
    "key twice": header(0, 2, 2 * (string("k") + value(1)) + PAD),
    "value type that does not exist": header(0, 1, string("k") + struct.pack("<I", 13) + PAD),
    "boolean of 2": header(0, 1, string("k") + struct.pack("<IB", 7, 2) + PAD),
    "text that is cut off": header(0, 1, string("k") + struct.pack("<IQ", 8, 100)),
    "text that is not UTF-8": header(0, 1, string("k") + struct.pack("<I", 8) + string(b"\xc3")),
    "array longer than the file": header(0, 1, string("k") + array(4, 2**61, PAD)),
    "strings longer than the file": header(0, 1, string("k") + array(8, 2**61, PAD)),
    "string in an array is cut off": header(0, 1, string("k") + array(8, 1, struct.pack("<Q", 9))),
    "strings are too few": header(0, 1, string("k") + array(8, 2, string("a" * 20))),
    "string in an array is not UTF-8": header(0, 1, string("k") + array(8, 1, string(b"\xff"))),
    "array of a type that does not exist": header(0, 1, string("k") + array(99, 1, PAD)),
    "alignment of 0": header(0, 1, string("general.alignment") + value(0) + PAD),
    "alignment of 12": header(0, 1, string("general.alignment") + value(12) + PAD),
    "alignment that is text": header(0, 1, string("general.alignment") + value("32") + PAD),
    "tensor without dimensions": header(1, 0, tensor_entry("t", (), F32, 0) + PAD),
    "tensor of 5 dimensions": header(1, 0, tensor_entry("t", (1,) * 5, F32, 0) + PAD),
    "tensor of no size": header(1, 0, tensor_entry("t", (0,), F32, 0) + PAD),
    "half a quantisation block": header(1, 0, tensor_entry("t", (16,), Q8_0, 0) + PAD),
    "tensor past the end": header(1, 0, tensor_entry("t", (2**20,), F32, 0) + PAD),
    "tensor of absurd size": header(1, 0, tensor_entry("t", (2**63, 2**63), F32, 0) + PAD),
    "offset past the end": header(1, 0, tensor_entry("t", (1,), F32, 2**62) + PAD),
    "offset off the alignment": header(1, 0, tensor_entry("t", (1,), F32, 4) + PAD),
    "name too long": header(1, 0, tensor_entry("t" * 257, (1,), F32, 0) + PAD),
    "tensor twice": gguf_header(
        {}, [tensor_entry("t", (1,), F32, 0), tensor_entry("t", (1,), F32, 32)]
    )
    + PAD,
    "tensors that overlap": gguf_header(
        {}, [tensor_entry("t", (16,), F32, 0), tensor_entry("u", (1,), F32, 32)]
    )
    + PAD,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_header_is_corrupt_and_says_where(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CorruptModel) as caught:
        GgufFile(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_unknown_tensor_type_is_unsupported_and_lists_the_known(tmp_path: Path) -> None:
    path = write(tmp_path, header(1, 0, tensor_entry("t", (256,), 16, 0) + PAD))
    with pytest.raises(UnsupportedModel, match="type 16 of tensor 't'") as caught:
        GgufFile(path)
    assert caught.value.supported == tuple(name for name, _, _ in TENSOR_TYPES.values())


def test_nested_array_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="nested array 'k'"):
        GgufFile(write(tmp_path, header(0, 1, string("k") + array(9, 1, PAD))))


def test_names_from_a_file_reach_a_message_without_control_characters(tmp_path: Path) -> None:
    evil = "t\n\x1b[2J"
    with pytest.raises(CorruptModel) as caught:
        GgufFile(write(tmp_path, header(1, 0, tensor_entry(evil, (0,), F32, 0) + PAD)))
    assert caught.value.where == evil
    assert str(caught.value).isprintable()
