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

from .network import Network, one_way_s
from .plan import Member, border_bytes_per_token
from .profile import STEP_BATCHES, DeviceProfile, ModelLayout, Workload
from .speed import GRID_S, Steps, block_step_s, chunk_s_per_block, on_grid

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
    algorithm: str = "star"  # of the all-reduce of one token
    token_bytes: int = 0  # that each spoke sends, and gets, for one token and block


@dataclass(frozen=True, slots=True)
class _Wires:
    """The links between the hub and its spokes; the hub's own entries are 0."""

    rtt_s: tuple[float, ...]  # [n_members]
    s_per_byte: float  # of all transfers of one star all-reduce: each spoke's, both ways

    @property
    def n_spokes(self) -> int:
        return len(self.rtt_s) - 1


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
    terms: list[GroupTerm] = []
    for weight in DELAY_WEIGHTS:
        members = _shares(layout, devices, request, wires, hub_idx, sum_codec, weight)
        if members is None:
            break
        if all(term.members != members for term in terms):
            terms.append(_priced(layout, devices, wires, request, members, hub_idx, sum_codec))
    return min(terms, key=lambda term: _balance(term, request), default=None)


def _shares(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    request: Workload,
    wires: _Wires,
    hub_idx: int,
    sum_codec: str,
    delay_weight: float,
) -> tuple[Member, ...] | None:
    """The members with their shares; None if one of them would get none."""
    wire_s = wires.s_per_byte * sum_bytes(layout, sum_codec)
    delays = [
        0.0 if i == hub_idx else delay_weight * (rtt_s + wire_s)
        for i, rtt_s in enumerate(wires.rtt_s)
    ]
    n_units = layout.mlp_columns // layout.mlp_quantum
    attention = [_attention_s(layout, device, 1, request.depth) for device in devices]
    mlp = [_mlp_s(layout, device, 1) for device in devices]
    heads = _handed_out(layout.n_kv_heads, attention, delays)
    units = _handed_out(n_units, mlp, delays)
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
    return _priced(layout, devices, wires, request, tuple(members), hub_idx, sum_codec)


def sum_bytes(layout: ModelLayout, sum_codec: str) -> int:
    """Bytes of one token's partial sums on the wire."""
    if sum_codec == "exact":
        return 4 * layout.hidden_size
    return border_bytes_per_token(layout, sum_codec)


def _priced(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    wires: _Wires,
    request: Workload,
    members: tuple[Member, ...],
    hub_idx: int,
    sum_codec: str,
) -> GroupTerm:
    token_bytes = sum_bytes(layout, sum_codec)

    def block_s(attention: Sequence[float], mlp: Sequence[float], n_rows: float) -> float:
        """One block, from what each device would take for the whole of its two halves."""
        n_bytes = token_bytes * n_rows
        return _half_s(shared(attention, "kv_heads"), hub_idx, wires, n_bytes) + _half_s(
            shared(mlp, "mlp_columns"), hub_idx, wires, n_bytes
        )

    def shared(whole: Sequence[float], field: str) -> list[float]:
        """Seconds of each member's part; 0 where it has none."""
        total = sum(getattr(member, field) for member in members)
        return [
            seconds * getattr(member, field) / total + device.split_s_per_block / 2
            if getattr(member, field)
            else 0.0
            for seconds, member, device in zip(whole, members, devices, strict=True)
        ]

    chunks = [chunk_s_per_block(device, request) for device in devices]
    share = layout.attention_share
    alone = [
        (
            [_attention_s(layout, d, batch, request.depth) for d in devices],
            [_mlp_s(layout, d, batch) for d in devices],
        )
        for batch in STEP_BATCHES
    ]
    compute_s = max(shared(alone[0][0], "kv_heads")) + max(shared(alone[0][1], "mlp_columns"))
    return GroupTerm(
        members=members,
        hub_idx=hub_idx,
        sum_codec=sum_codec,
        decode_s=tuple(
            on_grid(block_s(*halves, batch))
            for halves, batch in zip(alone, STEP_BATCHES, strict=True)
        ),
        chunk_s=on_grid(
            block_s(
                [share * s for s in chunks],
                [(1.0 - share) * s for s in chunks],
                request.chunk_tokens,
            )
        ),
        compute_s=on_grid(compute_s),
        algorithm=_allreduce_s(wires, token_bytes)[0],
        token_bytes=2 * token_bytes,
    )


def _attention_s(layout: ModelLayout, device: DeviceProfile, batch: int, depth: int) -> float:
    """A whole block's attention: its share of the weights, and the context."""
    weights_s = layout.attention_share * block_step_s(device, batch)
    return weights_s + batch * depth * device.depth_s_per_block


def _mlp_s(layout: ModelLayout, device: DeviceProfile, batch: int) -> float:
    return (1.0 - layout.attention_share) * block_step_s(device, batch)


def _half_s(parts: Sequence[float], hub_idx: int, wires: _Wires, n_bytes: float) -> float:
    """From one sum at the hub to the next, given what each member computes in between.

    A spoke begins when the last sum has come and its part then has to travel back; the hub can
    compute meanwhile. Who has no part keeps nobody waiting.
    """
    algorithm, reduce_s = _allreduce_s(wires, n_bytes)
    if algorithm == "ring":
        return max(parts) + reduce_s
    wire_s = wires.s_per_byte * n_bytes
    spokes = [
        part + rtt_s + wire_s
        for i, (part, rtt_s) in enumerate(zip(parts, wires.rtt_s, strict=True))
        if part > 0.0 and i != hub_idx
    ]
    return max([parts[hub_idx], *spokes])


def _allreduce_s(wires: _Wires, n_bytes: float) -> tuple[str, float]:
    """The algorithm for so many bytes, and its seconds."""
    return "star", max(wires.rtt_s) + wires.s_per_byte * n_bytes


def _wires(devices: Sequence[DeviceProfile], network: Network, hub_idx: int) -> _Wires | None:
    """The hub's links; None if one is missing. Ways there and back may be unlike."""
    hub = devices[hub_idx].peer_id
    rtts, s_per_byte = [], 0.0
    for i, device in enumerate(devices):
        if i == hub_idx:
            rtts.append(0.0)
            continue
        there, back = network.link(hub, device.peer_id), network.link(device.peer_id, hub)
        if there is None or back is None:
            return None
        rtts.append(one_way_s(there) + one_way_s(back))
        s_per_byte += 1.0 / there.bandwidth_bytes_per_s + 1.0 / back.bandwidth_bytes_per_s
    return _Wires(tuple(rtts), s_per_byte)


def _handed_out(n_parts: int, whole_s: Sequence[float], delays: Sequence[float]) -> list[int]:
    """How many of `n_parts` alike each member gets, so that the last sum comes soonest.

    Member i, who would take `whole_s[i]` for all of them, is done with k parts k of these parts
    after `delays[i]`. The `n_parts` earliest of all such moments are the answer; to find them, the
    level up to which everybody is filled is worked out as if parts could be divided, and what
    rounding down leaves goes out one by one.
    """
    part_s = [max(seconds / n_parts, GRID_S) for seconds in whole_s]
    level = _water_level(n_parts, part_s, delays)
    counts = [
        min(n_parts, max(0, int((level - delay) / seconds)))
        for seconds, delay in zip(part_s, delays, strict=True)
    ]
    while sum(counts) > n_parts:  # only where rounding of floats has given one too many
        counts[counts.index(max(counts))] -= 1
    for _ in range(n_parts - sum(counts)):
        done = [
            delay + (count + 1) * seconds
            for count, seconds, delay in zip(counts, part_s, delays, strict=True)
        ]
        counts[done.index(min(done))] += 1
    return counts


def _water_level(n_parts: int, part_s: Sequence[float], delays: Sequence[float]) -> float:
    """When all would be done if parts could be divided: members join in the order of delays."""
    level, speed, done = 0.0, 0.0, 0.0
    for delay, seconds in sorted(zip(delays, part_s, strict=True)):
        if speed > 0.0 and done + (delay - level) * speed >= n_parts:
            break
        done += (delay - level) * speed
        level, speed = delay, speed + 1.0 / seconds
    return level + (n_parts - done) / speed
