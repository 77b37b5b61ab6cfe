"""Text to token ids and back, for one model; knows no weights.

The byte-pair merging is the `tokenizers` library's. Decoding is ours, over bytes, because a
stream of tokens can end in the middle of a character. A `Tokenizer` is immutable; a
`StreamDecoder` belongs to one generation.

Special tokens: with `parse_special` (the default, as in transformers and llama.cpp) text such as
`<|im_end|>` becomes the special token, also where it stands in a user's message. So a user can
end their own turn early; a caller that must not allow it encodes such text with
`parse_special=False`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers as hf

from .errors import InvalidParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a `Tokenizer` is made of; `tokenizer_spec.py` reads it from a model's files."""

    library: hf.Tokenizer  # the merging, with special tokens parsed
    pieces: tuple[bytes, ...]  # what each id adds to the text; b"" for special tokens
    bos_id: int | None
    eos_ids: frozenset[int]
    chat_template: str | None
    prefix: tuple[int, ...]  # what add_special puts before
    suffix: tuple[int, ...]  # ... and after
    bos_token: str
    eos_token: str


class Tokenizer:
    """Encodes and decodes for one model; safe to share between threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts

    @cached_property
    def _plain(self) -> hf.Tokenizer:
        plain = hf.Tokenizer.from_str(self._parts.library.to_str())
        plain.encode_special_tokens = True  # the library's name for "as ordinary text"
        return plain

    @property
    def vocab_size(self) -> int:
        """How many ids there are; the head may have more rows than that."""
        return len(self._parts.pieces)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if the model has one."""
        return self._parts.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation: end of text, of turn, of message."""
        return self._parts.eos_ids

    @property
    def chat_template(self) -> str | None:
        """Jinja source that turns messages into a prompt, for `render_chat`."""
        return self._parts.chat_template

    @property
    def bos_token(self) -> str:
        """The text of `bos_id`, which chat templates write; empty if there is none."""
        return self._parts.bos_token

    @property
    def eos_token(self) -> str:
        """The text of the main end token, which chat templates write; empty if there is none."""
        return self._parts.eos_token

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: anything that is valid Unicode.
            add_special: put the model's begin (and end) tokens around it. Not for the output of
                `render_chat`: chat templates write them themselves.
            parse_special: read `<|im_end|>` and its like as the special token; see the module.

        Raises:
            InvalidParams: lone surrogates, which no encoding of text holds.
        """
        library = self._parts.library if parse_special else self._plain
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidParams("text", text, "valid Unicode, without lone surrogates") from error
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return [*self._parts.prefix, *ids, *self._parts.suffix] if add_special else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.piece(token) for token in ids).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """The bytes that one token adds to a text; none for a special one or an unused id."""
        if token < 0:
            raise InvalidParams("token", token, "0 or above")
        # Heads are often padded to a round number of rows beyond the vocabulary.
        return self._parts.pieces[token] if token < len(self._parts.pieces) else b""

    def token_text(self, token: int) -> str:
        """How the vocabulary writes `token`, special ones too; for logs and log-probabilities."""
        return self._parts.library.id_to_token(token) or ""

    def stream(self) -> StreamDecoder:
        """A decoder for one generation's tokens, one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they come, holding back the bytes of an unfinished character.

    Invariant: all that `push` and `flush` returned is `Tokenizer.decode` of all that was pushed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        return self._utf8.decode(self._tokenizer.piece(token))

    def push_all(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete."""
        return "".join(self.push(token) for token in tokens)

    def flush(self) -> str:
        """What is left when no more tokens come: nothing, or U+FFFD for a broken-off character."""
        return self._utf8.decode(b"", final=True)
