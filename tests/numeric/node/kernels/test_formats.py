"""Every matrix format on every instruction set of this CPU: packing, decoding and products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import Engine, Library, load_library, usable_isas
from covey.node.kernels.matrix_type import MatrixType
from covey.node.kernels.packed import matrix_type, packed_size
from covey.node.kernels.structures import Matrix
from covey.node.model.errors import UnsupportedModel
from covey.node.model.tensor_source import TensorInfo

KINDS = list(MatrixType)
FLOATS = (MatrixType.F32, MatrixType.F16, MatrixType.BF16)


@pytest.fixture(scope="module", params=usable_isas())
def library(request: pytest.FixtureRequest) -> Library:
    return load_library(request.param)


def random_blocks(kind: MatrixType, rows: int, columns: int, seed: int) -> npt.NDArray[np.uint8]:
    """Any bytes as codes and scales, and weights between -3 and 3 or so."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=rows * columns).astype(np.float32)
    if kind is MatrixType.F32:
        return numbers.view(np.uint8)
    if kind is MatrixType.F16:
        return numbers.astype(np.float16).view(np.uint8)
    if kind is MatrixType.BF16:
        return np.ascontiguousarray(numbers.view(np.uint16)[1::2]).view(np.uint8)
    n_bytes = rows * kind.row_bytes(columns)
    blocks = random.integers(
        0, 256, (n_bytes // kind.block_bytes, kind.block_bytes), dtype=np.uint8
    )
    for start in kind.number_starts:
        scales = random.normal(size=(len(blocks), 1)).astype(np.float16) / np.float16(256)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(-1)


def decoded(kind: MatrixType, blocks: npt.NDArray[np.uint8], rows: int) -> Any:
    return dequantize(blocks.reshape(rows, -1), GGMLQuantizationType(kind))


def pack(
    library: Library, kind: MatrixType, shape: tuple[int, int], blocks: Any
) -> tuple[Matrix, Any]:
    n_bytes = library.packed_bytes(kind, *shape)
    memory = np.full(n_bytes + 64, 0xA5, dtype=np.uint8)
    packed = memory[-memory.ctypes.data % 64 :][:n_bytes]
    library.pack(kind, *shape, blocks, packed)
    return library.matrix(kind, *shape, packed), packed


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_a_packed_row_decodes_to_what_the_file_says(kind: MatrixType, seed: int, rows: int) -> None:
    library, columns = load_library("portable"), 512
    blocks = random_blocks(kind, rows, columns, seed)
    matrix, _packed = pack(library, kind, (rows, columns), blocks)
    actual = library.embed(matrix, np.arange(rows, dtype=np.int32))
    expected = decoded(kind, blocks, rows)
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_the_file_is_in_the_packed_bytes(kind: MatrixType) -> None:
    library, shape = load_library("portable"), (16, 256)
    blocks = random_blocks(kind, *shape, seed=3)
    _matrix, packed = pack(library, kind, shape, blocks)
    random = np.random.default_rng(4)
    for bit in random.integers(0, 8 * kind.block_bytes, 300):
        flipped = blocks.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        _matrix, other = pack(library, kind, shape, flipped)
        assert not np.array_equal(packed, other)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_are_hardly_more_than_those_of_the_file(kind: MatrixType) -> None:
    packed = load_library("portable").packed_bytes(kind, 4096, 4096)
    assert packed <= 1.05 * 4096 * kind.row_bytes(4096)


def test_packed_bytes_are_the_same_on_every_instruction_set() -> None:
    for kind in KINDS:
        blocks = random_blocks(kind, 21, 256, seed=8)
        first, *others = (
            pack(load_library(isa), kind, (21, 256), blocks)[1] for isa in usable_isas()
        )
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_rows", [1, 2, 7, 12, 33])
def test_a_product_is_within_the_error_of_rounded_activations(
    library: Library, kind: MatrixType, n_rows: int
) -> None:
    rows, columns = 50, 1536
    blocks = random_blocks(kind, rows, columns, seed=n_rows)
    exact = decoded(kind, blocks, rows).astype(np.float64)
    x = np.random.default_rng(n_rows).normal(size=(n_rows, columns)).astype(np.float32)
    matrix, _packed = pack(library, kind, (rows, columns), blocks)
    actual = Engine(library, 2).multiply(matrix, x)
    # Each activation is off by half a step at most, a step being 1/127 of its block's largest.
    steps = np.abs(x.reshape(n_rows, -1, 32)).max(2).repeat(32, axis=1) / 127
    bound = 0.0 if kind in FLOATS else 0.5001 * steps @ np.abs(exact).T
    assert (np.abs(actual - x @ exact.T) <= bound + 1e-5 * np.abs(x) @ np.abs(exact).T).all()


@pytest.mark.parametrize("kind", KINDS)
@given(
    n=st.integers(1, 40),
    blocks_of_columns=st.integers(1, 3),
    scale=st.floats(1e-40, 1e20),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_product_is_the_same_on_every_instruction_set_and_one_row_at_a_time(
    kind: MatrixType, n: int, blocks_of_columns: int, scale: float, seed: int
) -> None:
    columns = max(kind.block_columns, 32) * blocks_of_columns
    x = (np.random.default_rng(seed).normal(size=(n, columns)) * scale).astype(np.float32)
    blocks = random_blocks(kind, 17, columns, seed)
    results = []
    for isa in usable_isas():
        library = load_library(isa)
        matrix, _packed = pack(library, kind, (17, columns), blocks)
        engine = Engine(library, 1)
        results.append(engine.multiply(matrix, x))
        results.append(np.concatenate([engine.multiply(matrix, x[i : i + 1]) for i in range(n)]))
    for other in results[1:]:
        assert np.array_equal(results[0].view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_codes_and_activations_overflow_nothing(
    library: Library, kind: MatrixType
) -> None:
    if kind in FLOATS:
        return
    random = np.random.default_rng(5)
    columns = 256
    blocks = random_blocks(kind, 16, columns, seed=5).reshape(-1, kind.block_bytes)
    is_number = np.zeros(kind.block_bytes, dtype=bool)
    for start in kind.number_starts:
        is_number[start : start + 2] = True
    x = np.where(random.random((3, columns)) < 0.5, -1, 1).astype(np.float32)
    x[2] = 1
    for byte in (0x00, 0x80, 0xFF):
        blocks[:, ~is_number] = byte
        flat = blocks.reshape(-1)
        matrix, _packed = pack(library, kind, (16, columns), flat)
        exact = decoded(kind, flat, 16).astype(np.float64)
        actual = Engine(library, 1).multiply(matrix, x)
        assert np.allclose(actual, x @ exact.T, rtol=1e-5, atol=1e-3 * np.abs(exact).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(kind: MatrixType, bad: int) -> None:
    n_rows, columns = 1 << 14, 256  # more than is scanned in one piece
    clean = random_blocks(kind, n_rows, columns, seed=1)
    assert kind.first_not_finite(clean) is None
    number = np.array([bad], dtype="<u2").view(np.uint8)
    if kind in (MatrixType.F32, MatrixType.BF16):
        number = np.array([bad], "<u2").view("<f2").astype("<f4").view(np.uint8)
        number = number[2:] if kind is MatrixType.BF16 else number
    for start in kind.number_starts:
        block = len(clean) // kind.block_bytes * 2 // 3
        broken = clean.copy()
        at = block * kind.block_bytes + start
        broken[at : at + len(number)] = number
        assert kind.first_not_finite(broken) == block * kind.block_bytes


def info(kind: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo("blk.0.attn_q.weight", kind, shape, 0, 0)


def test_a_type_without_a_kernel_is_refused_with_the_list() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"IQ4_XS of tensor 'blk\.0\.attn_q\.weight'.*Q4_K.*BF16"
    ):
        matrix_type(info("IQ4_XS", (256, 256)))


@pytest.mark.parametrize(("kind", "multiple"), [("Q4_K", 256), ("Q5_1", 32), ("F32", 32)])
def test_columns_that_are_no_whole_blocks_are_refused(kind: str, multiple: int) -> None:
    library = load_library("portable")
    assert packed_size(library, info(kind, (5, 3 * multiple))) > 0
    for columns in (multiple // 2, multiple + multiple // 2):
        with pytest.raises(UnsupportedModel, match=f"multiple of {multiple}"):
            packed_size(library, info(kind, (5, columns)))
        with pytest.raises(ValueError, match="cannot pack"):
            library.packed_bytes(MatrixType[kind], 5, columns)


def test_any_instruction_set_of_this_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in usable_isas():
        load_library.cache_clear()
        monkeypatch.setenv("COVEY_KERNELS", isa)
        assert load_library().isa == isa
    monkeypatch.delenv("COVEY_KERNELS")
    load_library.cache_clear()
    assert load_library().isa == load_library("portable").best_isa == usable_isas()[0]


def test_an_instruction_set_that_the_cpu_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(KernelsUnavailable, match=r"'cray'.*portable"):
        load_library("cray")


def test_libraries_are_where_the_build_puts_them() -> None:
    assert all(Path(load_library(isa).path).name.startswith(f"_{isa}.") for isa in usable_isas())
