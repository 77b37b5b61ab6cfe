"""The models on this machine, and what others are told of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from covey.node.catalog import Catalog, LocalModel, open_model
from covey.node.engine.head import load_head
from covey.node.engine.torch_stage import load_stage
from covey.node.engines import Engines
from covey.node.errors import UnknownModel
from covey.node.model.checkpoint import open_checkpoint
from support.tiny_models import TINY, write_tiny_gguf


@pytest.fixture
def models(tmp_path: Path) -> Iterator[list[LocalModel]]:
    untied = replace(TINY, tied_embeddings=False)
    with (
        open_checkpoint(write_tiny_gguf(tmp_path / "a.gguf"), cache_dir=tmp_path) as first,
        open_checkpoint(write_tiny_gguf(tmp_path / "b.gguf", untied, 1), cache_dir=tmp_path) as two,
    ):
        yield [LocalModel("barn", first, Engines("fp32")), LocalModel("owl", two, Engines("fp32"))]


def test_models_are_found_by_name_digest_and_its_beginning(models: list[LocalModel]) -> None:
    catalog = Catalog(models)
    for model in models:
        assert catalog.by_name(model.name) is model
        assert catalog.by_name(model.digest) is model
        assert catalog.by_name(model.digest[:8]) is model
        assert catalog.by_digest(model.digest) is model
    assert list(catalog) == models


def test_an_unknown_name_lists_the_known_ones(models: list[LocalModel]) -> None:
    for name in ("", "cow", models[0].digest[:7], "/etc/passwd"):
        with pytest.raises(UnknownModel) as caught:
            Catalog(models).by_name(name)
        assert caught.value.known == ("barn", "owl")
    assert Catalog(models).by_digest("00" * 32) is None


def test_the_layout_is_what_the_engine_takes(models: list[LocalModel]) -> None:
    for model in models:
        stage, head = load_stage(model.checkpoint, (1, 3)), load_head(model.checkpoint)
        layout = model.layout
        assert sum(layout.block_bytes[1:3]) == stage.weight_bytes
        assert 2 * layout.kv_bytes_per_token_per_block == stage.kv_bytes_per_token
        norm_bytes = TINY.hidden_size * 4
        assert layout.embedding_bytes + layout.head_bytes + norm_bytes == head.weight_bytes
        assert layout.wire_bytes_per_token == TINY.hidden_size * 4


def test_groups_are_for_engines_with_hidden_states_in_fp32(models: list[LocalModel]) -> None:
    model = models[0]
    assert model.layout.can_split
    assert (model.layout.n_kv_heads, model.layout.mlp_columns) == (2, 64)
    assert not LocalModel("calf", model.checkpoint, Engines("bf16")).layout.can_split


def test_a_model_is_never_called_by_a_path(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "secret-folder-name.gguf")
    model = open_model(str(path), Engines("fp32"))
    assert model.name == "secret-folder-name"
    assert str(tmp_path) not in str(model.manifest().to_value())
