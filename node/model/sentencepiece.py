"""SentencePiece vocabularies (tokenizer model "llama": Llama 2, Mistral, Phi-3, Gemma 3).

Byte-pair merging by score over whole texts, with a space written as U+2581 and characters outside
the vocabulary as byte tokens `<0xHH>`. The `tokenizers` library does the merging once it has the
merges, which follow from vocabulary and scores as in transformers' converter of such files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"
MAX_PIECE_CHARS = 512  # of a token that is merged; SentencePiece itself makes 16 by default
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# The steps that tokenizer.json may name to undo all this; `piece_bytes` does the same.
_DECODER_STEPS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip"})


def build_library(
    tokens: Sequence[str],
    scores: Sequence[float],
    merged: Set[int],
    *,
    unknown: str | None,
    has_space_prefix: bool,
) -> hf.Tokenizer:
    """The merging of one vocabulary.

    Args:
        tokens: by id, each once.
        scores: of each; the highest is merged first.
        merged: ids of the tokens that merging makes, or starts from.
        unknown: the token for what not even bytes can write.
        has_space_prefix: whether a text, or one behind a special token, begins with a space.
    """
    library = hf.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            find_merges(tokens, scores, merged),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend(SPACE)] if has_space_prefix else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return library


def find_merges(
    tokens: Sequence[str], scores: Sequence[float], merged: Set[int]
) -> list[tuple[str, str]]:
    """Every way to make a token out of two others, the best token first."""
    ids = {tokens[i]: i for i in merged}
    found = []
    for whole, i in ids.items():
        splits = ((whole[:at], whole[at:]) for at in range(1, len(whole)))
        pairs = [(left, right) for left, right in splits if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(scores[i], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def piece_bytes(token: str) -> bytes:
    """What a token adds to a text; the space that a text may begin with is one like any other."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def is_decoder(decoder: object) -> bool:
    """Whether the decoder of a tokenizer.json is that of a SentencePiece vocabulary."""
    if not isinstance(decoder, dict) or decoder.get("type") != "Sequence":
        return False
    steps = decoder.get("decoders")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return False
    kinds = [step.get("type") for step in steps]
    return "ByteFallback" in kinds and all(str(kind) in _DECODER_STEPS for kind in kinds)
