"""The threat model claims nothing that no test shows: every test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")

NAMED = re.compile(r"`([a-z_/0-9]+\.py)?::(test_[a-z0-9_]+)`")


def test_every_test_that_the_page_names_exists() -> None:
    missing, file = [], ""
    for match in NAMED.finditer(PAGE):
        file = match[1] or file
        path = ROOT / "tests" / file
        if not path.is_file() or f"def {match[2]}(" not in path.read_text("utf-8"):
            missing.append(f"{file}::{match[2]}")
    assert len(NAMED.findall(PAGE)) > 40
    assert not missing


def test_every_code_place_that_the_page_names_exists() -> None:
    places = re.findall(r"`((?:node|transport|store|cli)/[a-z_/]+\.py)`", PAGE)
    assert places
    assert [place for place in places if not (ROOT / place).is_file()] == []
