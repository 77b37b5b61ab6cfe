"""The tokenizer on the tiny vocabulary: specials, streaming, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covey.node.model.errors import CorruptModel, InvalidParams, ModelNotFound, UnsupportedModel
from covey.node.model.tokenizer import Tokenizer
from covey.node.model.tokenizer_spec import PRE_TOKENIZERS, build_tokenizer, folder_spec
from support.tiny_models import SPECIALS, VOCABULARY, tiny_metadata

HERE = Path("tiny.gguf")
END, START, TURN = range(len(SPECIALS))


def build(**changes: Any) -> Tokenizer:
    spec = {k: v for k, v in tiny_metadata().items() if k.startswith("tokenizer.")}
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return build_tokenizer(HERE, {"format": "gguf"} | spec | changed)


TOKENIZER = build()


def test_words_are_merged() -> None:
    assert TOKENIZER.encode("the") == [VOCABULARY.index("the")]


def test_special_text_becomes_the_special_token() -> None:
    the = VOCABULARY.index("the")
    assert TOKENIZER.encode("<|im_start|>the<|im_end|>") == [START, the, TURN]


def test_special_text_stays_text_when_asked() -> None:
    ids = TOKENIZER.encode("<|im_end|>", parse_special=False)
    assert TURN not in ids
    assert TOKENIZER.decode(ids) == "<|im_end|>"


def test_special_tokens_are_not_decoded() -> None:
    assert TOKENIZER.decode([START, VOCABULARY.index("the"), TURN]) == "the"


def test_end_tokens_are_the_named_one_and_the_known_ones() -> None:
    assert TOKENIZER.eos_ids == {END, TURN}


def test_bos_is_added_only_where_the_model_wants_it() -> None:
    assert TOKENIZER.encode("the", add_special=True) == TOKENIZER.encode("the")
    wanting = build(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
    assert wanting.encode("the", add_special=True) == [START, VOCABULARY.index("the"), TURN]


def test_bos_and_eos_have_their_text_for_templates() -> None:
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_stream_holds_back_half_a_character() -> None:
    stream = TOKENIZER.stream()
    ids = TOKENIZER.encode("é")
    assert [stream.push(token) for token in ids] == ["", "é"]
    assert stream.flush() == ""


def test_broken_off_character_comes_with_the_flush() -> None:
    stream = TOKENIZER.stream()
    assert stream.push(TOKENIZER.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_padding_ids_beyond_the_vocabulary_are_silent() -> None:
    assert TOKENIZER.decode([TOKENIZER.vocab_size + 5]) == ""


def test_negative_id_is_refused() -> None:
    with pytest.raises(InvalidParams):
        TOKENIZER.decode([-1])


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidParams, match="valid Unicode"):
        TOKENIZER.encode("a\ud800")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_builds_and_loses_nothing(pre: str) -> None:
    text = "The 1234 Häuser's\r\n\n  \t def f(x):\n    return 'a' 世界 🦜"
    tokenizer = build(tokenizer__ggml__pre=pre)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (
            {"tokenizer__ggml__model": "bert"},
            r"tokenizer model 'bert'; supported: gpt2 \(byte-level BPE\), llama",
        ),
        ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokenizer__ggml__pre": 3}, "pre-tokenizer 3"),
    ],
)
def test_unknown_kinds_are_refused_by_name(change: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedModel, match=feature):
        build(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer__ggml__tokens": None},
        {"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]},
        {"tokenizer__ggml__token_type": [1]},
        {"tokenizer__ggml__token_type": 1},
        {"tokenizer__ggml__merges": ["nospace"]},
        {"tokenizer__ggml__merges": ["not there"]},
        {"tokenizer__ggml__merges": "text"},
        {"tokenizer__ggml__eos_token_id": 10**6},
        {"tokenizer__ggml__eos_token_id": "2"},
        {"tokenizer__chat_template": 5},
    ],
)
def test_contradictions_are_corrupt(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptModel):
        build(**change)


def test_a_model_without_a_tokenizer_says_so() -> None:
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        build_tokenizer(HERE, {})


def library_file(**changes: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": []},
    } | changes


def test_vocabulary_with_gaps_is_read_by_id() -> None:
    spec = {"format": "tokenizer.json", "tokenizer": library_file()}
    tokenizer = build_tokenizer(HERE, spec)
    assert tokenizer.encode("ab") == [0, 7]
    assert tokenizer.decode([7, 3, 0]) == "ba"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"decoder": {"type": "Metaspace"}}, UnsupportedModel),
        ({"decoder": None}, UnsupportedModel),
        ({"model": {"type": "nothing"}}, CorruptModel),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, CorruptModel),
        ({"model": {"type": "BPE", "vocab": {}, "merges": ["x y"]}}, CorruptModel),
    ],
)
def test_broken_or_foreign_library_files_are_refused(
    changes: dict[str, Any], error: type[Exception]
) -> None:
    spec = {"format": "tokenizer.json", "tokenizer": library_file(**changes)}
    with pytest.raises(error):
        build_tokenizer(HERE, spec)


def test_template_file_that_is_not_text_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CorruptModel, match="expected UTF-8"):
        folder_spec(tmp_path)
