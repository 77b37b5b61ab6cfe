"""How a node's log reads: the message, and what is known about it as name=value."""

from __future__ import annotations

import logging
import sys

_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Formatter(logging.Formatter):
    """Adds what a record has beside its message (`extra`), which logging leaves out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """One line."""
        extras = [
            f"{name}={value}"
            for name, value in vars(record).items()
            if name not in _OF_EVERY_RECORD
        ]
        return " ".join((super().formatMessage(record), *extras))


def configure(*, verbose: bool) -> None:
    """Log to stderr; only what is wrong unless `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
