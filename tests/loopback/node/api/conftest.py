"""The API runs on the node's loop, which is uvloop's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Nodes run on uvloop where there is one."""
    return {"uvloop": uvloop.new_event_loop}
