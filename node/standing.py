"""Who is removed, who may remove, and whose secret is the swarm's: judged from signed statements.

Pure. A judgement is a function of the set of statements alone, so that members which hold the same
ones agree, in whatever order they came. The rules:

- The founder's word is final. It may let members remove others (`Delegation`).
- A delegate may remove anybody but the founder and delegates; that counts while it is a delegate,
  so not after the founder removed it. Whoever removes a delegate says again what it said so far.
- A removal is for ever: the machine comes back with another identity and a new invite.
- Of all rotations by the founder and delegates the one of the highest epoch holds; of two in one
  epoch the founder's, then that of the higher peer id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, assert_never

import msgspec

from covey.store.errors import RecordMalformed
from covey.store.schema import Delegation, Revocation, Rotation

Statement: TypeAlias = Delegation | Revocation | Rotation
Verify: TypeAlias = Callable[[str, bytes, bytes], bool]  # (peer id, signature, data)
S = TypeVar("S", bound=Delegation | Revocation | Rotation)

UNSIGNED = bytes(64)  # until `sign_statement`
MAX_STATEMENT_BYTES = 96 * 1024
_DOMAIN = b"covey/membership/statement\x00"
_VERSION = 1
_KINDS: Mapping[str, type[Statement]] = {
    "delegation": Delegation,
    "revocation": Revocation,
    "rotation": Rotation,
}


def sign_statement(statement: S, *, swarm: str, sign: Callable[[bytes], bytes]) -> S:
    """The statement with the signature of its `by`, whose key `sign` uses."""
    return msgspec.structs.replace(statement, signature=sign(_signed_bytes(statement, swarm)))


def is_genuine(statement: Statement, *, swarm: str, verify: Verify) -> bool:
    """Whether its `by` signed it, for this swarm."""
    return verify(statement.by, statement.signature, _signed_bytes(statement, swarm))


def encode_statement(statement: Statement) -> bytes:
    """For a way outside the store; a rotation goes without its sealed copies."""
    if isinstance(statement, Rotation):
        statement = msgspec.structs.replace(statement, copies={})
    kind = type(statement).__name__.lower()
    return msgspec.msgpack.encode([kind, msgspec.to_builtins(statement)])


def decode_statement(data: bytes) -> Statement:
    """Inverse of `encode_statement`, for any bytes; the signature is not checked.

    Raises:
        RecordMalformed: it is no statement.
    """
    if len(data) > MAX_STATEMENT_BYTES:
        raise RecordMalformed("a statement is too long")
    try:
        kind, value = msgspec.msgpack.decode(data, type=tuple[str, dict[str, object]])
        known = _KINDS[kind]
    except (ValueError, KeyError) as error:
        raise RecordMalformed("not a statement about membership") from error
    return known.from_value(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What follows from a set of statements."""

    founder: str
    delegates: frozenset[str]
    removed: Mapping[str, Revocation]
    rotation: Rotation | None  # whose secret is the swarm's; None: the first one still is

    def may_remove(self, author: str, member: str) -> bool:
        """Whether the author's removal of the member counts."""
        if member == self.founder or member == author:
            return False
        return author == self.founder or (author in self.delegates and member not in self.delegates)

    @property
    def authorities(self) -> frozenset[str]:
        """Those who may remove members and change the secret."""
        return self.delegates | {self.founder}


def judge(founder: str, statements: Iterable[Statement]) -> Standing:
    """What holds, given genuine statements (`is_genuine`) of anybody."""
    known = tuple(statements)
    revocations = [s for s in known if isinstance(s, Revocation)]
    by_founder = {s.member for s in revocations if s.by == founder}
    appointed = {s.member for s in known if isinstance(s, Delegation) and s.by == founder}
    standing = Standing(
        founder=founder,
        delegates=frozenset(appointed - by_founder - {founder}),
        removed={},
        rotation=None,
    )
    removed: dict[str, Revocation] = {}
    for revocation in sorted(revocations, key=lambda s: (s.by != founder, s.at, s.by, s.signature)):
        if standing.may_remove(revocation.by, revocation.member):
            removed.setdefault(revocation.member, revocation)
    rotations = [s for s in known if isinstance(s, Rotation) and s.by in standing.authorities]
    return Standing(
        founder=founder,
        delegates=standing.delegates,
        removed=removed,
        rotation=max(rotations, key=lambda s: precedence(s, founder), default=None),
    )


def precedence(rotation: Rotation, founder: str) -> tuple[int, bool, str, bytes, int]:
    """The rotation with the highest one holds; of one that came twice, the one with its copies."""
    is_founders = rotation.by == founder
    return rotation.epoch, is_founders, rotation.by, rotation.commitment, len(rotation.copies)


def _signed_bytes(statement: Statement, swarm: str) -> bytes:
    """What the signature covers; unambiguous, because msgpack frames each part."""
    fields: list[object]
    match statement:
        case Delegation():
            fields = ["delegation", statement.member]
        case Revocation():
            fields = ["revocation", statement.member, statement.name]
        case Rotation():
            fields = ["rotation", statement.epoch, statement.commitment, statement.without]
        case _:
            assert_never(statement)
    return _DOMAIN + msgspec.msgpack.encode([_VERSION, swarm, statement.by, statement.at, *fields])
