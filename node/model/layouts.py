"""How each file format names what a Llama-type decoder needs: configuration and tensors.

Two layouts, GGUF and Hugging Face. Both end in the same `ModelConfig` and `TensorNames`; `check`
then holds every tensor's shape against the configuration, so that a stage can trust them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, llama3_rope_factors
from .errors import CorruptModel, UnsupportedModel
from .gguf import GgufFile
from .tensor_source import TensorSource, to_float32


@dataclass(frozen=True, slots=True)
class BlockNames:
    """The tensor names of one block, with `{}` for its index."""

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
    """What the tensors of a model are called in its file."""

    block: BlockNames
    block_prefix: str
    embedding: str
    output_norm: str
    head: str


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
)

_ROPE_FREQS = "rope_freqs.weight"
_ROTARY_BUFFER = (
    ".self_attn.rotary_emb.inv_freq"  # old exports store it; it follows from the config
)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The configuration that a GGUF file declares.

    Raises:
        CorruptModel: a key is missing or has the wrong type.
        UnsupportedModel: an architecture or feature that the engine does not compute.
        ModelError: a value out of its limits.
    """
    keys = _Keys(file.path, file.metadata)
    architecture = keys.text("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(f"architecture {architecture!r}", ("llama",))
    if keys.number("llama.expert_count", 0):
        raise UnsupportedModel("mixture of experts in 'llama'", ("dense llama",))
    hidden_size = keys.number("llama.embedding_length")
    n_heads = keys.number("llama.attention.head_count")
    head_dim = keys.number("llama.attention.key_length", hidden_size // max(n_heads, 1))
    if keys.number("llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel("values of another width than keys", ("equal widths",))
    rope_dim = keys.number("llama.rope.dimension_count", head_dim)
    embedding = file.tensors.get(GGUF_NAMES.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise CorruptModel(file.path, GGUF_NAMES.embedding, "expected a matrix of embeddings")
    return ModelConfig(
        architecture=architecture,
        n_blocks=keys.number("llama.block_count"),
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=keys.number("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        intermediate_size=keys.number("llama.feed_forward_length"),
        vocab_size=embedding.shape[0],
        context_length=keys.number("llama.context_length"),
        rope_theta=keys.real("llama.rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_interleaved=True,  # llama.cpp's converter permutes q and k for it
        rms_norm_eps=keys.real("llama.attention.layer_norm_rms_epsilon"),
        tied_embeddings=GGUF_NAMES.head not in file.tensors,
        rope_factors=_gguf_rope_factors(file, keys, rope_dim),
    )


def _gguf_rope_factors(file: GgufFile, keys: _Keys, rope_dim: int) -> tuple[float, ...]:
    kind = keys.text("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedModel(f"rope scaling {kind!r}", ("none", "linear", "llama3"))
    stretch = keys.real("llama.rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    if _ROPE_FREQS in file.tensors:
        info = file.tensors[_ROPE_FREQS]
        if info.type != "F32" or info.shape != (rope_dim // 2,):
            raise CorruptModel(file.path, _ROPE_FREQS, f"expected {rope_dim // 2} F32 factors")
        return tuple(float(f) * stretch for f in to_float32(info, file.raw(_ROPE_FREQS)))
    return (stretch,) * (rope_dim // 2) if stretch != 1.0 else ()


def hugging_face_config(path: Path, config: Mapping[str, Any], source: TensorSource) -> ModelConfig:
    """The configuration that a `config.json` declares; raises as `gguf_config` does."""
    keys = _Keys(path, config)
    architecture = keys.text("model_type")
    if architecture != "llama":
        raise UnsupportedModel(f"architecture {architecture!r}", ("llama",))
    for feature in ("attention_bias", "mlp_bias", "quantization_config", "sliding_window"):
        if config.get(feature):
            raise UnsupportedModel(f"{feature} in config.json", ("llama without it",))
    activation = keys.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"activation {activation!r}", ("silu",))
    hidden_size = keys.number("hidden_size")
    n_heads = keys.number("num_attention_heads")
    head_dim = keys.number("head_dim", hidden_size // max(n_heads, 1))
    tied = config.get("tie_word_embeddings", False) is True
    if not tied and HUGGING_FACE_NAMES.head not in source.tensors:
        raise CorruptModel(path, HUGGING_FACE_NAMES.head, "expected it, as the head is not tied")
    theta, factors = _hugging_face_rope(path, config, head_dim)
    return ModelConfig(
        architecture=architecture,
        n_blocks=keys.number("num_hidden_layers"),
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=keys.number("num_key_value_heads", n_heads),
        head_dim=head_dim,
        intermediate_size=keys.number("intermediate_size"),
        vocab_size=keys.number("vocab_size"),
        context_length=keys.number("max_position_embeddings"),
        rope_theta=theta,
        rope_dim=head_dim,
        rope_interleaved=False,
        rms_norm_eps=keys.real("rms_norm_eps"),
        tied_embeddings=tied,
        rope_factors=factors,
    )


def _hugging_face_rope(
    path: Path, config: Mapping[str, Any], head_dim: int
) -> tuple[float, tuple[float, ...]]:
    # transformers 5 writes everything under rope_parameters, 4 writes rope_theta + rope_scaling.
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise CorruptModel(path, key, "expected an object")
        merged |= value
    keys = _Keys(path, merged)
    theta = keys.real("rope_theta", _Keys(path, config).real("rope_theta", 10000.0))
    kind = keys.text("rope_type", keys.text("type", "default"))
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (keys.real("factor"),) * (head_dim // 2)
    if kind != "llama3":
        raise UnsupportedModel(f"rope scaling {kind!r}", ("default", "linear", "llama3"))
    low, high = keys.real("low_freq_factor"), keys.real("high_freq_factor")
    if not 0 < low < high or theta <= 0:
        raise CorruptModel(path, "rope_scaling", "expected 0 < low_freq_factor < high_freq_factor")
    return theta, llama3_rope_factors(
        theta=theta,
        rope_dim=head_dim,
        factor=keys.real("factor"),
        low=low,
        high=high,
        original_context=keys.number("original_max_position_embeddings"),
    )


def check(source: TensorSource, names: TensorNames, config: ModelConfig) -> None:
    """Hold every tensor against the configuration; reads no weights.

    Raises:
        CorruptModel: a tensor is missing or has another shape.
        UnsupportedModel: a block has tensors (biases, experts, ...) that would be ignored.
    """
    known = set()
    for name, shape in _expected_shapes(names, config):
        known.add(name)
        info = source.tensors.get(name)
        if info is None:
            raise CorruptModel(source.path, name, f"expected a tensor of shape {shape}")
        if info.shape != shape:
            raise CorruptModel(source.path, name, f"expected shape {shape}, found {info.shape}")
    for name in source.tensors:
        is_ours = name in known or not name.startswith(names.block_prefix)
        if not is_ours and not name.endswith(_ROTARY_BUFFER):
            raise UnsupportedModel(f"tensor {name!r}", names.block.at(0).values())


def _expected_shapes(
    names: TensorNames, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_rows, hidden),
        "k": (kv_rows, hidden),
        "v": (kv_rows, hidden),
        "o": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    for block_idx in range(config.n_blocks):
        for field, name in names.block.at(block_idx).items():
            yield name, shapes[field]
    yield names.embedding, (config.vocab_size, hidden)
    yield names.output_norm, (hidden,)
    if not config.tied_embeddings:
        yield names.head, (config.vocab_size, hidden)


class _Keys:
    """Typed access to metadata that came from a file."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = values

    def number(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int:
            raise CorruptModel(self._path, key, f"expected a whole number, found {_brief(value)}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise CorruptModel(self._path, key, f"expected a number, found {_brief(value)}")
        try:
            return float(value)
        except OverflowError as error:
            raise CorruptModel(self._path, key, "expected a number that fits a float") from error

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise CorruptModel(self._path, key, f"expected a string, found {_brief(value)}")
        return value

    def _get(self, key: str, default: object) -> Any:
        value = self._values.get(key)  # null in JSON means the default, as in transformers
        if value is None and default is None:
            raise CorruptModel(self._path, key, "expected this key")
        return default if value is None else value


def _brief(value: object) -> str:
    return "an array" if isinstance(value, (list, tuple, np.ndarray)) else repr(value)
