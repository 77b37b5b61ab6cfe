"""Builds a `Tokenizer` from what a model's files say about it.

The spec is a JSON object, so that it can travel as a blob and a head needs no weights for it:
either `{"format": "gguf", ...}`, the `tokenizer.*` metadata of a GGUF file, or
`{"format": "tokenizer.json", ...}`, the library's own file and the keys we use of the two
beside it. Byte-level BPE and SentencePiece's BPE; other kinds are refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from . import sentencepiece
from .config import MAX_VOCAB
from .errors import CorruptModel, ModelNotFound, UnsupportedModel
from .gguf import GgufFile
from .safetensors import read_json, read_text
from .tokenizer import Tokenizer, TokenizerParts

_GPT2 = "gpt-2"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# `tokenizer.ggml.pre` -> how text is cut before merging; names as in llama.cpp's llama-vocab.cpp.
PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {
        "default": _GPT2,
        "gpt-2": _GPT2,
        "smollm": "digits",
        "llama3": _LLAMA3_SPLIT,
        "llama-v3": _LLAMA3_SPLIT,
        "llama-bpe": _LLAMA3_SPLIT,
        "qwen2": _QWEN2_SPLIT,
        "deepseek-r1-qwen": _QWEN2_SPLIT,
    }
)

# Control tokens that end a generation whatever the file names as eos (llama.cpp's list of EOG).
END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_turn>",
        "<EOT>",
        "</s>",
    }
)

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
_MODELS = (f"{_BYTE_LEVEL} (byte-level BPE)", f"{_SENTENCEPIECE} (SentencePiece BPE)")

_GGUF_KEYS = (
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.chat_template",
)
_SENTENCEPIECE_KEYS = ("tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix")


def gguf_spec(file: GgufFile) -> dict[str, Any]:
    """The spec in a GGUF file: the tokenizer's keys as JSON values."""
    spec: dict[str, Any] = {"format": "gguf"}
    is_sentencepiece = file.metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE
    for key in (*_GGUF_KEYS, *(_SENTENCEPIECE_KEYS if is_sentencepiece else ())):
        if key in file.metadata:
            value = file.metadata[key]
            spec[key] = value.tolist() if isinstance(value, np.ndarray) else value
    return spec


def folder_spec(folder: Path) -> dict[str, Any]:
    """The spec in the files beside a safetensors checkpoint."""
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    return {
        "format": "tokenizer.json",
        "tokenizer": read_json(folder / "tokenizer.json"),
        "bos_token": settings.get("bos_token"),
        "eos_token": settings.get("eos_token"),
        "eos_token_id": generation.get("eos_token_id"),
        "chat_template": template,
    }


def build_tokenizer(path: Path, spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a spec describes.

    Raises:
        CorruptModel: the spec contradicts itself; `path` names its origin in the message.
        UnsupportedModel: a kind of tokenizer that we do not build.
        ModelNotFound: the model came without a tokenizer.
    """
    if not spec:
        raise ModelNotFound(f"no tokenizer.json beside {path}; get it from where the model is from")
    if spec.get("format") == "gguf":
        return Tokenizer(_from_gguf(path, spec))
    return Tokenizer(_from_json(path, spec))


def _from_gguf(path: Path, spec: Mapping[str, Any]) -> TokenizerParts:
    model = spec.get("tokenizer.ggml.model")
    if model not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise UnsupportedModel(f"tokenizer model {model!r}", _MODELS)
    tokens = _strings(path, spec, "tokenizer.ggml.tokens")
    kinds = spec.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CorruptModel(path, "tokenizer.ggml.tokens", "expected one type per distinct token")
    if model == _SENTENCEPIECE:
        library, to_bytes = _sentencepiece(path, spec, tokens, kinds), sentencepiece.piece_bytes
        control = {i for i, kind in enumerate(kinds) if kind in (_CONTROL, _UNKNOWN) and tokens[i]}
    else:
        merges = _strings(path, spec, "tokenizer.ggml.merges")
        pre = spec.get("tokenizer.ggml.pre", "default")
        library, to_bytes = _byte_level_bpe(path, pre, tokens, merges), token_bytes
        control = {i for i, kind in enumerate(kinds) if kind == _CONTROL and tokens[i]}
    given = {i for i, kind in enumerate(kinds) if kind == _USER_DEFINED and tokens[i]}
    library.add_special_tokens(
        [hf.AddedToken(tokens[i], special=True, normalized=False) for i in sorted(control)]
    )
    library.add_tokens([hf.AddedToken(tokens[i], normalized=False) for i in sorted(given)])
    ids = {
        key: _token_id(path, spec, f"tokenizer.ggml.{key}_token_id", len(tokens))
        for key in ("bos", "eos", "eot", "eom")
    }
    ends = {ids[key] for key in ("eos", "eot", "eom")}
    bos, eos = ids["bos"], ids["eos"]
    adds_bos = spec.get("tokenizer.ggml.add_bos_token", _adds_bos_unasked(spec)) is True
    adds_eos = spec.get("tokenizer.ggml.add_eos_token") is True
    return TokenizerParts(
        library=library,
        pieces=tuple(b"" if i in control else to_bytes(t) for i, t in enumerate(tokens)),
        bos_id=bos,
        eos_ids=frozenset(e for e in ends if e is not None)
        | {i for i in control if tokens[i] in END_TOKENS},
        chat_template=_optional_text(path, spec, "tokenizer.chat_template"),
        prefix=(bos,) if adds_bos and bos is not None else (),
        suffix=(eos,) if adds_eos and eos is not None else (),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
    )


def _sentencepiece(
    path: Path, spec: Mapping[str, Any], tokens: list[str], kinds: list[Any]
) -> hf.Tokenizer:
    scores = spec.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(type(score) is float and math.isfinite(score) for score in scores)
    ):
        raise CorruptModel(path, "tokenizer.ggml.scores", "expected a finite number per token")
    merged = {i for i, kind in enumerate(kinds) if kind == _NORMAL and tokens[i]}
    if any(len(tokens[i]) > sentencepiece.MAX_PIECE_CHARS for i in merged):
        limit = sentencepiece.MAX_PIECE_CHARS
        raise CorruptModel(path, "tokenizer.ggml.tokens", f"expected at most {limit} characters")
    with _reading(path, "tokenizer.ggml.tokens"):
        return sentencepiece.build_library(
            tokens,
            scores,
            merged,
            unknown=next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None),
            has_space_prefix=spec.get("tokenizer.ggml.add_space_prefix", True) is True,
        )


def _byte_level_bpe(path: Path, pre: object, tokens: list[str], merges: list[str]) -> hf.Tokenizer:
    split = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if split is None:
        raise UnsupportedModel(f"pre-tokenizer {pre!r}", PRE_TOKENIZERS)
    pairs = []
    for merge in merges:
        left, found, right = merge.partition(" ")
        if not found or not left or not right:
            raise CorruptModel(path, "tokenizer.ggml.merges", "expected pairs of tokens")
        pairs.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with _reading(path, "tokenizer.ggml.merges"):
        # Llama 3 takes a word that is itself a token as it is, without merging up to it.
        model = models.BPE(vocabulary, pairs, ignore_merges=split is _LLAMA3_SPLIT)
    library = hf.Tokenizer(model)
    if split == _GPT2:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split == "digits":
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(hf.Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if split is _QWEN2_SPLIT:
        library.normalizer = normalizers.NFC()  # as Qwen's own tokenizer.json has it
    library.decoder = decoders.ByteLevel()
    return library


def _from_json(path: Path, spec: Mapping[str, Any]) -> TokenizerParts:
    content = spec.get("tokenizer")
    if not isinstance(content, dict):
        raise CorruptModel(path, "tokenizer", "expected the object of tokenizer.json")
    decoder = content.get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    to_bytes = sentencepiece.piece_bytes if sentencepiece.is_decoder(decoder) else token_bytes
    if kind != "ByteLevel" and to_bytes is token_bytes:
        supported = ("ByteLevel", "a sequence with ByteFallback")
        raise UnsupportedModel(f"decoder {kind!r} in tokenizer.json", supported)
    with _reading(path, "tokenizer.json"):
        library = hf.Tokenizer.from_str(json.dumps(content))
    added = library.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    # Not get_vocab_size: ids may have gaps.
    n_tokens = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if n_tokens > MAX_VOCAB:
        raise CorruptModel(path, "tokenizer.json", f"expected token ids below {MAX_VOCAB}")
    texts = [library.id_to_token(i) or "" for i in range(n_tokens)]
    bos_token, eos_token = _token_text(spec, "bos_token"), _token_text(spec, "eos_token")
    listed = spec.get("eos_token_id")
    ends = {i for i in (listed if isinstance(listed, list) else [listed]) if type(i) is int}
    ends |= {i for i in special if texts[i] in END_TOKENS or texts[i] == eos_token}
    probe = library.encode("", add_special_tokens=True).ids
    return TokenizerParts(
        library=library,
        pieces=tuple(b"" if i in special else to_bytes(t) for i, t in enumerate(texts)),
        bos_id=library.token_to_id(bos_token) if bos_token else None,
        eos_ids=frozenset(ends),
        chat_template=_optional_text(path, spec, "chat_template"),
        # Post-processors put fixed tokens around a text; an empty one shows which.
        prefix=tuple(i for i in probe if texts[i] == bos_token),
        suffix=tuple(i for i in probe if texts[i] != bos_token),
        bos_token=bos_token,
        eos_token=eos_token,
    )


@contextmanager
def _reading(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the one class that `tokenizers` raises for bad content
        raise CorruptModel(path, where, f"expected a tokenizer ({error})") from error


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level vocabularies write them (openai/gpt-2, encoder.py).

    Printable bytes stand for themselves, the other 68 for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_alphabet()


def token_bytes(token: str) -> bytes:
    """The bytes behind a token of a byte-level vocabulary; any other text stands for itself."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _adds_bos_unasked(spec: Mapping[str, Any]) -> bool:
    if spec.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        return True
    return spec.get("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe")


def _strings(path: Path, spec: Mapping[str, Any], key: str) -> list[str]:
    value = spec.get(key)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise CorruptModel(path, key, "expected an array of strings")
    return list(value)


def _token_id(path: Path, spec: Mapping[str, Any], key: str, n_tokens: int) -> int | None:
    value = spec.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < n_tokens:
        raise CorruptModel(path, key, f"expected a token id below {n_tokens}")
    return value


def _token_text(spec: Mapping[str, Any], key: str) -> str:
    value = spec.get(key)
    if isinstance(value, dict):  # an AddedToken as old configurations write it
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _optional_text(path: Path, spec: Mapping[str, Any], key: str) -> str | None:
    value = spec.get(key)
    if isinstance(value, list):  # several named templates; the unnamed use is "default"
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CorruptModel(path, key, "expected a string")
    return value


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
