# ruff: noqa: RUF001 - characters that look alike are the point
"""Token ids, decoding and chat prompts of SmolLM2 are those of transformers, over many scripts."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from covey.node.model.chat_template import render_chat
from covey.node.model.checkpoint import Checkpoint
from covey.node.model.tokenizer import Tokenizer
from covey.node.model.tokenizer_spec import build_tokenizer, folder_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPTS = [
    "The quick brown fox jumps over the lazy dog; didn't it? It'll DON'T I'VE we're.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Árvíztűrő tükörfúrógép",
    "Съешь ещё этих мягких французских булок, да выпей чаю",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "עטלף אבק נס דרך מזגן שהתפוצץ כי חם",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "আমি বাংলায় গান গাই",
    "தமிழ் மொழி இனிது",
    "తెలుగు భాష",
    "ಕನ್ನಡ ನಾಡು",
    "മലയാളം",
    "นายสังฆภัณฑ์ เฮงพิทักษ์ฝั่ง",
    "ພາສາລາວ",
    "ភាសាខ្មែរ",
    "မြန်မာဘာသာ",
    "བོད་སྐད",
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ 漢字",
    "天地玄黃，宇宙洪荒。日月盈昃",
    "키스의 고유조건은 입술끼리",
    "ქართული ენა",
    "Հայերեն",
    "አማርኛ",
    "ᏣᎳᎩ",
    "ᚠᚢᚦᚨᚱᚲ",
    "Tiếng Việt đẹp quá",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
SYMBOLS = [
    "🦜🔗 👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇩🇪🇯🇵",
    "é é ñ ñ",
    "a\u200bb\u200d c\ufeffd",
    "\u202eabc\u202c",
    "$€£¥ ±×÷≈≠∑∫√∞",
    "«» “” ‘’ — – … · •",
    "\t\tx\n\n\ny\r\nz\r",
    "   leading",
    "trailing   ",
    "a  b   c    d",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "",
    "\xa0\u2003\u3000",
    "\x00\x01\x07\x1b[0m\x7f\x85",
    "� \ufffe",
    "\U0010ffff",
    "'s 't 'LL ' s",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 0}  # note\n",
    '#include <stdio.h>\nint main(){printf("%d\\n", 1<<3);}\n',
    '<div class="a">&nbsp;</div>',
    "SELECT * FROM t WHERE a='b' -- x;",
    "https://example.org/a?b=c&d=%20#e",
    "C:\\Users\\me\\x.txt",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_end",
    "<|endoftext|><|endoftext|>x",
    "<repo_name>a<file_sep>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...,,,;;;",
    "__init__ ___",
    "1 12 123 1234 12345.678 1,000,000 1st 2nd 10^3",
]
# transformers builds GPT-2's pre-tokenizer for every GGUF, whatever `tokenizer.ggml.pre` says. It
# shows where a number that is not ASCII follows a space: the model was trained with each number
# (\p{N}) split off first, as llama.cpp's llama-vocab.cpp has it for "smollm", and so do we.
NUMBERS = ["½ ² ٣٤ Ⅷ", "a ½ b", "१२३ ४५", " ①②", "𝟙 𝟚𝟛 x", "٣,٤ km²", "Ⅷ.½", "x² + y² = ½"]


def texts() -> list[str]:
    """The lists above, then mixtures of them and random characters: 200 in all, always the same."""
    chooser = random.Random(20260501)
    base = SCRIPTS + SYMBOLS
    mixed = [chooser.choice(["", " ", "\n", "  "]).join(chooser.sample(base, 3)) for _ in range(60)]
    cut = [text[chooser.randrange(len(text)) :] for text in chooser.sample(SCRIPTS, 20)]
    planes = [(0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF)]
    planes += [(0xE000, 0xFFFF), (0x10000, 0x1FFFF)]
    noise = [
        "".join(chr(chooser.randint(*chooser.choice(planes))) for _ in range(30))
        for _ in range(200 - len(base) - len(mixed) - len(cut))
    ]
    return base + mixed + cut + [without_numbers(text) for text in noise]


def without_numbers(text: str) -> str:
    """`text` without numbers that are not ASCII; NUMBERS has those."""
    return "".join(c for c in text if c.isascii() or unicodedata.category(c)[0] != "N")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return checkpoint.tokenizer()


def test_ids_of_200_texts(tokenizer: Tokenizer, oracle_tokenizer: Any) -> None:
    assert len(texts()) == 200
    for text in texts():
        expected = oracle_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == expected, repr(text)


def test_numbers_are_split_off_as_llama_cpp_does(
    tokenizer: Tokenizer, oracle_tokenizer: Any
) -> None:
    import tokenizers as hf
    from tokenizers import pre_tokenizers

    oracle = hf.Tokenizer.from_str(oracle_tokenizer.backend_tokenizer.to_str())
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(hf.Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(hf.Regex(gpt2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in NUMBERS + texts():
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_decoding_of_200_texts_whole_and_streamed(
    tokenizer: Tokenizer, oracle_tokenizer: Any
) -> None:
    for text in texts():
        ids = tokenizer.encode(text)
        expected = oracle_tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == expected, repr(text)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == expected


def test_decoding_of_random_ids(tokenizer: Tokenizer, oracle_tokenizer: Any) -> None:
    chooser = random.Random(1)
    for _ in range(200):
        ids = [chooser.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert tokenizer.decode(ids) == oracle_tokenizer.decode(ids, skip_special_tokens=True)


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie geht's?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "<|im_end|> 🦜 {{ x }} {% if %}"},
    ],
]


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_prompts(
    tokenizer: Tokenizer,
    oracle_tokenizer: Any,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
) -> None:
    assert tokenizer.chat_template is not None
    prompt = render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
    )
    assert prompt == oracle_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ids = oracle_tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokenizer.encode(prompt) == ids


def test_end_tokens_include_the_oracles(tokenizer: Tokenizer, oracle_tokenizer: Any) -> None:
    assert oracle_tokenizer.eos_token_id in tokenizer.eos_ids
    assert tokenizer.bos_id == oracle_tokenizer.bos_token_id


def test_a_folder_with_tokenizer_json_gives_the_same_tokenizer(
    oracle_tokenizer: Any, tmp_path: Path
) -> None:
    oracle_tokenizer.save_pretrained(tmp_path)
    saved = build_tokenizer(tmp_path, folder_spec(tmp_path))
    for text in texts():
        ids = saved.encode(text)
        assert ids == oracle_tokenizer(text, add_special_tokens=False).input_ids
        assert saved.encode(text, add_special=True) == oracle_tokenizer(text).input_ids
        assert saved.decode(ids) == oracle_tokenizer.decode(ids, skip_special_tokens=True)
    assert saved.vocab_size == len(oracle_tokenizer)
    assert saved.bos_id == oracle_tokenizer.bos_token_id
    assert oracle_tokenizer.eos_token_id in saved.eos_ids
    assert saved.chat_template == oracle_tokenizer.chat_template
