"""The real model, and transformers as the oracle; each is loaded once for all numeric tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from covey.node.model.checkpoint import Checkpoint, open_checkpoint
from covey.node.model.errors import ModelNotFound
from covey.node.model.resolve import resolve_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return resolve_model("smollm2")
    except ModelNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with open_checkpoint(smollm2, cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture(scope="session")
def oracle_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="session")
def oracle_model(smollm2: Path) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # What from_pretrained(gguf_file=...) does, without its need of the accelerate package.
    values = load_gguf_checkpoint(str(smollm2))["config"]
    model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.float32).eval()
    loaded = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert missing == ["lm_head.weight"]  # tied to the embedding
    assert not unexpected
    model.tie_weights()
    model.generation_config.eos_token_id = None  # greedy to the end, whatever it says
    return model
