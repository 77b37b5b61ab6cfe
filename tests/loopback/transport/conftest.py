"""The data plane must not notice which event loop runs it: its central tests here run on both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

ON_BOTH = ("test_mesh.py", "test_mending.py", "test_relay.py")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    nodes_own: dict[str, LoopFactory] = {"uvloop": uvloop.new_event_loop}
    return nodes_own | ({"asyncio": asyncio.new_event_loop} if item.path.name in ON_BOTH else {})
