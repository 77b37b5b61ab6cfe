"""Plans for hardware one does not have: devices added or taken away, links replaced.

Changes are written as people type them, `add=pi5,link=lan` or `remove=attic`, and read here. What
they lead to is a set of profiles like any other, for the planner to search; nothing of it is ever
published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from covey.errors import CoveyError
from covey.partition.errors import PartitionError
from covey.partition.observed import slowed
from covey.partition.profile import MAX_BYTES, DeviceProfile, LinkProfile, ModelLayout

from .presets import (
    DEVICE_CLASSES,
    GIB,
    LINK_CLASSES,
    LinkClass,
    typical_device,
)

MAX_ADDED = 16  # devices in one question

Find = Callable[[str], str]  # the peer id of the member called so; may raise any CoveyError

_LINK = re.compile(r"(\d{1,5}(?:\.\d{1,3})?)ms/(\d{1,6}(?:\.\d{1,3})?)mbit")
_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([MG])i?B?", re.IGNORECASE)


class BadChange(PartitionError):
    """A change that cannot be understood; the text says what could be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """A machine more: of a kind, or another one like a member."""

    what: str
    link: LinkClass = LINK_CLASSES["lan"]
    memory_bytes: int | None = None
    speed: float = 1.0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """A member that is not there."""

    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Relink:
    """Other links: of a member to everybody, or of two members."""

    members: tuple[str, ...]  # one or two
    link: LinkClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A member that is faster, or gives more memory."""

    member: str
    memory_bytes: int | None = None
    speed: float = 1.0


Changes = tuple[Add | Remove | Relink | Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What there is to plan with, and what people call it."""

    devices: Mapping[str, DeviceProfile]
    links: tuple[LinkProfile, ...]
    names: Mapping[str, str]  # of devices that were added


def parse_changes(texts: Iterable[str]) -> Changes:
    """Read changes; each text may hold several, with commas between them.

        add=KIND_OR_MEMBER[,link=LINK][,memory=8G][,speed=2][,count=3]
        remove=MEMBER    link=MEMBER:LINK    link=MEMBER:MEMBER:LINK
        memory=MEMBER:8G    speed=MEMBER:2

    Raises:
        BadChange: names the part that is wrong, and what it could be.
    """
    changes: list[Add | Remove | Relink | Change] = []
    for text in texts:
        open_add = False  # whether options of an `add` may follow
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not value:
                raise BadChange(
                    f"{item.strip()!r} is no change: write add=pi5,link=lan or remove=NAME, "
                    "link=NAME:wifi, memory=NAME:8G, speed=NAME:2"
                )
            last = changes[-1] if changes else None
            if open_add and isinstance(last, Add) and ":" not in value and key in _ADD_OPTIONS:
                changes[-1] = _ADD_OPTIONS[key](last, value)
                continue
            changes.append(_change(key, value))
            open_add = key == "add"
    n_added = sum(change.count for change in changes if isinstance(change, Add))
    if n_added > MAX_ADDED:
        raise BadChange(f"{n_added} devices are too many to add at once: at most {MAX_ADDED}")
    return tuple(changes)


def changed(hardware: Hardware, changes: Changes, layout: ModelLayout, find: Find) -> Hardware:
    """The hardware after `changes`, which take effect one after the other.

    Args:
        find: who is called so; whom it finds has to be in `hardware` still.

    Raises:
        BadChange: a member is not there to be changed.
    """

    def present(text: str) -> str:
        peer_id = find(text)
        if peer_id not in hardware.devices:
            raise BadChange(f"{text} takes no part in plans of this model now")
        return peer_id

    for change in changes:
        match change:
            case Add():
                for _ in range(change.count):
                    hardware = _added(hardware, change, layout, present)
            case Remove():
                gone = present(change.member)
                left = {peer: one for peer, one in hardware.devices.items() if peer != gone}
                hardware = replace(hardware, devices=left)
            case Relink():
                peers = [present(member) for member in change.members]
                others = peers[1:] or [one for one in hardware.devices if one != peers[0]]
                links = _relinked(hardware.links, change.link, peers[0], others)
                hardware = replace(hardware, links=links)
            case Change():
                peer_id = present(change.member)
                device = _resized(hardware.devices[peer_id], change.memory_bytes, change.speed)
                hardware = replace(hardware, devices={**hardware.devices, peer_id: device})
    return hardware


def _change(key: str, value: str) -> Add | Remove | Relink | Change:
    if key == "add":
        return Add(what=value)
    if key == "remove":
        return Remove(member=value)
    members, colon, figure = value.rpartition(":")
    if key in ("link", "memory", "speed") and not (colon and members):
        raise BadChange(f"{key}={value}: say whose, as {key}=NAME:{value}")
    if key == "link":
        ends = tuple(members.split(":"))
        if len(ends) > 2:
            raise BadChange(f"{key}={value}: a link has two ends")
        return Relink(members=ends, link=_link(figure))
    if key == "memory":
        return Change(member=members, memory_bytes=_size(figure))
    if key == "speed":
        return Change(member=members, speed=_speed(figure))
    raise BadChange(f"{key!r} cannot be changed: add, remove, link, memory and speed can")


_ADD_OPTIONS: Mapping[str, Callable[[Add, str], Add]] = {
    "link": lambda add, value: replace(add, link=_link(value)),
    "memory": lambda add, value: replace(add, memory_bytes=_size(value)),
    "speed": lambda add, value: replace(add, speed=_speed(value)),
    "count": lambda add, value: replace(add, count=_count(value)),
}


def _link(text: str) -> LinkClass:
    if text in LINK_CLASSES:
        return LINK_CLASSES[text]
    match = _LINK.fullmatch(text)
    if match is None or float(match[2]) == 0:
        kinds = ", ".join(LINK_CLASSES)
        raise BadChange(f"{text!r} is no kind of link: {kinds}, or one like 5ms/100mbit")
    return LinkClass(rtt_s=float(match[1]) / 1e3, bandwidth_bytes_per_s=float(match[2]) * 1e6 / 8)


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    n_bytes = (
        0 if match is None else int(float(match[1]) * {"M": 1 << 20, "G": GIB}[match[2].upper()])
    )
    if not 0 < n_bytes <= MAX_BYTES:
        raise BadChange(f"{text!r} is no size of memory: write it like 512M or 8G")
    return n_bytes


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0.01 <= speed <= 100:  # also false for NaN
        raise BadChange(f"{text!r} is no speed: how many times as fast, from 0.01 to 100")
    return speed


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MAX_ADDED):
        raise BadChange(f"{text!r} devices cannot be added: from 1 to {MAX_ADDED}")
    return int(text[:4])


def _added(hardware: Hardware, add: Add, layout: ModelLayout, present: Find) -> Hardware:
    peer_id = f"what-if-{len(hardware.names) + 1}"
    if add.what in DEVICE_CLASSES:
        kind, called = DEVICE_CLASSES[add.what], add.what
        measured = hardware.devices.values()
        engines = sorted(device.engine for device in measured)
        step_s = sorted(device.step_s for device in measured)
        device = typical_device(
            kind,
            peer_id,
            layout,
            engine=engines[0] if engines else "native",
            step_s=step_s[len(step_s) // 2] if step_s else 0.0,
        )
    else:
        try:
            model = hardware.devices[present(add.what)]
        except CoveyError as error:
            kinds = ", ".join(DEVICE_CLASSES)
            raise BadChange(f"{add.what!r} is no kind of device ({kinds}) and: {error}") from error
        called = hardware.names.get(model.peer_id, add.what)
        device = replace(model, peer_id=peer_id)
    device = _resized(device, add.memory_bytes, add.speed)
    names = {**hardware.names, peer_id: _new_name(called, hardware.names.values())}
    links = _relinked(hardware.links, add.link, peer_id, list(hardware.devices))
    devices = {**hardware.devices, peer_id: device}
    return Hardware(devices=devices, links=links, names=names)


def _new_name(called: str, taken: Collection[str]) -> str:
    name = f"new-{called.removeprefix('new-')}"
    numbered = (f"{name}-{idx}" for idx in range(2, MAX_ADDED + 2))
    return name if name not in taken else next(one for one in numbered if one not in taken)


def _resized(device: DeviceProfile, memory_bytes: int | None, speed: float) -> DeviceProfile:
    if speed != 1.0:
        device = slowed(device, 1.0 / speed)
    return device if memory_bytes is None else replace(device, memory_bytes=memory_bytes)


def _relinked(
    links: Iterable[LinkProfile], kind: LinkClass, peer: str, others: Iterable[str]
) -> tuple[LinkProfile, ...]:
    pairs = {frozenset((peer, other)) for other in others}
    kept = [link for link in links if frozenset((link.a, link.b)) not in pairs]
    made = [link for pair in sorted(map(sorted, pairs)) for link in kind.between(*pair)]
    return (*kept, *made)
