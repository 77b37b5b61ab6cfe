"""Tensor-parallel groups: who of a group holds how much of each block, and what a block then takes.

The members of a group meet twice in each block, after its attention and after its MLP, to add up
partial sums. Shares are such that these arrive together: each half of a block is handed out in its
smallest parts, always to the member whose sum would be complete first, the way to the hub counted.
That is the least time a half can take, exactly, since the parts are alike. KV heads are coarse
parts, and a spoke may get none; columns of the MLP are fine ones. One half cannot make up for the
other: the MLP begins with the sum of the attention.

Knows no span: a group runs every block alike, so what one block takes is all there is to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .allreduce import Algorithm, allreduce_s
from .network import Network, one_way_s
from .plan import Member, border_bytes_per_token
from .profile import STEP_BATCHES, DeviceProfile, ModelLayout, Workload
from .shares import handed_out
from .speed import Steps, block_step_s, chunk_depth_s, on_grid, prefill_s

SUM_CODEC = "fp16"  # of partial sums, unless a plan says otherwise

#: How much of the way to the hub counts when shares are made. All of it is best for a session
#: alone; the hub then has the most to do, and with many sessions the others wait for it.
DELAY_WEIGHTS = (1.0, 0.5, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTerm:
    """A group's shares, and what one block costs it."""

    members: tuple[Member, ...]  # in rank order
    hub_idx: int
    sum_codec: str
    decode_s: Steps  # a whole step through one block, partial sums added, by STEP_BATCHES
    chunk_s: float  # the same of one prefill chunk
    compute_s: float = 0.0  # of `decode_s[0]`, what the slowest shares compute; the rest is waiting
    algorithm: Algorithm = "star"  # of the all-reduce of one token
    token_bytes: int = 0  # that each spoke sends, and gets, for one token and block


@dataclass(frozen=True, slots=True)
class _Wires:
    """The links between the hub and its spokes; the hub's own entries are 0."""

    hub_idx: int
    rtt_s: tuple[float, ...]  # [n_members]
    s_per_byte: float  # of all transfers of one star all-reduce: each spoke's, both ways
    has_ring: bool  # whether each member has a link to the next


@dataclass(frozen=True, slots=True)
class _Work:
    """What each member would take for the two halves of a block if it did the whole of them."""

    n_rows: tuple[float, ...]  # of the steps: each of STEP_BATCHES, then a prefill chunk
    attention_s: tuple[tuple[float, ...], ...]  # [step][member]
    mlp_s: tuple[tuple[float, ...], ...]
    split_s: tuple[float, ...]  # [member], for each half, whatever its part of it


def group_term(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
    *,
    hub: str,
    sum_codec: str = SUM_CODEC,
) -> GroupTerm | None:
    """The best shares for these devices, and what they take; None where no group can be made.

    Args:
        layout: the model, whose blocks must be of the kind that can be split.
        devices: of the members, in the order of their ranks; two at least.
        network: must join the hub with every other member.
        request: whose depth of context and prefill chunk count.
        hub: peer id of the member that borders lead to and from.
        sum_codec: of partial sums on the wire.

    Returns:
        None too if a member is so slow or so far away that it would get no part of a block.
    """
    if len(devices) < 2 or not layout.can_split or layout.mlp_columns % layout.mlp_quantum:
        return None
    hub_idx = [device.peer_id for device in devices].index(hub)
    wires = _wires(devices, network, hub_idx)
    if wires is None:
        return None
    work = _work(layout, devices, request)
    terms: list[GroupTerm] = []
    for weight in DELAY_WEIGHTS:
        members = _shares(layout, devices, work, wires, sum_codec, weight)
        if members is None:
            break
        if all(term.members != members for term in terms):
            terms.append(_priced(layout, work, wires, members, sum_codec))
    return min(terms, key=lambda term: _balance(term, request), default=None)


def shares_term(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    network: Network,
    request: Workload,
    *,
    members: Sequence[Member],
    hub_idx: int,
    sum_codec: str = SUM_CODEC,
) -> GroupTerm | None:
    """What a group with the given shares takes; None if the hub cannot reach a member.

    `devices` are those of `members`, in the same order.
    """
    wires = _wires(devices, network, hub_idx)
    if wires is None:
        return None
    return _priced(layout, _work(layout, devices, request), wires, tuple(members), sum_codec)


def sum_bytes(layout: ModelLayout, sum_codec: str) -> int:
    """Bytes of one token's partial sums on the wire."""
    if sum_codec == "exact":
        return 4 * layout.hidden_size
    return border_bytes_per_token(layout, sum_codec)


def _shares(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    work: _Work,
    wires: _Wires,
    sum_codec: str,
    delay_weight: float,
) -> tuple[Member, ...] | None:
    """The members with their shares; None if one of them would get none."""
    wire_s = wires.s_per_byte * sum_bytes(layout, sum_codec)
    delays = [
        0.0 if i == wires.hub_idx else delay_weight * (rtt_s + wire_s)
        for i, rtt_s in enumerate(wires.rtt_s)
    ]
    n_units = layout.mlp_columns // layout.mlp_quantum
    heads = handed_out(layout.n_kv_heads, work.attention_s[0], delays)
    units = handed_out(n_units, work.mlp_s[0], delays)
    if any(n_heads + n_columns == 0 for n_heads, n_columns in zip(heads, units, strict=True)):
        return None
    return tuple(
        Member(device.peer_id, kv_heads=n_heads, mlp_columns=n_columns * layout.mlp_quantum)
        for device, n_heads, n_columns in zip(devices, heads, units, strict=True)
    )


def _balance(term: GroupTerm, request: Workload) -> float:
    """Of a token alone and one of a full house, the geometric mean, squared: less is better."""
    batch_idx = sum(batch <= request.n_sessions for batch in STEP_BATCHES) - 1
    return term.decode_s[0] * term.decode_s[batch_idx] / STEP_BATCHES[batch_idx]


def _work(layout: ModelLayout, devices: Sequence[DeviceProfile], request: Workload) -> _Work:
    """Attention is its share of a step's time, and all that depth adds; the rest is the MLP."""
    share, depth = layout.attention_share, request.depth
    weights_s = [
        *([block_step_s(device, batch) for device in devices] for batch in STEP_BATCHES),
        [prefill_s(device, request.chunk_tokens) for device in devices],
    ]
    depths_s = [
        *([n * depth * device.depth_s_per_block for device in devices] for n in STEP_BATCHES),
        [chunk_depth_s(device, request) for device in devices],
    ]
    return _Work(
        n_rows=(*STEP_BATCHES, request.chunk_tokens),
        attention_s=tuple(
            tuple(share * seconds + depth_s for seconds, depth_s in zip(*step, strict=True))
            for step in zip(weights_s, depths_s, strict=True)
        ),
        mlp_s=tuple(tuple((1.0 - share) * seconds for seconds in step) for step in weights_s),
        split_s=tuple(device.split_s_per_block / 2 for device in devices),
    )


def _priced(
    layout: ModelLayout,
    work: _Work,
    wires: _Wires,
    members: tuple[Member, ...],
    sum_codec: str,
) -> GroupTerm:
    token_bytes = sum_bytes(layout, sum_codec)
    heads = [member.kv_heads / layout.n_kv_heads for member in members]
    columns = [member.mlp_columns / layout.mlp_columns for member in members]
    blocks_s, computes_s = [], []
    for n_rows, *halves in zip(work.n_rows, work.attention_s, work.mlp_s, strict=True):
        parts = [
            [
                share * seconds + split_s if share else 0.0
                for share, seconds, split_s in zip(shares, half, work.split_s, strict=True)
            ]
            for shares, half in zip((heads, columns), halves, strict=True)
        ]
        blocks_s.append(on_grid(sum(_half_s(part, wires, token_bytes * n_rows) for part in parts)))
        computes_s.append(on_grid(sum(max(part) for part in parts)))
    return GroupTerm(
        members=members,
        hub_idx=wires.hub_idx,
        sum_codec=sum_codec,
        decode_s=tuple(blocks_s[:-1]),
        chunk_s=blocks_s[-1],
        compute_s=computes_s[0],
        algorithm=_allreduce(wires, token_bytes)[0],
        token_bytes=2 * token_bytes,
    )


def _half_s(parts: Sequence[float], wires: _Wires, n_bytes: float) -> float:
    """From one sum to the next, by the best way, given what each member computes in between.

    Two that exchange directly drift apart, by up to a message, until both wait as long. Of a star:
    a spoke begins when the last sum has come, and its part then has to travel back; the hub can
    compute meanwhile, and who has no part keeps nobody waiting. A ring waits for everybody.
    """
    if len(parts) == 2 and all(parts):
        return max(*parts, sum(parts) / 2 + _allreduce(wires, n_bytes)[1])
    star_s = _star_half_s(parts, wires, n_bytes)
    if not wires.has_ring:
        return star_s
    algorithm, reduce_s = _allreduce(wires, n_bytes)
    return min(star_s, max(parts) + reduce_s) if algorithm == "ring" else star_s


def _star_half_s(parts: Sequence[float], wires: _Wires, n_bytes: float) -> float:
    wire_s = wires.s_per_byte * n_bytes
    spokes = [
        part + rtt_s + wire_s
        for i, (part, rtt_s) in enumerate(zip(parts, wires.rtt_s, strict=True))
        if part > 0.0 and i != wires.hub_idx
    ]
    return max([parts[wires.hub_idx], *spokes])


def _allreduce(wires: _Wires, n_bytes: float) -> tuple[Algorithm, float]:
    """How partial sums of so many bytes are added up, and how long they are on their way.

    The mean of the spokes' bandwidths is such that all transfers together take what they take.
    """
    n_members = len(wires.rtt_s)
    return allreduce_s(
        n_members,
        n_bytes,
        latency_s=max(wires.rtt_s) / 2,
        bytes_per_s=2 * (n_members - 1) / wires.s_per_byte,
    )


def _wires(devices: Sequence[DeviceProfile], network: Network, hub_idx: int) -> _Wires | None:
    """The hub's links; None if one is missing. Ways there and back may be unlike."""
    peers = [device.peer_id for device in devices]
    hub = peers[hub_idx]
    rtts, s_per_byte = [], 0.0
    for peer_id in peers:
        if peer_id == hub:
            rtts.append(0.0)
            continue
        there, back = network.link(hub, peer_id), network.link(peer_id, hub)
        if there is None or back is None:
            return None
        rtts.append(one_way_s(there) + one_way_s(back))
        s_per_byte += 1.0 / there.bandwidth_bytes_per_s + 1.0 / back.bandwidth_bytes_per_s
    around = zip(peers, [*peers[1:], peers[0]], strict=True)
    has_ring = all(network.link(one, other) is not None for one, other in around)
    return _Wires(hub_idx, tuple(rtts), s_per_byte, has_ring)
