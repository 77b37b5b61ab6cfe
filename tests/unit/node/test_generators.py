"""A scope that cancels must never hold a `yield`: it would cancel whoever reads the generator.

While an async generator stands at a `yield`, its frame is not running, but `asyncio.timeout` or a
`TaskGroup` around it would still cancel the task that entered it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import covey.node

FILES = sorted(Path(covey.node.__path__[0]).resolve().rglob("*.py"))
CANCELLING = ("timeout", "timeout_at", "TaskGroup", "_deadline", "track")


def offences(tree: ast.AST) -> Iterator[int]:
    """Lines of the yields inside a cancelling scope; context managers yield to its own user."""
    for function in ast.walk(tree):
        if isinstance(function, ast.AsyncFunctionDef) and not any(
            "contextmanager" in ast.unparse(decorator) for decorator in function.decorator_list
        ):
            for scope in ast.walk(function):
                if isinstance(scope, ast.AsyncWith) and any(map(_cancels, scope.items)):
                    yield from (
                        node.lineno for node in ast.walk(scope) if isinstance(node, ast.Yield)
                    )


def _cancels(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in CANCELLING


@pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join(path.parts[-2:]))
def test_no_generator_yields_inside_a_scope_that_cancels(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text("utf-8")))) == []


def test_an_offence_would_be_found() -> None:
    text = "async def f():\n  async with asyncio.timeout(1):\n    for x in y:\n      yield x\n"
    assert list(offences(ast.parse(text))) == [4]
    managed = f"@asynccontextmanager\n{text}"
    assert list(offences(ast.parse(managed))) == []
