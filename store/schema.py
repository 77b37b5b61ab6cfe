"""The records that live in the store: their shapes, bounds and keys.

A record is a value that says all about itself; whether its author may publish it is for `views`.
Fields that a newer version adds are ignored, so that versions can share a swarm. What other
folders own (plans, profiles) is carried as an opaque JSON object and checked by them.
"""

from __future__ import annotations

import ipaddress
import math
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import msgspec
from msgspec import Meta

from .envelope import AuthorId, Signature
from .errors import RecordMalformed

MAX_RELAYS = 4  # that a member behind a NAT can be reached through
MAX_MAPPED = 4
MAX_BLOCKS = 1024  # the deepest model known has 126
# A rotation has to fit into one value: 256 copies take 43 KiB in JSON, 256 names 14 KiB.
MAX_REMOVED = 256
MAX_COPIES = 256
MAX_EPOCH = 1 << 31
MAX_VERSION = 1 << 53  # of a pin
MAX_EXPERIENCES = 64  # members that one is told of; 64 take 9 KiB in JSON

Digest: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16,128}\Z")]
Sha256: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128)]
Address: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**31)]
NBytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Epoch: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
UnixSeconds: TypeAlias = Annotated[float, Meta(ge=0, le=2**53)]
WholeSeconds: TypeAlias = Annotated[int, Meta(ge=0, le=2**40)]  # unix time, in what is signed
MemberEpoch: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_EPOCH)]  # of the swarm's secret
SealedSecret: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=128)]
BlockIdx: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
FullSharedPattern: TypeAlias = Annotated[
    str, Meta(pattern=r"\AF[FS]*\Z", max_length=MAX_BLOCKS)
]  # one letter per block, F(ull) or S(hared); a Shared one needs a Full one before it


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records: to a value for `Replica.set`, and back from any value."""

    prefix: ClassVar[str]  # of the keys under which such records live

    @property
    def key(self) -> str:
        """Where the record lives in its author's document, if an author has but one of its kind."""
        return self.prefix

    def to_value(self) -> dict[str, Any]:
        """The record as a dict of JSON types.

        Raises:
            RecordMalformed: it is out of bounds, so that no member would read it.
        """
        value: dict[str, Any] = msgspec.to_builtins(self)
        self.from_value(value)
        return value

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Check and build a record from a value of any shape.

        Raises:
            RecordMalformed: it is no such record.
        """
        try:
            return msgspec.convert(value, cls)
        except ValueError as error:
            raise RecordMalformed(f"no {cls.__name__}: {error}") from error


class MemberCard(Record, frozen=True, kw_only=True):
    """Who a member is, where it can be reached, and what it has to give."""

    prefix = "member"

    peer_id: AuthorId
    name: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=32)]  # "ip:port", "[v6]:port"
    control_addresses: Annotated[tuple[Address, ...], Meta(max_length=32)]  # libp2p multiaddrs
    models: Annotated[tuple[Digest, ...], Meta(max_length=256)]  # that it can serve
    max_blocks: Annotated[int, Meta(ge=0, le=MAX_BLOCKS)] | None  # None: as many as fit
    memory_bytes: NBytes | None  # None: not limited by its owner
    version: Annotated[str, Meta(max_length=32)]
    started_at: UnixSeconds
    relays: Annotated[tuple[AuthorId, ...], Meta(max_length=MAX_RELAYS)] = ()  # best first
    is_reachable: bool | None = None  # at `addresses`, as members found out; None: nobody knows
    mapped: Annotated[tuple[Address, ...], Meta(max_length=MAX_MAPPED)] = ()  # its router forwards
    is_relay: bool = False  # it can be dialled by anybody, and relays for others

    @property
    def public_host(self) -> str | None:
        """The host under which others know it first; two members that share it share a site."""
        first = next(iter((*self.mapped, *self.addresses)), None)
        return None if first is None else first.rpartition(":")[0].strip("[]")

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for address in (*self.addresses, *self.mapped):
            _check_endpoint(address)
        if self.peer_id in self.relays or len(set(self.relays)) != len(self.relays):
            raise ValueError("a relay is the member itself, or named twice")


class BlobEntry(msgspec.Struct, frozen=True, array_like=True):
    """One file of a model: a block, the embedding or the head; an array in JSON, to save room."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    nbytes: NBytes
    sha256: Sha256


class ModelManifest(Record, frozen=True, kw_only=True):
    """A model as the list of its blobs, and the sizes that a planner needs."""

    prefix = "manifest/"

    name: Name
    digest: Digest
    architecture: Annotated[str, Meta(min_length=1, max_length=64)]
    n_blocks: Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
    hidden_size: Count
    vocab_size: Count
    context_length: Count
    blobs: Annotated[tuple[BlobEntry, ...], Meta(min_length=1, max_length=512)]

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if len({blob.name for blob in self.blobs}) != len(self.blobs):
            raise ValueError("two blobs have one name")

    @property
    def key(self) -> str:
        """One manifest per model."""
        return f"{self.prefix}{self.digest}"


class PlanRecord(Record, frozen=True, kw_only=True):
    """A proposed plan; `plan` is opaque here, and the node computes its score anew."""

    prefix = "plan/"

    plan: dict[str, Any]
    digest: Digest
    model: Digest
    epoch: Epoch
    proposer: AuthorId

    @property
    def key(self) -> str:
        """One record per plan of a model."""
        return f"{self.prefix}{self.model}/{self.digest}"


class Pin(Record, frozen=True, kw_only=True):
    """The author's wish that a model runs by this plan, or by whichever is best again.

    The newest wish of any member counts; `version` says which that is, without clocks.
    """

    prefix = "pin/"

    model: Digest
    version: Annotated[
        int, Meta(ge=1, le=MAX_VERSION)
    ]  # one more than the newest that its author had heard of
    at: UnixSeconds  # for people
    plan: dict[str, Any] | None  # opaque here; None: no plan is pinned any more

    @property
    def key(self) -> str:
        """One per model."""
        return f"{self.prefix}{self.model}"


class Ready(Record, frozen=True, kw_only=True):
    """The author's word that its stage of a plan is loaded, verified and warm."""

    prefix = "ready/"

    plan_digest: Digest
    stage_idx: BlockIdx
    at: UnixSeconds

    @property
    def key(self) -> str:
        """One word per stage of a plan."""
        return f"{self.prefix}{self.plan_digest}/{self.stage_idx}"


class ProfileRecord(Record, frozen=True, kw_only=True):
    """What the author measured: of its own device, or of its link to `peer`; opaque here."""

    prefix = "profile/"

    kind: Literal["device", "link"]
    value: dict[str, Any]
    peer: AuthorId | None = None

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if (self.kind == "link") != (self.peer is not None):
            raise ValueError(
                "a link profile names the peer at its other end, a device profile none"
            )

    @property
    def key(self) -> str:
        """One profile of the device, one of each link."""
        return f"{self.prefix}link/{self.peer}" if self.peer else f"{self.prefix}device"


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the author found a member to take, on average over sessions that it was the head of."""

    decode_s_per_block: Annotated[float, Meta(ge=1e-12, le=1e4)]
    n_sessions: Count
    at: UnixSeconds  # of the last one

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not (math.isfinite(self.decode_s_per_block) and math.isfinite(self.at)):
            raise ValueError("a figure that is no number")


class Experience(Record, frozen=True, kw_only=True):
    """How fast the author found others to run a model; see `partition/observed.py`."""

    prefix = "experience/"

    model: Digest
    peers: Annotated[dict[AuthorId, Seen], Meta(max_length=MAX_EXPERIENCES)]

    @property
    def key(self) -> str:
        """One per model."""
        return f"{self.prefix}{self.model}"


class PrefixEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix whose keys and values the author still holds, for the blocks of `span`."""

    prefix_digest: Digest
    n_tokens: Count
    span: tuple[BlockIdx, BlockIdx]  # [start, end)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.span[0] >= self.span[1]:
            raise ValueError("a span ends before it begins")


class IndexCache(Record, frozen=True, kw_only=True):
    """A model's Full/Shared pattern with its calibration, and which prefixes the author holds."""

    prefix = "index/"

    model: Digest
    pattern: FullSharedPattern
    calibration: Digest  # of the text that the pattern was found on
    prefixes: Annotated[tuple[PrefixEntry, ...], Meta(max_length=256)]

    @property
    def key(self) -> str:
        """One per model."""
        return f"{self.prefix}{self.model}"


class Admission(Record, frozen=True, kw_only=True):
    """The author's word that it let a machine in by an invite; so one knows who is a member."""

    prefix = "admission/"

    member: AuthorId
    at: WholeSeconds
    epoch: MemberEpoch  # of the secret that it was given

    @property
    def key(self) -> str:
        """One per machine let in."""
        return f"{self.prefix}{self.member}"


class Delegation(Record, frozen=True, kw_only=True):
    """The founder's word that a member may remove others; signed, see `node/standing.py`."""

    prefix = "delegation/"

    member: AuthorId
    by: AuthorId
    at: WholeSeconds
    signature: Signature

    @property
    def key(self) -> str:
        """One per member."""
        return f"{self.prefix}{self.member}"


class Revocation(Record, frozen=True, kw_only=True):
    """A member is one no longer; signed for itself, so that it can travel outside the store too."""

    prefix = "revocation/"

    member: AuthorId
    name: Name  # as it called itself; its own card is gone from now on
    by: AuthorId
    at: WholeSeconds
    signature: Signature

    @property
    def key(self) -> str:
        """One per member."""
        return f"{self.prefix}{self.member}"


class Rotation(Record, frozen=True, kw_only=True):
    """The swarm has a new secret: what it must hash to, and a sealed copy for each member.

    Signed for itself but for the copies, which whoever opens one compares with `commitment`.
    """

    prefix = "rotation"

    epoch: Annotated[int, Meta(ge=1, le=MAX_EPOCH)]
    by: AuthorId
    at: WholeSeconds
    commitment: Annotated[bytes, Meta(min_length=32, max_length=32)]
    without: Annotated[
        tuple[AuthorId, ...], Meta(max_length=MAX_REMOVED)
    ]  # removed by then, sorted
    copies: Annotated[dict[AuthorId, SealedSecret], Meta(max_length=MAX_COPIES)]
    signature: Signature


def _check_endpoint(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError("an address has no port")
    if host.startswith("[") and host.endswith("]"):
        ipaddress.IPv6Address(host[1:-1])
    else:
        ipaddress.IPv4Address(host)
