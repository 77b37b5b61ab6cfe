"""Connected TCP sockets through NATs: two ends that connect to each other at the same moment.

Knows sockets, ports and preambles; neither TLS nor the messages by which two ends agree on a
moment.
"""

from .attempts import Attempt, AttemptKind, attempts
from .birthday import birthday_easy, birthday_hard
from .ends import acceptor_end, dialer_end
from .sockets import Connections, PunchSocket

__all__ = [
    "Attempt",
    "AttemptKind",
    "Connections",
    "PunchSocket",
    "acceptor_end",
    "attempts",
    "birthday_easy",
    "birthday_hard",
    "dialer_end",
]
