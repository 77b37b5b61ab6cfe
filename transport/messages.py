"""Every message that crosses a link. This page is the protocol.

A frame is one message plus, for some, tensors: raw bytes that follow the header and are described
in it. Types and bounds written here are checked when a frame is decoded (`codec.py`), so that
whoever receives a message may rely on them. Tensors are opaque here: a dtype, a shape, bytes.

Times are durations, never instants: no two clocks are compared.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from .errors import ErrorCode

PROTOCOL_VERSION = 3

MAX_STAGES = 64
MAX_BLOCKS = 1024
MAX_TOKENS = 1 << 20
MAX_PREFIX_KEYS = 1024

PeerId = Annotated[str, Meta(min_length=40, max_length=64, pattern=r"\A[1-9A-HJ-NP-Za-km-z]+\Z")]
SessionId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[0-9A-Za-z_-]+\Z")]
Digest = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"\A[0-9a-f]+\Z")]
StageIdx = Annotated[int, Meta(ge=0, le=MAX_STAGES)]
BlockIdx = Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
FrameNumber = Annotated[int, Meta(ge=0, le=1 << 53)]
TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Microseconds = Annotated[int, Meta(ge=0, le=1 << 42)]
ByteCount = Annotated[int, Meta(ge=0, le=1 << 48)]
PrefixKey = Annotated[bytes, Meta(min_length=16, max_length=16)]
CircuitId = Annotated[bytes, Meta(min_length=16, max_length=16)]
CircuitKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
LaneId = Annotated[bytes, Meta(min_length=16, max_length=16)]
LaneKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Address = Annotated[str, Meta(min_length=3, max_length=256)]
Statements = Annotated[list[Annotated[bytes, Meta(max_length=96 * 1024)]], Meta(max_length=600)]
IpAddress = Annotated[str, Meta(min_length=2, max_length=45, pattern=r"\A[0-9a-fA-F:.]+\Z")]
Port = Annotated[int, Meta(ge=1, le=65535)]
PortOrNone = Annotated[int, Meta(ge=0, le=65535)]
ProbeNonce = Annotated[bytes, Meta(min_length=12, max_length=12)]
NatKindName = Literal[
    "open",
    "full_cone",
    "address_restricted",
    "port_restricted",
    "symmetric",
    "blocked",
    "unknown",
]
DialBackOutcome = Literal["answered", "refused", "silent", "wrong", "declined"]
DType = Literal["fp32", "fp16", "bf16"]
Codec = Literal["exact", "fp16", "int8", "int4"]


class Message(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """Base of all messages."""


# --- the link itself ---------------------------------------------------------------------------


class Ping(Message, tag="ping", frozen=True, kw_only=True):
    """Heartbeat and probe; may carry a tensor of any bytes to measure bandwidth with."""


class Pong(Message, tag="pong", frozen=True, kw_only=True):
    """Answer to a Ping; carries no tensor."""


class Receipt(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which frames of a link have arrived: all numbers up to one, and some beyond it."""

    upto: FrameNumber = 0
    beyond: Annotated[list[FrameNumber], Meta(max_length=4096)] = []


class Hello(Message, tag="hello", frozen=True, kw_only=True):
    """First frame of the dialer: a new link, or a new carrier for one that the two have.

    `link` is drawn at random by whoever began the link; `received` is what the dialer has of it.
    """

    link: Annotated[bytes, Meta(min_length=16, max_length=16)]
    is_new: bool
    received: Receipt = Receipt()


class Admitted(Message, tag="admitted", frozen=True, kw_only=True):
    """First frame of the side that was dialled: the dialer is let in.

    Needed because in TLS 1.3 the dialer's handshake is over before its certificate was judged. A
    Failure in its place says why not; a link that closes instead was one too many. `received` is
    what this side has of a link that goes on.
    """

    received: Receipt = Receipt()


class Ack(Message, tag="ack", frozen=True, kw_only=True):
    """Says nothing; its frame's `ack` does, or its number, in place of a frame taken back."""


class Failure(Message, tag="failure", frozen=True, kw_only=True):
    """Answer to any request that was refused; as the last frame of a link, why it closes."""

    code: ErrorCode


class Goodbye(Message, tag="goodbye", frozen=True, kw_only=True):
    """The sender leaves on purpose: not a fault, do not suspect it, do not dial it again now."""


# --- membership --------------------------------------------------------------------------------


class MemberEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a member can be reached."""

    peer_id: PeerId
    addresses: Annotated[list[Address], Meta(max_length=16)]
    control_addresses: Annotated[list[Address], Meta(max_length=16)]


class JoinRequest(Message, tag="join", frozen=True, kw_only=True):
    """First and only request on a link that was opened with an invite's token."""

    addresses: Annotated[list[Address], Meta(max_length=16)]


class Welcome(Message, tag="welcome", frozen=True, kw_only=True):
    """Answer to a JoinRequest: the swarm's secret and who is in it."""

    swarm: Annotated[str, Meta(min_length=8, max_length=64)]
    epoch: Annotated[int, Meta(ge=0, le=1 << 31)]
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    founder: PeerId
    members: Annotated[list[MemberEntry], Meta(max_length=256)]


class MembershipNotice(Message, tag="notice", frozen=True, kw_only=True):
    """Signed statements about membership, opaque here (`node/standing.py`).

    The last frame to a member that was removed: whoever it is from, the signatures say why.
    """

    statements: Statements


class SecretRequest(Message, tag="ask_secret", frozen=True, kw_only=True):
    """Which secret has the swarm now? All that is heard on a link opened with an earlier one."""


class SecretAnswer(Message, tag="secret", frozen=True, kw_only=True):
    """Answer to a SecretRequest: what was signed, and the secret sealed to the asker's identity.

    Without a copy, the statements say that the asker was removed.
    """

    statements: Statements
    copy: Annotated[bytes, Meta(min_length=32, max_length=128)] | None


# --- nat: how a member looks from outside --------------------------------------------------------


class NatCard(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node knows of the way the outside sees it (`nat/facts.py`); part of other messages."""

    udp: NatKindName
    tcp: NatKindName
    port: Port
    is_reachable: bool
    reachable_hosts: Annotated[list[IpAddress], Meta(max_length=4)] = []
    public_hosts: Annotated[list[IpAddress], Meta(max_length=4)]
    mapped_addresses: Annotated[list[Address], Meta(max_length=4)]
    lan_hosts: Annotated[list[IpAddress], Meta(max_length=16)]
    n_observers: Annotated[int, Meta(ge=0, le=16)]
    age_s: Annotated[float, Meta(ge=0, le=1e9)]


class ViewRequest(Message, tag="view?", frozen=True, kw_only=True):
    """What address do you see me at, and where do you answer probes? I found you at `host`."""

    host: IpAddress


class View(Message, tag="view", frozen=True, kw_only=True):
    """Answer to a ViewRequest.

    `host` is the asker's address as this link shows it. Ports are the answerer's own: where it
    listens, of its STUN responder, and of a second socket each; 0 is none.
    `is_own_host` says that the host where it was found is its own, with no router before it.
    """

    host: IpAddress
    port: PortOrNone
    other_tcp_port: PortOrNone
    udp_port: PortOrNone
    other_udp_port: PortOrNone
    is_own_host: bool


class DialBack(Message, tag="dial_back", frozen=True, kw_only=True):
    """Please open one TCP connection to this port, at the address that this link shows of me.

    Never to any other address. Without a nonce it must be my listening port that answers; with
    one, a sealed packet of 52 bytes with that nonce is sent, and nothing is waited for.
    """

    port: Port
    nonce: ProbeNonce | None = None


class DialledBack(Message, tag="dialled_back", frozen=True, kw_only=True):
    """Answer to a DialBack: what came of it, and the address that was dialled."""

    outcome: DialBackOutcome
    host: IpAddress


class SendProbe(Message, tag="send_probe", frozen=True, kw_only=True):
    """Please send one small UDP packet from your other port to this one, at my link's address."""

    port: Port
    nonce: ProbeNonce


class ProbeSent(Message, tag="probe_sent", frozen=True, kw_only=True):
    """Answer to a SendProbe; not sent if the asker is over its rate, or there is no other port."""

    is_sent: bool


# --- paths -------------------------------------------------------------------------------------


class PathOffer(Message, tag="path_offer", frozen=True, kw_only=True):
    """What the sender knows of its NAT, to find a better way; answered by PathAnswer."""

    nat: NatCard


class PathAnswer(Message, tag="path_answer", frozen=True, kw_only=True):
    """What the other end knows of its own."""

    nat: NatCard


class PathTry(Message, tag="path_try", frozen=True, kw_only=True):
    """What the receiver is asked to do, now; answered by PathReady when it begins.

    `addresses` are where to dial, or the one address under which others see the sender's port.
    """

    attempt: Literal["dial", "punch", "birthday_easy", "birthday_hard", "webrtc"]
    addresses: Annotated[list[Address], Meta(max_length=8)] = []


class PathReady(Message, tag="path_ready", frozen=True, kw_only=True):
    """It begins; `address` is the one under which others see the port it has opened for it."""

    address: Address | None = None


class HostRequest(Message, tag="host_request", frozen=True, kw_only=True):
    """At which host do you see this peer? Asked before many packets go there."""

    peer: PeerId


class HostAnswer(Message, tag="host_answer", frozen=True, kw_only=True):
    """At this one; none if there is no link to it, or it goes another way."""

    host: IpAddress | None


class PathText(Message, tag="path_text", frozen=True, kw_only=True):
    """A description of a WebRTC transport, for the attempt under way."""

    text: Annotated[str, Meta(max_length=16384)]


# --- store -------------------------------------------------------------------------------------


class StoreSync(Message, tag="store", frozen=True, kw_only=True):
    """One message of the store's anti-entropy, opaque here (`store/sync.py`)."""

    body: Annotated[bytes, Meta(max_length=1 << 20)]


class Beat(Message, tag="beat", frozen=True, kw_only=True):
    """News of lives: signed beats and suspicions, opaque here (`store/awareness.py`)."""

    body: Annotated[bytes, Meta(max_length=4096)]


# --- relay -------------------------------------------------------------------------------------


class RelayOpen(Message, tag="relay-open", frozen=True, kw_only=True):
    """Asks a member to carry bytes to `peer`, which must have a link to it; RelayOpened answers."""

    peer: PeerId


class RelayOpened(Message, tag="relay-opened", frozen=True, kw_only=True):
    """A circuit waits: connect to the relay's port with a preamble of this id and key."""

    circuit: CircuitId
    key: CircuitKey


class RelayOffer(Message, tag="relay-offer", frozen=True, kw_only=True):
    """To the other end: `origin` wants to reach you over this circuit; connect likewise."""

    circuit: CircuitId
    key: CircuitKey
    origin: PeerId


class RelayDeclined(Message, tag="relay-declined", frozen=True, kw_only=True):
    """The other end will not come: the origin need not wait."""

    circuit: CircuitId


# --- lanes: bytes for threads that compute (`lane/opening.py`) -----------------------------------


class LaneOffer(Message, tag="lane-offer", frozen=True, kw_only=True):
    """The sender wants a lane for `purpose`, under this id and key; answered by LaneReady.

    From then on the receiver's port, and a local socket of its machine, take one connection that
    shows the key.
    """

    lane: LaneId
    key: LaneKey
    purpose: Annotated[bytes, Meta(max_length=256)]


class LaneReady(Message, tag="lane-ready", frozen=True, kw_only=True):
    """Done as asked."""

    lane: LaneId


class LaneDial(Message, tag="lane-dial", frozen=True, kw_only=True):
    """The sender of the offer cannot dial: please dial me for it. LaneReady says that it worked."""

    lane: LaneId


class LaneOverLink(Message, tag="lane-over-link", frozen=True, kw_only=True):
    """Nor can the receiver: the lane is carried by this link, as LaneData, after LaneReady."""

    lane: LaneId


class LaneData(Message, tag="lane-data", frozen=True, kw_only=True):
    """One message of a lane over this link; tensor "message" of bytes."""

    lane: LaneId


class LaneEnd(Message, tag="lane-end", frozen=True, kw_only=True):
    """The sender has closed a lane over this link, or knows none of this id."""

    lane: LaneId


# --- groups --------------------------------------------------------------------------------------


class JoinGroup(Message, tag="join-group", frozen=True, kw_only=True):
    """The hub of a stage asks one of its members to take part; answered by GroupJoined.

    Lanes for this `call` follow, and end those of earlier ones (`node/group/forming.py`); with
    `has_ring`, also one between each two members that are next to each other.
    """

    plan: Digest
    stage_idx: StageIdx
    call: Annotated[bytes, Meta(min_length=16, max_length=16)]
    has_ring: bool = False


class GroupJoined(Message, tag="group-joined", frozen=True, kw_only=True):
    """It waits for its lane; its KV cache has room for so many positions."""

    kv_tokens: TokenCount


# --- sessions ----------------------------------------------------------------------------------


class OpenSession(Message, tag="open", frozen=True, kw_only=True):
    """The head asks one stage to lease KV cache for a session; answered by SessionOpened.

    `previous` is the only peer whose Forward frames the stage will take, `next` the one it pushes
    its result to; at the two ends both are the head. `prefix` has a key for each 64 tokens that
    the prompt begins with (`node/prefix.py`); a stage may still hold what it computed for them.
    """

    session: SessionId
    plan: Digest
    epoch: Annotated[int, Meta(ge=0, le=1 << 31)]
    stage_idx: StageIdx
    n_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    previous: PeerId
    next: PeerId
    prefix: Annotated[list[PrefixKey], Meta(max_length=MAX_PREFIX_KEYS)] = []


class SessionOpened(Message, tag="opened", frozen=True, kw_only=True):
    """The lease stands; the stage waits for the first Forward.

    It holds the first `n_held` positions already, so that Forward may begin there, or before.
    """

    session: SessionId
    n_held: TokenCount = 0


class StageTrace(Struct, frozen=True, array_like=True):
    """What one stage did for one Forward."""

    compute_us: Microseconds
    queue_us: Microseconds
    received_bytes: ByteCount


class Forward(Message, tag="forward", frozen=True, kw_only=True):
    """Hidden states on their way along the pipeline; tensor "hidden" [n_tokens, hidden_size].

    `stage_idx` names the receiver; one past the last stage is the head. `n_return` is how many of
    the last rows the head wants back: 1 while decoding, 0 for every prefill chunk but the last
    (the head then gets a Forward without a tensor, which paces it).
    """

    session: SessionId
    epoch: Annotated[int, Meta(ge=0, le=1 << 31)]
    stage_idx: StageIdx
    step: Annotated[int, Meta(ge=0, le=1 << 40)]
    position: TokenCount
    n_return: TokenCount
    codec: Codec = "exact"
    trace: Annotated[list[StageTrace], Meta(max_length=MAX_STAGES)] = []


class CloseSession(Message, tag="close", frozen=True, kw_only=True):
    """The head is done with a session: free its lease."""

    session: SessionId


class SessionFailed(Message, tag="failed", frozen=True, kw_only=True):
    """A stage cannot go on with a session; sent to the head."""

    session: SessionId
    stage_idx: StageIdx
    code: ErrorCode


AnyMessage = (
    Ping
    | Pong
    | Hello
    | Admitted
    | Ack
    | Failure
    | Goodbye
    | JoinRequest
    | Welcome
    | MembershipNotice
    | SecretRequest
    | SecretAnswer
    | ViewRequest
    | View
    | DialBack
    | DialledBack
    | SendProbe
    | ProbeSent
    | PathOffer
    | PathAnswer
    | PathTry
    | PathReady
    | PathText
    | HostRequest
    | HostAnswer
    | StoreSync
    | Beat
    | RelayOpen
    | RelayOpened
    | RelayOffer
    | RelayDeclined
    | LaneOffer
    | LaneReady
    | LaneDial
    | LaneOverLink
    | LaneData
    | LaneEnd
    | JoinGroup
    | GroupJoined
    | OpenSession
    | SessionOpened
    | Forward
    | CloseSession
    | SessionFailed
)
