"""Names for the beginnings of prompts, so that a stage can tell that it has computed one before.

A key stands for all tokens up to the end of its page. The head makes it with a secret of its own:
a stage, which must not learn what is asked, sees only that two prompts begin alike. A stage binds
it to the head that sent it, so that no head can leave pages behind that another would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from covey.transport.messages import MAX_PREFIX_KEYS

from .engine.stage import PAGE_TOKENS

_KEY_BYTES = 16


def prefix_keys(tokens: Sequence[int], *, model_digest: str, secret: bytes) -> list[bytes]:
    """One key for each full page that `tokens` begins with, the last token's page left out.

    The last token has to be computed in any case, for its hidden states are what is asked for.
    """
    n_pages = min((len(tokens) - 1) // PAGE_TOKENS, MAX_PREFIX_KEYS)
    pages = np.asarray(tokens[: n_pages * PAGE_TOKENS], dtype="<u4").reshape(n_pages, PAGE_TOKENS)
    keys, last = [], model_digest.encode()
    for page in pages:
        last = blake2b(last + page.tobytes(), key=secret, digest_size=_KEY_BYTES).digest()
        keys.append(last)
    return keys


def bound_to_head(keys: Sequence[bytes], head: str) -> list[bytes]:
    """What a stage files a head's keys under."""
    return [blake2b(key, key=head.encode(), digest_size=_KEY_BYTES).digest() for key in keys]
