"""Checks of single values that came from a peer; each names the field that is wrong."""

from __future__ import annotations

import math

from .errors import InvalidPlan

MAX_NAME = 128  # characters; a libp2p peer id takes 52, a SHA-256 in hex 64


def check_whole(field: str, value: int, low: int, high: int) -> None:
    """Raise `InvalidPlan` unless `low <= value <= high`."""
    if not low <= value <= high:
        raise InvalidPlan(field, f"must be from {low} to {high}")


def check_real(field: str, value: float, low: float, high: float) -> None:
    """Raise `InvalidPlan` unless `value` is finite and `low <= value <= high`."""
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidPlan(field, f"must be a finite number from {low:g} to {high:g}")


def check_name(field: str, value: str) -> None:
    """Raise `InvalidPlan` unless `value` is 1 to 128 visible ASCII characters."""
    if not (0 < len(value) <= MAX_NAME and value.isascii() and value.isprintable()):
        raise InvalidPlan(field, f"must be 1 to {MAX_NAME} printable ASCII characters")
    if " " in value:
        raise InvalidPlan(field, "must not contain spaces")
