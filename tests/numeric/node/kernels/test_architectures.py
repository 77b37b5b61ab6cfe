"""What blocks of other architectures have beside Llama's, against plain numpy in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from covey.node.engine.stage import PAGE_TOKENS
from covey.node.kernels.library import Engine, Library, PageTable, load_library, page_memory
from covey.node.kernels.matrix_type import MatrixType
from covey.node.kernels.structures import NO_ROPE, Activation, Block, KvType, Matrix, Parts, Shape

D, H, K, E, WIDE = 64, 4, 2, 32, 96
EPS = 1e-5
N = 330  # more than one segment


@dataclass(frozen=True)
class Case:
    """What is not as in Llama."""

    with_bias: bool = False
    with_head_norms: bool = False
    with_post_norms: bool = False
    windows: tuple[int, ...] = (0, 0)  # by block
    ropes: tuple[int, ...] = (0, 0)
    scale: float = E**-0.5
    activation: Activation = Activation.SILU
    n_experts: int = 0
    n_used: int = 0
    renormalize: bool = False


CASES = {
    "llama": Case(),
    "qwen2": Case(with_bias=True),
    "qwen3": Case(with_head_norms=True),
    "mistral": Case(windows=(40, 40)),
    "smollm3": Case(ropes=(0, NO_ROPE)),
    "gemma3": Case(
        with_head_norms=True,
        with_post_norms=True,
        windows=(17, 0),
        ropes=(1, 0),
        scale=0.11,
        activation=Activation.GELU_TANH,
    ),
    "qwen3moe": Case(with_head_norms=True, n_experts=8, n_used=3, renormalize=True),
    "moe": Case(n_experts=5, n_used=2),
    "windows of one and over a segment": Case(windows=(1, 270)),
}


@dataclass
class Weights:
    """One block: arrays by field of `Block`, matrices as rounded to fp16."""

    arrays: dict[str, Any]
    keep: list[Any] = field(default_factory=list)


class Model:
    """Two random blocks of a case, for the kernels and for numpy."""

    def __init__(self, library: Library, case: Case) -> None:
        self.library, self.case = library, case
        random = np.random.default_rng(3)
        self.blocks = [self._weights(random) for _ in case.windows]
        angles = np.arange(N)[:, None] * np.array([[1.0], [0.1]])[:, None] ** (
            np.arange(E // 2) / 5
        )
        self.ropes = [
            (np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)) for angle in angles
        ]
        self.shape = Shape(
            *(D, H, K, E, WIDE, E, 0, EPS, KvType.FP16, case.scale),
            *(case.activation, case.n_experts, case.n_used, case.renormalize),
        )
        self.described = (Block * len(self.blocks))(
            *(self._describe(block, i) for i, block in enumerate(self.blocks))
        )

    def _weights(self, random: Any) -> Weights:
        def matrix(rows: int, columns: int) -> Any:
            return (random.normal(size=(rows, columns)) / 8).astype(np.float16)

        def norm(n: int) -> Any:
            return random.uniform(0.5, 1.5, n).astype(np.float32)

        case = self.case
        arrays = {"attn_norm": norm(D), "ffn_norm": norm(D)}
        arrays |= {"q": matrix(H * E, D), "k": matrix(K * E, D), "v": matrix(K * E, D)}
        arrays["o"] = matrix(D, H * E)
        if case.with_bias:
            for name, n in (("q_bias", H * E), ("k_bias", K * E), ("v_bias", K * E)):
                arrays[name] = random.normal(size=n).astype(np.float32)
        if case.with_head_norms:
            arrays |= {"q_norm": norm(E), "k_norm": norm(E)}
        if case.with_post_norms:
            arrays |= {"post_attn_norm": norm(D), "post_ffn_norm": norm(D)}
        names = [("gate", WIDE, D), ("up", WIDE, D), ("down", D, WIDE)]
        if case.n_experts:
            arrays["router"] = random.normal(size=(case.n_experts, D)).astype(np.float32)
            names = [(f"{name}{i}", r, c) for i in range(case.n_experts) for name, r, c in names]
        arrays |= {name: matrix(r, c) for name, r, c in names}
        return Weights(arrays)

    def _describe(self, block: Weights, block_idx: int) -> Block:
        described = Block(window=self.case.windows[block_idx], rope=self.case.ropes[block_idx])
        experts = (Matrix * (3 * self.case.n_experts))()
        for name, array in block.arrays.items():
            if array.dtype == np.float32:
                setattr(described, name, array.ctypes.data)
            elif name[-1].isdigit():
                kind = ("gate", "up", "down").index(name.rstrip("0123456789"))
                at = 3 * int(name[len(("gate", "up", "down")[kind]) :]) + kind
                experts[at] = self._pack(block, array)
            else:
                setattr(described, name, self._pack(block, array))
        described.experts = ctypes.cast(experts, ctypes.POINTER(Matrix))
        block.keep.append(experts)
        return described

    def _pack(self, block: Weights, array: Any) -> Matrix:
        rows, columns = array.shape
        packed = page_memory(self.library.packed_bytes(MatrixType.F16, rows, columns))
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.library.pack(MatrixType.F16, rows, columns, raw, packed)
        block.keep.append(packed)
        return self.library.matrix(MatrixType.F16, rows, columns, packed)

    def session(self) -> PageTable:
        n_bytes = self.library.page_bytes(self.shape, len(self.blocks))
        return PageTable([page_memory(n_bytes) for _ in range(-(-N // PAGE_TOKENS))], n_bytes)

    def run(self, engine: Engine, hidden: Any, sizes: list[int]) -> Any:
        """All rows in calls of these sizes, repeated."""
        table, out, at, call = self.session(), [], 0, 0
        while at < len(hidden):
            part = hidden[at : at + sizes[call % len(sizes)]].copy()
            runs = [(table, at, len(part))]
            engine.span_forward(self.shape, self.described, runs, self.ropes, part)
            out.append(part)
            at, call = at + len(part), call + 1
        return np.concatenate(out)

    def reference(self, hidden: Any) -> Any:
        x = hidden.astype(np.float64)
        for block_idx, block in enumerate(self.blocks):
            w = {name: array.astype(np.float64) for name, array in block.arrays.items()}
            attended = self._attention(rms(x, w["attn_norm"]), w, block_idx)
            x = x + (rms(attended, w["post_attn_norm"]) if "post_attn_norm" in w else attended)
            mixed = self._mlp(rms(x, w["ffn_norm"]), w)
            x = x + (rms(mixed, w["post_ffn_norm"]) if "post_ffn_norm" in w else mixed)
        return x

    def _attention(self, x: Any, w: dict[str, Any], block_idx: int) -> Any:
        n, window, rope = len(x), self.case.windows[block_idx], self.case.ropes[block_idx]
        q, k, v = ((x @ w[name].T + w.get(f"{name}_bias", 0.0)).reshape(n, -1, E) for name in "qkv")
        if self.case.with_head_norms:
            q, k = rms(q, w["q_norm"]), rms(k, w["k_norm"])
        if rope != NO_ROPE:
            cos, sin = (table[:n, None].astype(np.float64) for table in self.ropes[rope])
            q, k = (
                np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
                for a, b in (np.split(each, 2, axis=-1) for each in (q, k))
            )
        k, v = (each.astype(np.float16).astype(np.float64).repeat(H // K, 1) for each in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * self.case.scale
        distance = np.arange(n)[:, None] - np.arange(n)
        scores[:, (distance < 0) | ((distance >= window) & (window > 0))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hts,shd->thd", weights, v).reshape(n, -1) @ w["o"].T

    def _mlp(self, x: Any, w: dict[str, Any]) -> Any:
        case = self.case

        def mlp(rows: Any, number: str) -> Any:
            gate, up = rows @ w["gate" + number].T, rows @ w["up" + number].T
            if case.activation is Activation.SILU:
                return (gate / (1 + np.exp(-gate)) * up) @ w["down" + number].T
            inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
            return (0.5 * gate * (1 + np.tanh(inner)) * up) @ w["down" + number].T

        if not case.n_experts:
            return mlp(x, "")
        shares = np.exp(x @ w["router"].T)
        shares /= shares.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for i, share in enumerate(shares):
            used = np.argsort(-share)[: case.n_used]
            total = share[used].sum() if case.renormalize else 1.0
            for expert in used:
                out[i] += share[expert] / total * mlp(x[i : i + 1], str(expert))[0]
        return out


def rms(x: Any, weight: Any) -> Any:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * weight


def rows(n: int = N) -> Any:
    return np.random.default_rng(5).normal(size=(n, D)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_a_block_computes_what_numpy_does(name: str) -> None:
    library = load_library()
    model, hidden = Model(library, CASES[name]), rows()
    expected = model.reference(hidden)
    actual = model.run(Engine(library, 1), hidden, [N])
    assert np.abs(actual - expected).max() < 4e-3 * np.abs(expected).max()
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 1e-3 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", CASES)
def test_neither_chunks_nor_threads_nor_instruction_set_change_a_bit(name: str) -> None:
    portable, best = load_library("portable"), load_library()
    hidden = rows()
    expected = Model(best, CASES[name]).run(Engine(best, 1), hidden, [N])
    for library, threads, sizes in ((best, 3, [1]), (portable, 2, [1, 2, 40, 7]), (best, 2, [64])):
        model = Model(library, CASES[name])
        assert np.array_equal(model.run(Engine(library, threads), hidden, sizes), expected)


@pytest.mark.parametrize("name", CASES)
def test_sessions_run_together_compute_what_they_do_alone(name: str) -> None:
    library = load_library()
    model, hidden, engine = Model(library, CASES[name]), rows(), Engine(library, 2)
    expected = model.run(engine, hidden, [N])
    lengths, added = (90, 0, 329), (1, 233, 1)
    tables = []
    for length in lengths:
        tables.append(model.session())
        if length:
            runs = [(tables[-1], 0, length)]
            engine.span_forward(
                model.shape, model.described, runs, model.ropes, hidden[:length].copy()
            )
    parts = [hidden[at : at + n] for at, n in zip(lengths, added, strict=True)]
    out = np.concatenate(parts)
    runs = list(zip(tables, lengths, added, strict=True))
    engine.span_forward(model.shape, model.described, runs, model.ropes, out)
    wanted = [expected[at : at + n] for at, n in zip(lengths, added, strict=True)]
    assert np.array_equal(out, np.concatenate(wanted))


def test_halves_of_blocks_with_experts_add_up() -> None:
    library = load_library()
    model, engine = Model(library, CASES["qwen3moe"]), Engine(library, 2)
    hidden = rows(9)
    described = (Block * 1)(model.described[0])
    n_bytes = library.page_bytes(model.shape, 1)
    results = []
    for parts in ([Parts.BLOCK], [Parts.ATTENTION | Parts.PARTIAL, Parts.MLP | Parts.PARTIAL]):
        runs = [(PageTable([page_memory(n_bytes)], n_bytes), 0, 9)]
        x = hidden.copy()
        for part in parts:
            out = x.copy()
            engine.span_forward(model.shape, described, runs, model.ropes, out, part)
            x = x + out if part & Parts.PARTIAL else out
        results.append(x)
    assert np.array_equal(*results)


def test_a_block_that_does_not_fit_its_shape_is_refused() -> None:
    from covey.node.kernels.errors import KernelFailed

    library = load_library()
    engine, hidden = Engine(library, 1), rows(1)
    model = Model(library, replace(CASES["gemma3"], n_experts=4, n_used=2))

    def refused(parts: Parts = Parts.BLOCK, **changed: Any) -> None:
        block = Block.from_buffer_copy(model.described[0])
        for name, value in changed.items():
            setattr(block, name, value)
        n_bytes = library.page_bytes(model.shape, 1)
        runs = [(PageTable([page_memory(n_bytes)], n_bytes), 0, 1)]
        with pytest.raises(KernelFailed, match="refused its arguments"):
            engine.span_forward(model.shape, (Block * 1)(block), runs, model.ropes, hidden, parts)

    refused(window=-1)
    refused(rope=2)
    refused(rope=-2)
    refused(router=None)  # and no dense MLP
    refused(experts=None)
    refused(Parts.MLP | Parts.PARTIAL)  # a norm of a part is not the part of the norm
    for name, value in (("n_experts_used", 5), ("attention_scale", 0.0), ("activation", 2)):
        shape = Shape.from_buffer_copy(model.shape)
        setattr(shape, name, value)
        with pytest.raises(ValueError, match="a shape"):
            library.page_bytes(shape, 1)
