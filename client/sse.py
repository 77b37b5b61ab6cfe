"""Server-sent events out of any split of their bytes. Sans-IO.

Only what a node sends is kept: the `data` of each event. Comments are keep-alives, other fields
are ignored, as https://html.spec.whatwg.org/multipage/server-sent-events.html section 9.2.6 asks.
"""

from __future__ import annotations

import re

from .errors import ClientError

MAX_EVENT_BYTES = 1024 * 1024  # far beyond any chunk; a usage event has some KiB

_LINE_END = re.compile(rb"\r\n|\n|\r")


class SseDecoder:
    """Feed it what arrives; it returns the data of the events that this completes."""

    def __init__(self) -> None:
        self._rest = bytearray()  # an incomplete line
        self._n_searched = 0  # of its bytes, known to hold no line end
        self._data: list[bytes] = []  # of the event that is being read
        self._n_bytes = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Take the next bytes.

        Raises:
            ClientError: an event beyond `MAX_EVENT_BYTES`.
        """
        self._rest += received
        events: list[bytes] = []
        start = 0
        end = len(self._rest)
        for match in _LINE_END.finditer(self._rest, self._n_searched):
            if match[0] == b"\r" and match.end() == end:
                end -= 1  # a line feed may follow
                break
            line = bytes(self._rest[start : match.start()])
            start = match.end()
            if (event := self._take(line)) is not None:
                events.append(event)
        self._n_searched = end - start
        del self._rest[:start]
        if len(self._rest) + self._n_bytes > MAX_EVENT_BYTES:
            raise ClientError("the node sent an event too large to be one of ours")
        return events

    def _take(self, line: bytes) -> bytes | None:
        if not line:
            event = b"\n".join(self._data) if self._data else None
            self._data, self._n_bytes = [], 0
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._n_bytes += len(value)
        return None
