"""Fast stand-ins for members' keys, and replicas that use them.

A signature is a hash of author and data: it binds them as Ed25519 does, and hides nothing. One
test of the store uses real keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from covey.store.disk import Disk
from covey.store.envelope import Kind, encode, seal
from covey.store.replica import Replica

SWARM = "swarmA"
MEMBERS = ("alice", "bob", "carol", "dave")


def signer(author: str) -> Callable[[bytes], bytes]:
    """What only `author` could compute, if the key were secret."""
    return lambda data: hashlib.sha512(repr(author).encode() + data).digest()


def verify(author: str, signature: bytes, data: bytes) -> bool:
    """The counterpart of `signer`."""
    return signer(author)(data) == signature


def is_member(author: str) -> bool:
    """Four members; everybody else is a stranger."""
    return author in MEMBERS


def replica_of(
    author: str, *, swarm: str = SWARM, disk: Disk | None = None, started_ms: int = 1
) -> Replica:
    """A replica of one of the members, whose envelopes are numbered from `started_ms`."""
    return Replica(
        author,
        swarm=swarm,
        sign=signer(author),
        verify=verify,
        is_member=is_member,
        disk=disk,
        started_ms=started_ms,
    )


def recorded(replica: Replica) -> list[bytes]:
    """A list that every envelope the replica makes from now on is added to."""
    envelopes: list[bytes] = []
    replica.on_local(envelopes.append)
    return envelopes


def sealed(
    author: str, sequence: int, payload: bytes, *, kind: Kind = Kind.UPDATE, swarm: str = SWARM
) -> bytes:
    """An envelope with a valid signature and any payload."""
    return encode(seal(swarm, author, sequence, kind, payload, sign=signer(author)))
