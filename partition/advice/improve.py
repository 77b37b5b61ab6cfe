"""What would help a plan most: each of its devices and links made better in turn, and planned anew.

Two kinds of answer, by their price. A plan that stays as it is and gets a better part is priced in
microseconds, so that every point of a front has its answer. For one plan the most promising changes
are searched with, over few devices at most, which also finds what only another plan would gain;
its answers are never below the truth by more than what the devices left aside would add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from covey.partition.choose import Prefer, choose, cost
from covey.partition.errors import PartitionError
from covey.partition.evaluate import World, evaluate
from covey.partition.front.search import Candidate, pareto_front
from covey.partition.observed import slowed
from covey.partition.plan import Prediction
from covey.partition.profile import DeviceProfile

from .presets import WIRED, DirectedLinks

FASTER = 2.0  # "a device twice as fast"
MORE_MEMORY = 2
MIN_GAIN = 1.1  # less is not worth a word
MAX_SEARCHES = 4
SEARCHED_DEVICES = 5  # in each of them

Kind = Literal["wire", "connect", "speed", "memory", "blocks"]
Names = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """One thing made better, and what that gives."""

    kind: Kind
    peers: tuple[str, ...]  # the device; of `connect` both ends
    gain: float  # how many times better by the preference
    prediction: Prediction  # then
    is_replanned: bool  # by another plan than this one
    text: str

    def to_value(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "kind": self.kind,
            "peers": list(self.peers),
            "gain": self.gain,
            "ttft_s": self.prediction.ttft_s,
            "tpot_s": self.prediction.tpot_s,
            "throughput_tok_per_s": self.prediction.throughput_tok_per_s,
            "is_replanned": self.is_replanned,
            "text": self.text,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    kind: Kind
    peers: tuple[str, ...]
    world: World


def improvements(
    candidate: Candidate, world: World, *, prefer: Prefer, names: Names | None = None
) -> tuple[Improvement, ...]:
    """What would make `candidate`, as it is, better by at least `MIN_GAIN`; most first."""
    found = []
    for change in _part_changes(candidate, world):
        with suppress(PartitionError):
            better = evaluate(candidate.pipelines, change.world)
            found.append(_improvement(change, candidate, better, prefer, names or {}))
    return _worth_saying(found)


def replanned(
    candidate: Candidate, world: World, *, prefer: Prefer, names: Names | None = None
) -> tuple[Improvement, ...]:
    """What would help most if the plan may change with it; at most `MAX_SEARCHES` are tried.

    Never less than what `improvements` says of the same change.
    """
    simple = {(one.kind, one.peers): one for one in improvements(candidate, world, prefer=prefer)}
    changes = sorted(
        _all_changes(candidate, world),
        key=lambda change: (
            -simple[change.kind, change.peers].gain if (change.kind, change.peers) in simple else 0,
            change.kind,
            change.peers,
        ),
    )
    found = list(improvements(candidate, world, prefer=prefer, names=names))
    for change in _tried(changes):
        kept = _few(candidate, change, prefer)
        with suppress(PartitionError):
            front = pareto_front(
                world.layout,
                [change.world.devices[peer] for peer in kept],
                [link for link in change.world.links if {link.a, link.b} <= kept],
                request=world.request,
                scope=world.scope,
            )
            better = choose(front, prefer)
            found.append(_improvement(change, candidate, better, prefer, names or {}))
    return _worth_saying(found)


def _tried(changes: Sequence[_Change]) -> list[_Change]:
    """The first few; of each kind that pricing cannot judge one at least."""
    unpriced = [change for change in changes if change.kind in ("connect", "memory", "blocks")]
    kinds = {change.kind: change for change in reversed(unpriced)}
    picked = list(kinds.values())[: MAX_SEARCHES - 1]
    rest = [change for change in changes if change not in picked]
    return [*picked, *rest[: MAX_SEARCHES - len(picked)]]


def _worth_saying(found: Iterable[Improvement]) -> tuple[Improvement, ...]:
    best: dict[tuple[Kind, tuple[str, ...]], Improvement] = {}
    for one in found:
        known = best.get((one.kind, one.peers))
        if one.gain >= MIN_GAIN and (known is None or one.gain > known.gain):
            best[one.kind, one.peers] = one
    return tuple(sorted(best.values(), key=lambda one: (-one.gain, one.kind, one.peers)))


def _part_changes(candidate: Candidate, world: World) -> Iterator[_Change]:
    """Members of the plan made faster, or wired to the others of it."""
    peers = [peer for stage in candidate.stages for peer in stage.peers]
    links = DirectedLinks(world.links)
    for peer in peers:
        others = [other for other in peers if other != peer]
        if any(links.is_below(WIRED, peer, other) for other in others):
            better = links.improved(WIRED, peer, others)
            yield _Change(kind="wire", peers=(peer,), world=replace(world, links=better))
        device = slowed(world.devices[peer], 1.0 / FASTER)
        yield _Change(kind="speed", peers=(peer,), world=_with(world, device))


def _all_changes(candidate: Candidate, world: World) -> Iterator[_Change]:
    """Those, and what only another plan could use."""
    yield from _part_changes(candidate, world)
    used = {peer for stage in candidate.stages for peer in stage.peers}
    links = DirectedLinks(world.links)
    everyone = sorted(world.devices)
    for peer in everyone:
        device = world.devices[peer]
        if device.max_blocks is not None and device.max_blocks < world.layout.n_blocks:
            freed = replace(device, max_blocks=None)
            yield _Change(kind="blocks", peers=(peer,), world=_with(world, freed))
        if _is_short(device, world):
            bigger = replace(device, memory_bytes=MORE_MEMORY * device.memory_bytes)
            yield _Change(kind="memory", peers=(peer,), world=_with(world, bigger))
        others = [other for other in everyone if other != peer and links.has(peer, other)]
        if peer not in used and any(links.is_below(WIRED, peer, other) for other in others):
            better = links.improved(WIRED, peer, others)
            yield _Change(kind="wire", peers=(peer,), world=replace(world, links=better))
        for other in everyone:
            if peer < other and not links.has(peer, other):
                joined = links.improved(WIRED, peer, [other])
                change = replace(world, links=joined)
                yield _Change(kind="connect", peers=(peer, other), world=change)


def _is_short(device: DeviceProfile, world: World) -> bool:
    """Whether its memory keeps it from running the whole model."""
    layout, request = world.layout, world.request
    kv_bytes = layout.kv_bytes_per_token_per_block * request.context_tokens * request.n_sessions
    head = layout.embedding_bytes + layout.head_bytes
    return device.memory_bytes < sum(layout.block_bytes) + layout.n_blocks * kv_bytes + head


def _few(candidate: Candidate, change: _Change, prefer: Prefer) -> set[str]:
    """The devices to search with: those of the change and of the plan, then the fastest."""
    used = [peer for stage in candidate.stages for peer in stage.peers]
    devices = change.world.devices
    fastest = sorted(devices, key=lambda peer: (devices[peer].decode_s_per_block, peer))
    ordered = dict.fromkeys([*change.peers, *used, *fastest])
    return set(list(ordered)[: max(SEARCHED_DEVICES, len(used) if len(used) < 8 else 0)])


def _with(world: World, device: DeviceProfile) -> World:
    return replace(world, devices={**world.devices, device.peer_id: device})


def _improvement(
    change: _Change, before: Candidate, after: Candidate, prefer: Prefer, names: Names
) -> Improvement:
    gain = cost(before.prediction, prefer) / cost(after.prediction, prefer)
    is_replanned = after.pipelines != before.pipelines
    called = [names.get(peer, peer[-8:]) for peer in change.peers]
    what = {
        "wire": f"a wired link to {called[0]}",
        "connect": f"a wired link between {' and '.join(called)}",
        "speed": f"{called[0]} {FASTER:g} times as fast",
        "memory": f"{MORE_MEMORY} times the memory on {called[0]}",
        "blocks": f"no limit of blocks on {called[0]}",
    }[change.kind]
    how = ", with another plan" if is_replanned else ""
    return Improvement(
        kind=change.kind,
        peers=change.peers,
        gain=gain,
        prediction=after.prediction,
        is_replanned=is_replanned,
        text=f"{what} would give {gain:.2g}x{how}",
    )
