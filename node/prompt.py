"""From what a person wrote to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidRequest
from .model.chat_template import ChatTemplateError, render_chat
from .model.tokenizer import Tokenizer

#: Parameters of `render_chat` that no request may set.
RESERVED = frozenset(
    {
        "template",
        "messages",
        "add_generation_prompt",
        "bos",
        "eos",
        "bos_token",
        "eos_token",
        "now",
        "strftime_now",
    }
)

Messages = Sequence[Mapping[str, Any]]


def chat_tokens(
    tokenizer: Tokenizer, messages: Messages, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins.

    Raises:
        InvalidRequest: the model has no chat template, or its template refuses the messages or
            makes nothing of them.
    """
    if tokenizer.chat_template is None:
        raise InvalidRequest("messages", "this model has no chat template; use a plain prompt")
    if taken := sorted(RESERVED.intersection(template_kwargs or {})):
        raise InvalidRequest("chat_template_kwargs", f"{taken[0]} cannot be set from outside")
    try:
        text = render_chat(
            tokenizer.chat_template,
            messages,
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
            **(template_kwargs or {}),
        )
    except ChatTemplateError as error:
        raise InvalidRequest("messages", str(error)) from error
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InvalidRequest("messages", "make an empty prompt: there is nothing to go on from")
    return tokens


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a text to go on from, or ids that are checked.

    Raises:
        InvalidRequest: nothing to go on from, or ids that the vocabulary does not have.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, add_special=True)
    else:
        tokens = list(prompt)
        if any(not 0 <= token < tokenizer.vocab_size for token in tokens):
            raise InvalidRequest("prompt", f"token ids are 0 to {tokenizer.vocab_size - 1}")
    if not tokens:
        raise InvalidRequest("prompt", "is empty: there is nothing to go on from")
    return tokens
