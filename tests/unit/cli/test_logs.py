"""How a node's log reads."""

from __future__ import annotations

import logging

from covey.cli.logs import Formatter


def test_what_is_known_beside_the_message_stands_behind_it() -> None:
    record = logging.makeLogRecord(
        {"name": "covey.x", "levelname": "INFO", "msg": "up %d", "args": (7,), "peer": "abc"}
    )
    assert Formatter().format(record).endswith(" INFO covey.x: up 7 peer=abc")
