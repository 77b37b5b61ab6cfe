"""The Python client; speaks HTTP to a node and knows nothing of what is behind it.

    from covey.client import Client

    with Client() as client:  # the node of this machine
        print(client.generate("Once upon a time", max_tokens=40).text)

`Client()` finds the local node, or starts a head-only one from the swarm saved in its home;
`Client("http://...")` talks to that node; `Client("covey1...")` joins by an invite with a
head-only node of its own, so that the prompt stays on this machine. `AsyncClient` is the same.
"""

from .async_client import AsyncClient, AsyncTextStream
from .errors import (
    BadRequest,
    ClientError,
    ConnectionLost,
    GenerationFailed,
    ModelNotFound,
    NoLocalNode,
    NotReady,
    ServerBusy,
    Unauthorized,
)
from .local import LocalNode, default_home, find_local_node
from .sync_client import Client, TextStream
from .types import (
    ChatOptions,
    Chunk,
    Generation,
    Model,
    PlanOptions,
    SamplingOptions,
    StageTiming,
    Steps,
    Timing,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncTextStream",
    "BadRequest",
    "ChatOptions",
    "Chunk",
    "Client",
    "ClientError",
    "ConnectionLost",
    "Generation",
    "GenerationFailed",
    "LocalNode",
    "Model",
    "ModelNotFound",
    "NoLocalNode",
    "NotReady",
    "PlanOptions",
    "SamplingOptions",
    "ServerBusy",
    "StageTiming",
    "Steps",
    "TextStream",
    "Timing",
    "Unauthorized",
    "Usage",
    "default_home",
    "find_local_node",
]
