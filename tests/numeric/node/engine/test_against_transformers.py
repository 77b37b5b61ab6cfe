"""Logits of the torch stage against transformers: the real model, and tiny ones of every shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from covey.node.engine.head import load_head
from covey.node.engine.torch_stage import load_stage
from covey.node.model.checkpoint import Checkpoint, open_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time there was a small bird that could not fly, because",
]
N_TOKENS = 64
# Seen: 7e-5 to 1.2e-4 (research/engine.md, 5); another order of sums may give ten times that.
TOLERANCE = 1e-3


@torch.inference_mode()
def greedy_logits(model: Any, ids: list[int], n_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Prompt plus greedy tokens, and the logits [len, V] of all of them, by transformers."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
    )[0]
    return out.tolist(), model(out[None]).logits[0]


@pytest.mark.lab  # tiny models of the same shape are below
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_of_64_greedy_tokens(
    prompt: str, checkpoint: Checkpoint, oracle_model: Any, stages: Any
) -> None:
    stage, head = stages
    ids = checkpoint.tokenizer().encode(prompt)
    tokens, expected = greedy_logits(oracle_model, ids, N_TOKENS)
    stage.open_session(prompt, len(tokens))
    hidden = [stage.forward(prompt, 0, head.embed(tokens[: len(ids)]))]
    hidden += [
        stage.forward(prompt, position, head.embed([tokens[position]]))
        for position in range(len(ids), len(tokens))
    ]
    logits = head.logits(np.concatenate(hidden))
    stage.close_session(prompt)
    assert np.abs(logits - expected.numpy()).max() < TOLERANCE
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == tokens[len(ids) :]


@pytest.fixture(scope="module")
def stages(checkpoint: Checkpoint) -> tuple[Any, Any]:
    return load_stage(checkpoint, (0, 30)), load_head(checkpoint)


BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 20},
    "other constants": {"rms_norm_eps": 1e-3, "rope_theta": 500.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "head_dim": 32,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def tiny(folder: Path, changes: dict[str, Any], shard_size: str = "1GB") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(BASE | changes))).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def our_logits(folder: Path, ids: list[int], chunk: int) -> np.ndarray[Any, Any]:
    with open_checkpoint(folder, cache_dir=folder / "cache") as checkpoint:
        stage, head = load_stage(checkpoint, (0, 3)), load_head(checkpoint)
    stage.open_session("s", len(ids))
    hidden = [
        stage.forward("s", at, head.embed(ids[at : at + chunk])) for at in range(0, len(ids), chunk)
    ]
    return head.logits(np.concatenate(hidden))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_tiny_safetensors_models(tmp_path: Path, changes: dict[str, Any], chunk: int) -> None:
    model = tiny(tmp_path, changes)
    ids = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0].numpy()
    assert np.abs(our_logits(tmp_path, ids.tolist(), chunk) - expected).max() < 1e-4


def test_rope_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    tiny(tmp_path, {"rope_theta": 777.0})
    ids = list(range(40))
    expected = our_logits(tmp_path, ids, 40)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 777.0, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.array_equal(our_logits(tmp_path, ids, 40), expected)


def test_sharded_folder_is_the_same_model(tmp_path: Path) -> None:
    tiny(tmp_path / "one", {})
    tiny(tmp_path / "many", {}, shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = list(range(50))
    one, many = (our_logits(tmp_path / name, ids, 50) for name in ("one", "many"))
    assert np.array_equal(one, many)
    digests = []
    for name in ("one", "many"):
        with open_checkpoint(tmp_path / name, cache_dir=tmp_path) as checkpoint:
            digests.append(checkpoint.digest)
    assert digests[0] == digests[1]
