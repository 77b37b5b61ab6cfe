"""The layout rules that neither the linter nor the type checker can see."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("node", "transport", "partition", "store", "cli", "client")


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_leads_to_the_folder(folder: str) -> None:
    link = ROOT / "src" / "covey" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_code_is_a_package(folder: str) -> None:
    # Without __init__.py a folder is a namespace package, which every tool treats differently.
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert not [str(f) for f in folders if not (f / "__init__.py").exists()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_rule(folder: str) -> None:
    # Inside a package imports are relative, across folders absolute.
    wrong: list[str] = []
    for path in (ROOT / folder).rglob("*.py"):
        package = ".".join(["covey", *path.relative_to(ROOT).parent.parts])
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in absolute_imports(path)
            if name.split(".")[0] in FOLDERS or f"{name}.".startswith(f"{package}.")
        ]
    assert not wrong


def absolute_imports(path: Path) -> list[str]:
    names: list[str] = []
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.Import):
            names += [alias.name for alias in item.names]
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            names.append(item.module or "")
    return names
