"""Where a block's weights lie in a file: names, shapes, and which rows of which tensor.

Two layouts, GGUF and Hugging Face. Both end in the same fields (those of `BlockWeights`) and the
same `TensorSlice`s, so nothing behind this module knows that Phi-3 keeps q, k and v in one tensor
or that experts are stacked in one file and apart in another. `check` holds every tensor's shape
against the configuration, so that a stage can trust them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

from .config import ModelConfig
from .errors import CorruptModel, UnsupportedModel
from .tensor_source import TensorSlice, TensorSource


@dataclass(frozen=True, slots=True)
class BlockNames:
    """The tensor names of one plain block, with `{}` for its index."""

    attn_norm: str
    q: str
    k: str
    v: str
    o: str
    ffn_norm: str
    gate: str
    up: str
    down: str

    def at(self, block_idx: int) -> dict[str, str]:
        """Field -> tensor name in block `block_idx`."""
        return {f.name: getattr(self, f.name).format(block_idx) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What the tensors of a model are called in its file, and how they are stored there."""

    block: BlockNames
    block_prefix: str
    embedding: str
    output_norm: str
    head: str
    # Names of what plain Llama does not have, as in `block`; a second {} is the expert's index.
    more: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    is_fused: bool = False  # q, k, v are rows of one tensor, gate and up of another
    has_stacked_experts: bool = False  # one tensor [n_experts, rows, columns] for all of them
    norm_offset: float = 0.0  # what is added to the weights of every norm


GGUF_NAMES = TensorNames(
    block=BlockNames(
        attn_norm="blk.{}.attn_norm.weight",
        q="blk.{}.attn_q.weight",
        k="blk.{}.attn_k.weight",
        v="blk.{}.attn_v.weight",
        o="blk.{}.attn_output.weight",
        ffn_norm="blk.{}.ffn_norm.weight",
        gate="blk.{}.ffn_gate.weight",
        up="blk.{}.ffn_up.weight",
        down="blk.{}.ffn_down.weight",
    ),
    block_prefix="blk.",
    embedding="token_embd.weight",
    output_norm="output_norm.weight",
    head="output.weight",
    more=MappingProxyType(
        {
            "q_bias": "blk.{}.attn_q.bias",
            "k_bias": "blk.{}.attn_k.bias",
            "v_bias": "blk.{}.attn_v.bias",
            "q_norm": "blk.{}.attn_q_norm.weight",
            "k_norm": "blk.{}.attn_k_norm.weight",
            "post_attn_norm": "blk.{}.post_attention_norm.weight",
            "post_ffn_norm": "blk.{}.post_ffw_norm.weight",
            "qkv": "blk.{}.attn_qkv.weight",
            "gate_up": "blk.{}.ffn_up.weight",
            "router": "blk.{}.ffn_gate_inp.weight",
            "expert_gate": "blk.{}.ffn_gate_exps.weight",
            "expert_up": "blk.{}.ffn_up_exps.weight",
            "expert_down": "blk.{}.ffn_down_exps.weight",
        }
    ),
    has_stacked_experts=True,
)

HUGGING_FACE_NAMES = TensorNames(
    block=BlockNames(
        attn_norm="model.layers.{}.input_layernorm.weight",
        q="model.layers.{}.self_attn.q_proj.weight",
        k="model.layers.{}.self_attn.k_proj.weight",
        v="model.layers.{}.self_attn.v_proj.weight",
        o="model.layers.{}.self_attn.o_proj.weight",
        ffn_norm="model.layers.{}.post_attention_layernorm.weight",
        gate="model.layers.{}.mlp.gate_proj.weight",
        up="model.layers.{}.mlp.up_proj.weight",
        down="model.layers.{}.mlp.down_proj.weight",
    ),
    block_prefix="model.layers.",
    embedding="model.embed_tokens.weight",
    output_norm="model.norm.weight",
    head="lm_head.weight",
    more=MappingProxyType(
        {
            "q_bias": "model.layers.{}.self_attn.q_proj.bias",
            "k_bias": "model.layers.{}.self_attn.k_proj.bias",
            "v_bias": "model.layers.{}.self_attn.v_proj.bias",
            "q_norm": "model.layers.{}.self_attn.q_norm.weight",
            "k_norm": "model.layers.{}.self_attn.k_norm.weight",
            "post_attn_norm": "model.layers.{}.post_attention_layernorm.weight",
            "post_ffn_norm": "model.layers.{}.post_feedforward_layernorm.weight",
            "qkv": "model.layers.{}.self_attn.qkv_proj.weight",
            "gate_up": "model.layers.{}.mlp.gate_up_proj.weight",
            "router": "model.layers.{}.mlp.gate.weight",
            "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
            "expert_up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
            "expert_down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
        }
    ),
)

_ROTARY_BUFFER = (
    ".self_attn.rotary_emb.inv_freq"  # old exports store it; it follows from the config
)


def gguf_names(config: ModelConfig) -> TensorNames:
    """What a GGUF file calls this model's tensors."""
    return replace(GGUF_NAMES, is_fused=config.architecture == "phi3")


def hugging_face_names(config: ModelConfig) -> TensorNames:
    """What a safetensors file calls this model's tensors."""
    names = replace(HUGGING_FACE_NAMES, is_fused=config.architecture == "phi3")
    if config.architecture == "gemma3":
        # Its norms multiply by 1 + weight; llama.cpp's converter adds the 1.
        ffn_norm = "model.layers.{}.pre_feedforward_layernorm.weight"
        names = replace(names, block=replace(names.block, ffn_norm=ffn_norm), norm_offset=1.0)
    return names


def expert_field(name: str, expert_idx: int) -> str:
    """The field of one expert's matrix in `block_parts`: "gate.0" and so on."""
    return f"{name}.{expert_idx}"


@dataclass(frozen=True, slots=True)
class Part:
    """Where one field of a block lies: a whole tensor, or rows of it.

    `rows` count in the tensor seen as a matrix: one of [n_experts, rows, columns] has
    n_experts * rows of them.
    """

    name: str
    tensor_shape: tuple[int, ...]
    rows: tuple[int, int]
    offset: float = 0.0  # see TensorSlice

    def resolve(self, source: TensorSource) -> TensorSlice:
        """The slice in a file that was held against the configuration."""
        return TensorSlice.of(source.tensors[self.name], *self.rows, offset=self.offset)


def block_parts(names: TensorNames, config: ModelConfig, block_idx: int) -> dict[str, Part]:
    """Field -> where it lies, in the order in which a block is hashed and packed."""

    def named(name: str) -> str:
        return (names.more.get(name) or getattr(names.block, name)).format(block_idx)

    def whole(name: str, *shape: int) -> Part:
        is_norm = name.endswith("_norm")
        return Part(named(name), shape, (0, shape[0]), names.norm_offset if is_norm else 0.0)

    hidden, head = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.n_heads * head, config.n_kv_heads * head
    qkv_rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    parts = {"attn_norm": whole("attn_norm", hidden)}
    if names.is_fused:
        parts |= _fused(named("qkv"), qkv_rows, hidden)
    else:
        parts |= {name: whole(name, rows, hidden) for name, rows in qkv_rows.items()}
    if config.has_qkv_bias:
        parts |= {f"{name}_bias": whole(f"{name}_bias", rows) for name, rows in qkv_rows.items()}
    if config.has_qk_norm:
        parts |= {name: whole(name, head) for name in ("q_norm", "k_norm")}
    parts["o"] = whole("o", hidden, q_rows)
    if config.has_post_norms:
        parts["post_attn_norm"] = whole("post_attn_norm", hidden)
    parts["ffn_norm"] = whole("ffn_norm", hidden)
    inner = config.intermediate_size
    if config.n_experts:
        parts["router"] = whole("router", config.n_experts, hidden)
        parts |= _experts(names, config, block_idx)
    elif names.is_fused:
        parts |= _fused(named("gate_up"), {"gate": inner, "up": inner}, hidden)
        parts["down"] = whole("down", hidden, inner)
    else:
        parts |= {name: whole(name, inner, hidden) for name in ("gate", "up")}
        parts["down"] = whole("down", hidden, inner)
    if config.has_post_norms:
        parts["post_ffn_norm"] = whole("post_ffn_norm", hidden)
    return parts


def _fused(name: str, rows: Mapping[str, int], columns: int) -> dict[str, Part]:
    """Matrices below each other in one tensor."""
    shape = (sum(rows.values()), columns)
    parts, start = {}, 0
    for part, n_rows in rows.items():
        parts[part] = Part(name, shape, (start, start + n_rows))
        start += n_rows
    return parts


def _experts(names: TensorNames, config: ModelConfig, block_idx: int) -> dict[str, Part]:
    n_experts, hidden, inner = config.n_experts, config.hidden_size, config.intermediate_size
    parts = {}
    for name, shape in (
        ("gate", (inner, hidden)),
        ("up", (inner, hidden)),
        ("down", (hidden, inner)),
    ):
        template = names.more[f"expert_{name}"]
        for expert in range(n_experts):
            if names.has_stacked_experts:
                rows = (expert * shape[0], (expert + 1) * shape[0])
                part = Part(template.format(block_idx), (n_experts, *shape), rows)
            else:
                part = Part(template.format(block_idx, expert), shape, (0, shape[0]))
            parts[expert_field(name, expert)] = part
    return parts


def check(source: TensorSource, names: TensorNames, config: ModelConfig) -> None:
    """Hold every tensor against the configuration; reads no weights.

    Raises:
        CorruptModel: a tensor is missing or has another shape.
        UnsupportedModel: a block has tensors (biases, experts, ...) that would be ignored.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in _expected_shapes(names, config):
        if name not in expected:
            _check_shape(source, name, shape)
            expected[name] = shape
    for name in source.tensors:
        is_ours = name in expected or not name.startswith(names.block_prefix)
        if not is_ours and not name.endswith(_ROTARY_BUFFER):
            raise UnsupportedModel(
                f"tensor {name!r} in {config.architecture}", _examples(names, config)
            )


def _examples(names: TensorNames, config: ModelConfig) -> Iterable[str]:
    """The tensor names of the first block, and of its first expert."""
    one = replace(
        config, n_experts=min(config.n_experts, 1), n_experts_used=min(config.n_experts, 1)
    )
    return dict.fromkeys(part.name for part in block_parts(names, one, 0).values())


def _check_shape(source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    info = source.tensors.get(name)
    if info is None:
        raise CorruptModel(source.path, name, f"expected a tensor of shape {shape}")
    if info.shape != shape:
        raise CorruptModel(source.path, name, f"expected shape {shape}, found {info.shape}")


def _expected_shapes(
    names: TensorNames, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for block_idx in range(config.n_blocks):
        for part in block_parts(names, config, block_idx).values():
            yield part.name, part.tensor_shape
    yield names.embedding, (config.vocab_size, config.hidden_size)
    yield names.output_norm, (config.hidden_size,)
    if not config.tied_embeddings:
        yield names.head, (config.vocab_size, config.hidden_size)
