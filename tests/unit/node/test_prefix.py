"""Keys of prompts: equal for equal beginnings, and for nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from covey.node.engine.stage import PAGE_TOKENS
from covey.node.prefix import bound_to_head, prefix_keys
from covey.transport.messages import MAX_PREFIX_KEYS

SECRET = b"s" * 32
tokens = st.integers(0, 2**22)


def keys(prompt: list[int], *, model: str = "m", secret: bytes = SECRET) -> list[bytes]:
    return prefix_keys(prompt, model_digest=model, secret=secret)


@given(
    shared=st.lists(tokens, max_size=200),
    one=st.lists(tokens, min_size=1, max_size=200),
    other=st.lists(tokens, min_size=1, max_size=200),
)
def test_prompts_share_the_keys_of_the_pages_that_they_share(
    shared: list[int], one: list[int], other: list[int]
) -> None:
    mine, theirs = shared + one, shared + other
    for page, (a, b) in enumerate(zip(keys(mine), keys(theirs), strict=False), 1):
        assert (a == b) == (mine[: page * PAGE_TOKENS] == theirs[: page * PAGE_TOKENS])


def test_the_last_token_is_in_no_page() -> None:
    for n_tokens, n_keys in ((1, 0), (64, 0), (65, 1), (128, 1), (129, 2)):
        assert len(keys([7] * n_tokens)) == n_keys


def test_very_long_prompts_have_as_many_keys_as_a_message_may() -> None:
    assert len(keys([7] * (PAGE_TOKENS * (MAX_PREFIX_KEYS + 2)))) == MAX_PREFIX_KEYS


def test_another_model_secret_or_head_has_other_keys() -> None:
    prompt = [7] * 65
    known = {
        keys(prompt)[0],
        keys(prompt, model="n")[0],
        keys(prompt, secret=b"t" * 32)[0],
        bound_to_head(keys(prompt), "a")[0],
        bound_to_head(keys(prompt), "b")[0],
    }
    assert len(known) == 5
    assert all(len(key) == 16 for key in known)
