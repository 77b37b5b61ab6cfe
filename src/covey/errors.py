"""The root of every error that Covey raises on purpose.

Each folder derives its own tree from it (`transport/errors.py`, `store/errors.py`, ...). The CLI
prints a `CoveyError` as one line; anything else is a programming error and keeps its traceback.
"""

from __future__ import annotations


class CoveyError(Exception):
    """Something went wrong that a caller or a person can act on; its text is one line."""
