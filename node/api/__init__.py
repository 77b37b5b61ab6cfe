"""HTTP on each node: OpenAI-compatible text generation, health, metrics and control.

Knows `covey.node.service` and `covey.node.errors`, and nothing of engines, links or plans.
Requests are parsed in `requests.py` and answers rendered in `render.py`, both pure; `app.py`
binds them to routes and `server.py` to a port.
"""

from .app import create_app
from .errors import ApiAddressInUse
from .server import ApiServer

__all__ = ["ApiAddressInUse", "ApiServer", "create_app"]
