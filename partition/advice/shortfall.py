"""Why no plan exists, or none on one device: how much is missing, of what, and what would do.

Sentences name peers by their ids; whoever shows them puts the names of machines in their place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from covey.partition.errors import PlanInfeasible
from covey.partition.memory import (
    WINDOW_BLOCKS,
    block_cap,
    head_bytes,
    kv_bytes_per_block,
    stage_bytes,
)
from covey.partition.plan import Span
from covey.partition.profile import DeviceProfile, ModelLayout, Workload

LEAST_CONTEXT = 256  # tokens of a session; with less there is nothing to plan for


def infeasible(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    request: Workload,
    head: str | None,
    *,
    may_stream: bool = False,
) -> PlanInfeasible:
    """What is missing: devices, room or links. There is no plan, the caller has found.

    With `may_stream`, weights may come from disk, which asks for less.
    """
    everything = stage_bytes(layout, Span(0, layout.n_blocks), request, is_head=True)
    if not devices:
        return PlanInfeasible(
            "no device has a profile for this model; start one that gives "
            f"{_mb(everything)} of memory, or several that do so together",
            missing_blocks=layout.n_blocks,
            missing_bytes=everything,
        )
    room = sum(
        most_blocks(layout, one, request, head_bytes(layout) if one.peer_id == head else 0)
        for one in devices
    )
    missing_blocks = max(0, layout.n_blocks - room)
    usable = sum(one.memory_bytes for one in devices if block_cap(one) > 0)
    missing_bytes = max(0, everything - usable)
    if missing_blocks:
        block_bytes = max(layout.block_bytes) + kv_bytes_per_block(layout, request)
        missing_bytes = max(missing_bytes, missing_blocks * block_bytes)
    if missing_blocks or missing_bytes:
        remedies = _remedies(layout, devices, request, head, missing_bytes)
        if may_stream:
            enough = streaming_bytes(layout, request)
            remedies.append(
                f"give one device {_mb(enough)}, which then reads weights from its disk"
            )
        ways = "; or ".join(remedies)
        return PlanInfeasible(
            f"the devices hold {min(room, layout.n_blocks)} of {layout.n_blocks} blocks and lack "
            f"{_mb(missing_bytes)}: {ways}",
            missing_bytes=missing_bytes,
            missing_blocks=missing_blocks,
        )
    return PlanInfeasible(
        "there is room for every block, but no chain of linked devices fits them; connect the "
        "devices that have room, or give more with --memory or --max-blocks"
    )


def streaming_bytes(layout: ModelLayout, request: Workload) -> int:
    """Memory with which one device runs the model, as many blocks from disk as there can be."""
    passing = sum(sorted(layout.block_bytes)[-WINDOW_BLOCKS:])
    kv_bytes = layout.n_blocks * kv_bytes_per_block(layout, request)
    return passing + kv_bytes + head_bytes(layout)


def why_no_single(
    layout: ModelLayout, devices: Sequence[DeviceProfile], request: Workload, head: str | None
) -> str:
    """Why no device runs the model on its own, in one line."""
    most, peer_id = max(
        (most_blocks(layout, device, request, reserved(layout, device, head)), device.peer_id)
        for device in devices
    )
    if most >= layout.n_blocks:
        return f"{peer_id} has room for all blocks but no measured link to the head {head}"
    return f"no device holds all {layout.n_blocks} blocks; {peer_id} holds {most}"


def reserved(layout: ModelLayout, device: DeviceProfile, head: str | None) -> int:
    """Memory that the head's weights take on `device` when it runs a single stage."""
    return head_bytes(layout) if head is None or device.peer_id == head else 0


def most_blocks(
    layout: ModelLayout, device: DeviceProfile, request: Workload, reserved_bytes: int
) -> int:
    """The longest span that fits on `device` beside what is reserved."""
    ends = span_ends(layout, device, request, reserved=reserved_bytes)
    return max(end - start for start, end in enumerate(ends))


def span_ends(
    layout: ModelLayout, device: DeviceProfile, request: Workload, *, reserved: int = 0
) -> list[int]:
    """[n_blocks + 1]: how far a span from each block may reach on `device`.

    `reserved` bytes of its memory are for something else.
    """
    kv_bytes = kv_bytes_per_block(layout, request)
    total = [0]  # memory of the first b blocks
    for n_bytes in layout.block_bytes:
        total.append(total[-1] + n_bytes + kv_bytes)
    budget, cap = device.memory_bytes - reserved, block_cap(device)
    # bisect gives the first total above the budget; the one before it still fits.
    reach = [bisect_right(total, used + budget) - 1 for used in total]
    return [max(b, min(end, b + cap)) for b, end in enumerate(reach)]


def _remedies(
    layout: ModelLayout,
    devices: Sequence[DeviceProfile],
    request: Workload,
    head: str | None,
    missing_bytes: int,
) -> list[str]:
    """What would do, the least trouble first; adding a device always would."""
    ways = []
    context = _context_that_fits(layout, devices, request, head)
    if context:
        ways.append(f"plan for a context of {context} tokens instead of {request.context_tokens}")
    uncapped = [replace(device, max_blocks=None) for device in devices]
    if uncapped != list(devices) and _fits(layout, uncapped, request, head):
        capped = [one.peer_id for one in devices if block_cap(one) < layout.n_blocks]
        ways.append(f"raise --max-blocks of {', '.join(sorted(capped))}")
    ways.append(f"give {_mb(missing_bytes)} more with --memory, or add a device that has it")
    return ways


def _context_that_fits(
    layout: ModelLayout, devices: Sequence[DeviceProfile], request: Workload, head: str | None
) -> int:
    """The longest context, halved and halved again, with which there is room; 0 if none has."""
    context = request.context_tokens // 2
    while context >= LEAST_CONTEXT:
        if _fits(layout, devices, replace(request, context_tokens=context), head):
            return context
        context //= 2
    return 0


def _fits(
    layout: ModelLayout, devices: Sequence[DeviceProfile], request: Workload, head: str | None
) -> bool:
    """Whether there is room for all blocks, links aside; some device has the head's weights too."""
    rooms, lost = 0, []  # `lost`: what being the head would cost each device that could be it
    for device in devices:
        room = most_blocks(layout, device, request, 0)
        rooms += room
        if device.peer_id == head or (head is None and room):
            beside = most_blocks(layout, device, request, head_bytes(layout))
            if beside or head is not None:
                lost.append(room - beside)
    return bool(lost) and rooms - min(lost) >= layout.n_blocks


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f} MB"
