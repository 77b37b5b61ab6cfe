"""From text, conversation or ids to tokens, and what is wrong with each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from covey.node.errors import InvalidRequest
from covey.node.model.checkpoint import open_checkpoint
from covey.node.model.errors import InvalidParams
from covey.node.model.tokenizer import Tokenizer
from covey.node.prompt import RESERVED, chat_tokens, prompt_tokens
from support.tiny_models import write_tiny_gguf

HELLO = [{"role": "user", "content": "the"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tiny")
    with open_checkpoint(write_tiny_gguf(folder / "tiny.gguf"), cache_dir=folder) as checkpoint:
        return checkpoint.tokenizer()


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(dataclasses.replace(tokenizer._parts, chat_template=template))


def test_a_conversation_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokens(tokenizer, HELLO) == tokenizer.encode(text)


def test_a_template_sees_the_parameters_of_the_request(tokenizer: Tokenizer) -> None:
    shouting = with_template(tokenizer, "{{ 'the' if polite else 'THE' }}")
    assert chat_tokens(shouting, HELLO, {"polite": True}) == tokenizer.encode("the")
    assert chat_tokens(shouting, HELLO) == tokenizer.encode("THE")


def refused(tokenizer: Tokenizer, messages: Any, kwargs: Any = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat_tokens(tokenizer, messages, kwargs)
    return caught.value


def test_without_a_template_there_is_no_chat(tokenizer: Tokenizer) -> None:
    assert refused(with_template(tokenizer, None), HELLO).field == "messages"


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[7].content }}", ""],
)
def test_a_template_that_fails_or_says_nothing_blames_the_messages(
    tokenizer: Tokenizer, template: str
) -> None:
    assert refused(with_template(tokenizer, template), HELLO).field == "messages"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_what_the_node_sets_cannot_be_set_from_outside(tokenizer: Tokenizer, name: str) -> None:
    error = refused(tokenizer, HELLO, {name: "x"})
    assert error.field == "chat_template_kwargs"
    assert name in str(error)


def test_text_begins_as_the_model_wants_it(tokenizer: Tokenizer) -> None:
    assert prompt_tokens(tokenizer, "the") == tokenizer.encode("the", add_special=True)


def test_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    assert prompt_tokens(tokenizer, (0, last, 0)) == [0, last, 0]


@pytest.mark.parametrize("ids", [(-1,), (1, 1 << 40), ()])
def test_ids_that_the_vocabulary_does_not_have_are_refused(
    tokenizer: Tokenizer, ids: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_tokens(tokenizer, ids)
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest):
        prompt_tokens(tokenizer, (tokenizer.vocab_size,))


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParams):
        prompt_tokens(tokenizer, "\ud800")
