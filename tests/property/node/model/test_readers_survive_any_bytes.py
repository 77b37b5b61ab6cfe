"""Whatever bytes a file holds, a reader reads it or raises `ModelError`, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covey.node.model.checkpoint import open_checkpoint
from covey.node.model.errors import ModelError
from covey.node.model.gguf import GgufFile
from covey.node.model.hugging_face_config import hugging_face_config
from covey.node.model.layouts import GGUF_NAMES
from covey.node.model.safetensors import SafetensorsFiles
from covey.node.model.tensor_source import to_float32
from support.tiny_configs import CONFIGS, no_tensors
from support.tiny_models import TINY, tiny_tensors, write_tiny_gguf

HEADER_BYTES = 6944  # of the tiny file; the edits fall into it
MEMORY_LIMIT = 16 * 2**20  # the tiny model's file has 0.3 MB

CONFIG_KEYS = sorted(
    {key for config in CONFIGS.values() for key in config}
    | {"layer_types", "no_rope_layers", "rope_scaling", "use_sliding_window", "hidden_activation"}
    | {"query_pre_attn_scalar", "sliding_window_pattern", "partial_rotary_factor"}
)
ROPE_KEYS = [
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor",
    "full_attention", "sliding_attention", "partial_rotary_factor",
]  # fmt: skip

edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)), max_size=6
)
quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def read_or_refused() -> Iterator[None]:
    """`ModelError` and nothing else, its text one line that a terminal can show."""
    refusal = ""
    try:
        yield
    except ModelError as error:
        refusal = str(error)
    assert refusal.isprintable()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    with open_checkpoint(path, cache_dir=path.parent) as checkpoint:
        checkpoint.block(0)  # imports torch, which the memory limit is not about
    return path


@quick
@given(edits=edits, cut=st.floats(0, 1) | st.none())
def test_mutated_gguf(
    original: Path, tmp_path: Path, edits: list[tuple[float, bytes]], cut: float | None
) -> None:
    content = bytearray(original.read_bytes())
    for where, patch in edits:
        at = int(where * HEADER_BYTES)
        content[at : at + len(patch)] = patch
    path = tmp_path / "m.gguf"
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    tracemalloc.start()
    try:
        with (
            read_or_refused(),
            open_checkpoint(path, cache_dir=tmp_path / "cache") as checkpoint,
        ):
            checkpoint.tokenizer().encode("the text")
            checkpoint.block(0)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


@quick
@given(content=st.binary(max_size=400), counts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_any_bytes_after_the_magic(tmp_path: Path, content: bytes, counts: tuple[int, int]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"".join(n.to_bytes(8, "little") for n in counts) + content)
    with read_or_refused():
        GgufFile(path).close()


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8"]) | json_values,
        "shape": st.lists(st.integers(0, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 80), min_size=2, max_size=2) | json_values,
    }
)


@quick
@given(
    header=st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3)
    | json_values
    | st.binary(max_size=40),
    slack=st.integers(-5, 5),
    n_data=st.integers(0, 80),
)
def test_any_safetensors(tmp_path: Path, header: object, slack: int, n_data: int) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    length = max(0, len(raw) + slack)
    path.write_bytes(length.to_bytes(8, "little") + raw + b"\0" * n_data)
    with read_or_refused():
        file = SafetensorsFiles(path, {})
        for info in file.tensors.values():
            assert to_float32(info, file.raw(info.name)).shape == info.shape


configs = st.sampled_from(sorted(CONFIGS)).flatmap(
    lambda kind: st.dictionaries(st.sampled_from(CONFIG_KEYS), json_values, max_size=3).map(
        lambda changes: CONFIGS[kind] | changes
    )
)


@quick
@given(
    config=configs,
    kind=st.sampled_from(["default", "linear", "llama3", "longrope"]),
    rope=st.dictionaries(
        st.sampled_from(ROPE_KEYS), st.integers() | st.floats() | json_values, max_size=6
    ),
)
def test_any_config_json(config: dict[str, Any], kind: str, rope: dict[str, Any]) -> None:
    path, rope = Path("config.json"), {"rope_type": kind} | rope
    with read_or_refused():
        hugging_face_config(path, config | {"rope_parameters": rope}, no_tensors(path))


def test_a_nest_of_brackets_is_no_crash(tmp_path: Path) -> None:
    raw = b"[" * 200_000
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelError):
        SafetensorsFiles(path, {})


def test_the_unmutated_file_reads(original: Path, tmp_path: Path) -> None:
    with open_checkpoint(original, cache_dir=tmp_path) as checkpoint:
        assert checkpoint.config == TINY
        embedding = checkpoint.embedding().numpy()
        assert np.array_equal(embedding, tiny_tensors()[GGUF_NAMES.embedding])
        first = checkpoint.source.tensors[GGUF_NAMES.embedding]
        assert abs(first.offset - HEADER_BYTES) < 1000
