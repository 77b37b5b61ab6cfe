"""Which engine runs a model, and what of its weights is quantised at load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from covey.node.catalog import LocalModel
from covey.node.engine.tensors import (
    NATIVE_KINDS,
    EngineKind,
    Quantization,
    is_native,
    options_for,
    quantized_as,
)
from covey.node.engines import EngineChoice, Engines, weight_sizes
from covey.node.errors import ConfigError
from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import load_library
from covey.node.kernels.packed_cache import PackedCache
from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from support.tiny_models import TINY
from support.tiny_weights import rows, write_quantized

CONFIG = replace(
    TINY,
    n_blocks=2,
    hidden_size=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    rope_dim=16,
    intermediate_size=256,
    tied_embeddings=False,
)
Q8_0, Q4_0, Q4_K = (34 / 32, 18 / 32, 144 / 256)  # bytes of a weight
Open = Callable[[str], Checkpoint]


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def open_as(tmp_path: Path) -> Iterator[Open]:
    """Opens the tiny model with matrices of one type."""
    with ExitStack() as stack:

        def open_(kind: str) -> Checkpoint:
            path = write_quantized(tmp_path / f"{kind}.gguf", CONFIG, kind)
            return stack.enter_context(open_checkpoint(path, cache_dir=tmp_path))

        yield open_


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("choice", ["auto", "native"])
@pytest.mark.parametrize(("quantize", "kind"), NATIVE_KINDS.items())
def test_float_models_run_on_the_engine_that_quantises_them(
    open_as: Open, stored: str, choice: EngineChoice, quantize: Quantization, kind: EngineKind
) -> None:
    assert Engines(choice, 1, quantize=quantize).kind_of(open_as(stored)) == kind


@pytest.mark.parametrize("stored", ["Q8_0", "Q4_1"])
def test_a_quantised_model_stays_what_it_is(open_as: Open, stored: str) -> None:
    checkpoint = open_as(stored)
    engines = Engines("auto", 1, quantize="q4_0")
    assert engines.kind_of(checkpoint) == "native"
    assert (
        LocalModel("a", checkpoint, engines).layout
        == LocalModel("a", checkpoint, Engines("auto", 1)).layout
    )


@pytest.mark.parametrize("choice", ["fp32", "bf16"])
def test_torch_does_not_quantise_and_keeps_no_pace(open_as: Open, choice: EngineChoice) -> None:
    checkpoint = open_as("F16")
    with pytest.raises(ConfigError, match=f"^quantize: .*native.* --engine {choice}"):
        Engines(choice, 1, quantize="q8_0").kind_of(checkpoint)
    with pytest.raises(ConfigError, match=f"^speed: .*native.* --engine {choice}"):
        Engines(choice, 1, speed=0.5).kind_of(checkpoint)


def test_without_kernels_what_only_they_do_is_refused_with_the_reason(
    open_as: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_as("F16")

    def none_built() -> None:
        raise KernelsUnavailable("no kernels were built")

    monkeypatch.setattr("covey.node.engines.load_library", none_built)
    assert Engines("auto", 1).kind_of(checkpoint) == "fp32"
    for field, engines in (
        ("quantize", Engines("auto", 1, quantize="q4_k")),
        ("speed", Engines("auto", 1, speed=0.5)),
        ("engine", Engines("native", 1, quantize="q4_k")),
    ):
        with pytest.raises(ConfigError, match=f"^{field}: .*no kernels were built"):
            engines.kind_of(checkpoint)


@pytest.mark.parametrize(
    ("quantize", "wide", "narrow"),
    [("q8_0", Q8_0, Q8_0), ("q4_0", Q4_0, Q4_0), ("q4_k", Q4_K, Q8_0)],
)
def test_sizes_are_those_of_the_quantised_weights(
    open_as: Open, tmp_path: Path, quantize: Quantization, wide: float, narrow: float
) -> None:
    checkpoint = open_as("F16")
    engines = Engines("auto", 1, PackedCache(tmp_path / "packed"), quantize=quantize)
    kind = engines.kind_of(checkpoint)
    sizes = weight_sizes(checkpoint, kind)
    inner, hidden = CONFIG.intermediate_size, CONFIG.hidden_size
    down = inner * hidden  # the only one whose rows are whole blocks of Q4_K
    others = CONFIG.block_weights - 2 * hidden - down
    assert sizes.blocks[0] == pytest.approx(wide * down + narrow * others + 8 * hidden, rel=0.02)
    assert sizes.embedding == pytest.approx(Q8_0 * CONFIG.vocab_size * hidden, rel=0.1)
    assert sum(sizes.blocks) == engines.load_stage(checkpoint, (0, 2), kind).weight_bytes
    head = engines.load_head(checkpoint, kind)
    assert sizes.embedding + sizes.head == head.weight_bytes


def test_each_quantisation_has_its_own_files(open_as: Open, tmp_path: Path) -> None:
    checkpoint, folder = open_as("F32"), tmp_path / "packed"
    results = []
    for quantize in (*NATIVE_KINDS, *NATIVE_KINDS):
        engines = Engines("native", 1, PackedCache(folder), quantize=quantize)
        kind = engines.kind_of(checkpoint)
        stage, head = (
            engines.load_stage(checkpoint, (0, 2), kind),
            engines.load_head(checkpoint, kind),
        )
        stage.open_session("s", 3)
        results.append(head.logits(stage.forward("s", 0, rows(3, CONFIG))))
    for before, after in zip(results[:4], results[4:], strict=True):
        assert np.array_equal(before, after)
    assert len({logits.tobytes() for logits in results}) == 4
    assert len(list(folder.iterdir())) == 4 * (CONFIG.n_blocks + 2)


def test_speed_is_given_to_the_engine(open_as: Open) -> None:
    checkpoint = open_as("F16")
    engines = Engines("native", 1, speed=0.25)
    assert LocalModel("a", checkpoint, engines).speed == 0.25
    assert engines._native._pacer is not None
    assert Engines("native", 1)._native._pacer is None


def test_engine_kinds_say_what_they_quantise_and_how_to_start_them() -> None:
    for quantization, kind in NATIVE_KINDS.items():
        assert is_native(kind)
        assert quantized_as(kind) == quantization
    assert not is_native("fp32")
    assert quantized_as("bf16") is None
    assert options_for("native-q4_k") == "with --quantize q4_k"
    assert options_for("native") == "with --engine native and without --quantize"
    assert options_for("bf16") == "with --engine bf16"


def test_a_model_without_kernels_runs_on_torch_and_says_why(tmp_path: Path) -> None:
    narrow = replace(CONFIG, head_dim=8, rope_dim=8)
    path = write_quantized(tmp_path / "narrow.gguf", narrow, "F32")
    with open_checkpoint(path, cache_dir=tmp_path) as checkpoint:
        model = LocalModel("narrow", checkpoint, Engines())
        assert model.engine == "fp32"
        assert model.why_portable is not None
        assert "head_dim = 8" in model.why_portable
        asked = LocalModel("narrow", checkpoint, Engines("fp32"))
        assert asked.why_portable is None  # it is what was asked for


def test_a_model_with_kernels_has_nothing_to_explain(open_as: Open) -> None:
    model = LocalModel("tiny", open_as("Q8_0"), Engines())
    assert (model.engine, model.why_portable) == ("native", None)
