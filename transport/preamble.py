"""The first bytes on a connection: proof that the dialer may see who listens here.

Sans-IO. In TLS 1.3 the listener's certificate comes first, so without this a stranger would read
the node's identity. Layout, fixed size, big-endian:

    magic 4 | version 1 | key id 16 | nonce 16 | unix time 8 | HMAC-SHA256 32

The HMAC covers all before it and the peer id the dialer expects. To a wrong, stale or replayed
preamble the listener answers nothing and closes.
"""

from __future__ import annotations

import hmac
import struct
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from hashlib import sha256

PREAMBLE_VERSION = 1
STALE_AFTER_S = 60  # clocks of members may differ by this much
MAX_REMEMBERED = 65_536  # nonces of honest dialers within two windows; 6 MB at worst
# What was sent longer than this before a gate opened is refused: it may have passed in the gate's
# life before, whose memory is gone. Shorter than a node takes to start again.
BEFORE_OPENING_S = 5

_LAYOUT = struct.Struct("!4sB16s16sQ")
_MAGIC = b"covy"
_RECEIPT = b"rcpt"  # no preamble begins so: the two seals are never of the same bytes
NONCE_BYTES = 16
PREAMBLE_BYTES = _LAYOUT.size + sha256().digest_size
RECEIPT_BYTES = sha256().digest_size


def build_preamble(
    *, key_id: bytes, key: bytes, expected_peer_id: str, nonce: bytes, unix_time: float
) -> bytes:
    """The `PREAMBLE_BYTES` bytes a dialer sends before TLS; `nonce` is used once."""
    body = _LAYOUT.pack(_MAGIC, PREAMBLE_VERSION, key_id, nonce, int(unix_time))
    return body + _seal(key, body, expected_peer_id)


def build_receipt(preamble: bytes, *, key: bytes, peer_id: str) -> bytes:
    """What a listener answers where the dialer must learn which of several sockets it chose.

    Only a holder of the key can make it, and nobody else ever gets one.
    """
    return _seal(key, _RECEIPT + preamble, peer_id)


class Verdict(StrEnum):
    """What a preamble turned out to be; a reason for the log, never for the dialer."""

    GOOD = "good"
    NOT_COVEY = "not a preamble of this version"
    UNKNOWN_KEY = "of another swarm, epoch or invite"
    FORGED = "wrong secret, or meant for another peer"
    STALE = "its clock differs from ours by more than a minute"
    BEFORE_US = "from before this node started"
    REPLAYED = "seen before"


class PreambleGate:
    """Judges preambles for one listener and remembers the good ones until they are stale."""

    def __init__(
        self, peer_id: str, key_of: Callable[[bytes], bytes | None], *, opened_at: float
    ) -> None:
        """`opened_at` is the unix time from which on it remembers."""
        self._peer_id = peer_id
        self._key_of = key_of
        self._opened_at = opened_at
        self._seen: OrderedDict[bytes, float] = OrderedDict()  # nonce -> unix time to forget it

    def judge(self, preamble: bytes, *, unix_time: float) -> tuple[Verdict, bytes]:
        """The verdict, and the key id that the preamble claims (empty if it claims none)."""
        if len(preamble) != PREAMBLE_BYTES:
            return Verdict.NOT_COVEY, b""
        body, seal = preamble[: _LAYOUT.size], preamble[_LAYOUT.size :]
        magic, version, key_id, nonce, sent_at = _LAYOUT.unpack(body)
        if magic != _MAGIC or version != PREAMBLE_VERSION:
            return Verdict.NOT_COVEY, b""
        key = self._key_of(key_id)
        if key is None:
            return Verdict.UNKNOWN_KEY, key_id
        if not hmac.compare_digest(seal, _seal(key, body, self._peer_id)):
            return Verdict.FORGED, key_id
        if abs(unix_time - sent_at) > STALE_AFTER_S:
            return Verdict.STALE, key_id
        if sent_at < self._opened_at - BEFORE_OPENING_S:
            return Verdict.BEFORE_US, key_id
        self._forget(unix_time)
        # A full memory refuses: forgetting a nonce early would let it be replayed.
        if nonce in self._seen or len(self._seen) >= MAX_REMEMBERED:
            return Verdict.REPLAYED, key_id
        self._seen[nonce] = unix_time + 2 * STALE_AFTER_S
        return Verdict.GOOD, key_id

    def receipt(self, preamble: bytes) -> bytes:
        """See `build_receipt`; for a preamble that was judged good just now."""
        _, _, key_id, _, _ = _LAYOUT.unpack(preamble[: _LAYOUT.size])
        return build_receipt(preamble, key=self._key_of(key_id) or b"", peer_id=self._peer_id)

    def _forget(self, unix_time: float) -> None:
        while self._seen and next(iter(self._seen.values())) < unix_time:
            self._seen.popitem(last=False)


def _seal(key: bytes, body: bytes, peer_id: str) -> bytes:
    return hmac.digest(key, body + peer_id.encode(), "sha256")
