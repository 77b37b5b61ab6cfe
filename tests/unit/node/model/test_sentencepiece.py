"""SentencePiece vocabularies from GGUF: merging by score, bytes, spaces, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from covey.node.model.errors import CorruptModel
from covey.node.model.sentencepiece import MAX_PIECE_CHARS, find_merges, piece_bytes
from covey.node.model.tokenizer import Tokenizer
from covey.node.model.tokenizer_spec import build_tokenizer
from support.tiny_sentencepiece import GIVEN, SPECIALS, sentencepiece_spec

HERE = Path("tiny.gguf")
TOKENS = sentencepiece_spec()["tokenizer.ggml.tokens"]


def build(**changes: Any) -> Tokenizer:
    return build_tokenizer(HERE, sentencepiece_spec(**changes))


LLAMA, GEMMA = build(), build(add_space_prefix=False)


def written(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[i] for i in tokenizer.encode(text)]


def test_a_text_begins_with_a_space_unless_the_file_says_no() -> None:
    assert written(LLAMA, "the") == ["▁the"]
    assert written(GEMMA, " the") == ["▁the"]
    assert "▁the" not in written(GEMMA, "the")
    assert LLAMA.decode(LLAMA.encode("the")) == " the"
    assert LLAMA.encode("") == []


def test_the_best_score_is_merged_first() -> None:
    tokens, scores = ["a", "b", "c", "ab", "bc", "abc"], [0.0, 0.0, 0.0, -2.0, -1.0, -3.0]
    merges = find_merges(tokens, scores, set(range(6)))
    assert merges == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


def test_what_the_vocabulary_lacks_is_bytes() -> None:
    assert written(GEMMA, "漢") == ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert GEMMA.decode(GEMMA.encode("漢🦜")) == "漢🦜"


def test_the_text_of_a_byte_token_is_no_byte() -> None:
    assert TOKENS.index("<0x41>") not in GEMMA.encode("<0x41>")
    assert GEMMA.decode(GEMMA.encode("<0x41>")) == "<0x41>"


def test_specials_are_parsed_and_not_shown() -> None:
    ids = GEMMA.encode("<|user|>the")
    assert ids[0] == SPECIALS.index("<|user|>")
    assert GEMMA.decode(ids) == "the"
    assert 3 not in GEMMA.encode("<|user|>", parse_special=False)
    assert GEMMA.decode(GEMMA.encode("<|user|>", parse_special=False)) == "<|user|>"


def test_given_tokens_are_matched_first_and_shown() -> None:
    assert written(GEMMA, "<b>the")[0] == GIVEN
    assert GEMMA.decode(GEMMA.encode("<b>the")) == "<b>the"


def test_bos_is_added_unless_the_file_says_no() -> None:
    assert LLAMA.encode("the", add_special=True) == [1, *LLAMA.encode("the")]
    assert build(add_bos_token=False).encode("the", add_special=True) == LLAMA.encode("the")
    assert LLAMA.eos_ids == {2}


def test_pieces() -> None:
    assert piece_bytes("<0x0a>") == b"\n"
    assert piece_bytes("▁a▁") == b" a "
    assert piece_bytes("<0x100>") == b"<0x100>"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"scores": None}, "scores"),
        ({"scores": [0.0]}, "scores"),
        ({"scores": [float("nan")] * len(TOKENS)}, "scores"),
        ({"scores": ["x"] * len(TOKENS)}, "scores"),
        ({"tokens": [*TOKENS[:-2], "x" * (MAX_PIECE_CHARS + 1), GIVEN]}, "tokens"),
        ({"tokens": [*TOKENS[:-1], TOKENS[-2]]}, "tokens"),
        ({"token_type": [1]}, "tokens"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
    ],
)
def test_a_vocabulary_that_contradicts_itself(change: dict[str, Any], key: str) -> None:
    with pytest.raises(CorruptModel) as caught:
        build(**change)
    assert caught.value.where == f"tokenizer.ggml.{key}"
