"""A small SentencePiece vocabulary as a GGUF file has it: specials, bytes, pieces with scores."""

from __future__ import annotations

from functools import cache
from typing import Any

SPACE = "\u2581"
SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>")
GIVEN = "<b>"  # user-defined: matched before any merging, and text like any other
_CORPUS = (
    "The quick brown fox jumps over the lazy dog; didn't it? It'll rain in Spain, mainly.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg",
    "Съешь ещё этих мягких французских булок, да выпей чаю",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 0}  # note\n",
    "there the then them other another weather whether 12 123 2024",
)


@cache
def pieces() -> tuple[str, ...]:
    """What merging makes of the corpus, in the order in which it was found."""
    import tokenizers as hf
    from tokenizers import models, trainers

    library = hf.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, min_frequency=2)
    words = [SPACE + word for text in _CORPUS for word in text.split(" ")]
    library.train_from_iterator(words * 3, trainer)
    by_id = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return tuple(token for token, _ in by_id)


def sentencepiece_spec(**changes: Any) -> dict[str, Any]:
    """The spec of a GGUF file; `changes` of the keys behind "tokenizer.ggml."."""
    found = pieces()
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *found, GIVEN]
    scores = [0.0] * (4 + 256) + [-float(i) for i in range(len(found))] + [-1000.0]
    kinds = [2, 3, 3, 3] + [6] * 256 + [1] * len(found) + [4]
    spec: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in (spec | changes).items()}
    return {"format": "gguf"} | named
