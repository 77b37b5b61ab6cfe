"""The data plane must not notice which event loop runs it: its central tests here run on both.

On the one that nodes do not use, they do so in the lab.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

HERE = Path(__file__).parent
ON_BOTH = ("test_mesh.py", "test_mending.py", "test_relay.py")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    nodes_own: dict[str, LoopFactory] = {"uvloop": uvloop.new_event_loop}
    return nodes_own | ({"asyncio": asyncio.new_event_loop} if item.path.name in ON_BOTH else {})


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in ON_BOTH and item.path.parent == HERE and "[asyncio" in item.name:
            item.add_marker(pytest.mark.lab)
