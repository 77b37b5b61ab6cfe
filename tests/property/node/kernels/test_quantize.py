"""Float weights as quantised blocks: what is lost is bounded, and nothing depends on neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from covey.node.kernels.matrix_type import MatrixType
from covey.node.kernels.quantize import quantize_matrix, quantize_rows
from covey.node.model.tensor_source import TensorInfo

KINDS = (MatrixType.Q8_0, MatrixType.Q4_0, MatrixType.Q4_K)
SUBNORMAL = 2.0**-24  # of fp16: scales are no finer
MOST = 63 * 15 + 63  # what the two scales of Q4_K are multiplied by
Floats = npt.NDArray[np.float32]
# What ggml_quantize_chunk of llama-cpp-python 0.3.36 loses on the numbers of the test below.
LLAMA_CPP_RMS = 0.00142859


def restored(values: Floats, kind: MatrixType) -> Floats:
    """Values after they were quantised."""
    blocks = quantize_rows(values, kind)
    assert blocks.shape == (len(values), kind.row_bytes(values.shape[1]))
    assert kind.first_not_finite(blocks.reshape(-1)) is None
    back: Floats = dequantize(blocks, GGMLQuantizationType(int(kind)))
    return back


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@st.composite
def matrices(draw: st.DrawFn) -> Floats:
    """Groups of 32 with a size, a middle and a shape of their own."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, n_groups = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 2))
    size = 10.0 ** random.uniform(draw(st.integers(-6, 0)), 1, (rows, n_groups, 1))
    middle = draw(st.sampled_from([0.0, 1.0, -3.0])) * random.normal(size=(rows, n_groups, 1))
    x = random.standard_t(draw(st.sampled_from([2, 5, 100])), (rows, n_groups, 32))
    x[random.random(x.shape) < draw(st.sampled_from([0.0, 0.5, 0.97]))] = 0
    return ((x + middle) * size).reshape(rows, -1).astype(np.float32)


@given(matrices())
def test_q8_0_is_off_by_half_a_step(x: Floats) -> None:
    groups = x.reshape(-1, 32)
    step = np.abs(groups).max(axis=1, keepdims=True) / 127
    # and by what fp16 rounds off the step, once for each of up to 127
    bound = step * (0.5 + 127 * 2.0**-11 + 1e-4) + 127 * SUBNORMAL / 2
    assert (np.abs(restored(x, MatrixType.Q8_0).reshape(groups.shape) - groups) <= bound).all()


@given(matrices())
def test_q4_0_is_off_by_half_a_step_or_at_its_end_by_one(x: Floats) -> None:
    groups = x.reshape(-1, 32)
    step = np.abs(groups).max(axis=1, keepdims=True) / 8
    bound = step * (1 + 8 * 2.0**-11 + 1e-4) + 8 * SUBNORMAL / 2
    assert (np.abs(restored(x, MatrixType.Q4_0).reshape(groups.shape) - groups) <= bound).all()


@given(matrices())
def test_q4_k_is_off_by_little_of_what_its_super_block_spans(x: Floats) -> None:
    blocks = x.reshape(-1, 256)
    span = np.maximum(blocks.max(axis=1), 0) - np.minimum(blocks.min(axis=1), 0)
    # Half a step, a step that is cut off, and six bits for scales and minima.
    bound = span[:, None] * (1.5 / 14 + 2 / 126 + 2.0**-10) + MOST * SUBNORMAL / 2
    assert (np.abs(restored(x, MatrixType.Q4_K).reshape(blocks.shape) - blocks) <= bound).all()


@pytest.mark.parametrize("middle", [0.0, 0.05, -0.05])
@pytest.mark.parametrize("freedom", [4, 1000])
def test_q4_k_loses_clearly_less_than_smallest_and_largest_would(
    middle: float, freedom: int
) -> None:
    random = np.random.default_rng(1)
    x = (middle + 0.02 * random.standard_t(freedom, (64, 512))).astype(np.float32)
    groups = x.reshape(-1, 32)
    low = np.minimum(groups.min(axis=1, keepdims=True), 0)
    step = (groups.max(axis=1, keepdims=True) - low) / 15  # kept in full, not in six bits
    plain = np.rint((groups - low) / step) * step + low
    assert rms(restored(x, MatrixType.Q4_K) - x) < 0.95 * rms(plain - groups)


def test_q4_k_loses_what_llama_cpp_loses() -> None:
    x = (0.02 * np.random.default_rng(0).normal(size=(64, 1024))).astype(np.float32)
    assert rms(restored(x, MatrixType.Q4_K) - x) == pytest.approx(LLAMA_CPP_RMS, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@given(x=matrices())
def test_a_row_is_quantised_without_regard_to_others(kind: MatrixType, x: Floats) -> None:
    alone = [quantize_rows(x[i : i + 1], kind) for i in range(len(x))]
    many = np.tile(x, (130, 1))  # more than what is computed at once
    assert np.array_equal(quantize_rows(many, kind), np.tile(np.concatenate(alone), (130, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: MatrixType) -> None:
    assert not restored(np.zeros((2, 256), dtype=np.float32), kind).any()


@pytest.mark.parametrize("kind", KINDS)
@given(value=st.floats(2**-10, 1e4, width=32), sign=st.sampled_from([1, -1]))
def test_a_constant_stays_nearly_that(kind: MatrixType, value: float, sign: int) -> None:
    x = np.full((1, 256), sign * value, dtype=np.float32)
    assert np.allclose(restored(x, kind), x, rtol=2e-3, atol=MOST * SUBNORMAL / 2)


@pytest.mark.parametrize("kind", KINDS)
@given(exponent=st.integers(-149, -25))
def test_tiny_values_become_zero_or_stay_tiny(kind: MatrixType, exponent: int) -> None:
    x = np.full((1, 256), 2.0**exponent, dtype=np.float32)
    x[0, ::3] *= -1
    assert np.abs(restored(x, kind)).max() <= 4 * 2.0**exponent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e9, 1e18, 1e30, 3.4e38, -1e9, -3.4e38])
def test_values_beyond_a_scale_in_fp16_are_seen_in_the_block(
    kind: MatrixType, value: float
) -> None:
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    x[1, 300] = value
    block = (512 + 300) // kind.block_columns
    blocks = quantize_rows(x, kind).reshape(-1)
    assert kind.first_not_finite(blocks) == block * kind.block_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_a_matrix_is_read_in_pieces(kind: MatrixType, stored: str) -> None:
    x = np.random.default_rng(3).normal(size=(700, 512)).astype(np.float32)
    raw = quantize(x, GGMLQuantizationType[stored])
    exact = dequantize(raw, GGMLQuantizationType[stored])
    info = TensorInfo("matrix", stored, x.shape, 64, raw.nbytes)
    blocks = quantize_matrix(info, np.frombuffer(raw.tobytes(), dtype=np.uint8), kind)
    assert np.array_equal(blocks, quantize_rows(exact, kind).reshape(-1))
    one = quantize_matrix(
        replace(info, shape=(1, 512)), np.frombuffer(raw[:1].tobytes(), dtype=np.uint8), kind
    )
    assert np.array_equal(one, blocks[: len(one)])
