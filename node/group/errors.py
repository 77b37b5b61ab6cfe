"""What ends an attempt of a group, or the group itself."""

from __future__ import annotations

from covey.node.errors import NodeError
from covey.transport.errors import TransportError


class ReduceAborted(NodeError):
    """A sum did not come about, for any member; its input is intact.

    Nothing more comes of this epoch. Retry under a higher one; if `is_lost`, `rank` needs another
    lane first, or is gone.
    """

    def __init__(self, reason: str, *, epoch: int, rank: int | None, is_lost: bool = False) -> None:
        by = "" if rank is None else f" by rank {rank}"
        super().__init__(f"a sum of epoch {epoch} was aborted{by}: {reason}")
        self.reason = reason
        self.epoch = epoch
        self.rank = rank
        self.is_lost = is_lost


class GroupBroken(TransportError):
    """The group cannot go on as it is: its sessions end, and it has to be formed anew."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the group is broken: {reason}")
        self.reason = reason
