"""Where members were last seen alive, kept over a restart: ways into the swarm when others fail.

A member that comes back after a week finds the swarm through anybody it has met, not only through
who invited it. Sans-IO: the caller reads and writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta, Struct

MAX_MEMBERS = 256  # the longest unseen are forgotten
MAX_ADDRESSES = 16  # of one member

_Address = Annotated[str, Meta(min_length=3, max_length=128)]


class _Sighting(Struct, frozen=True):
    at: Annotated[float, Meta(ge=0, le=2**53)]  # unix seconds
    control_addresses: Annotated[tuple[_Address, ...], Meta(max_length=MAX_ADDRESSES)]


class Seen:
    """The members met before, last seen first."""

    def __init__(self) -> None:
        self._sightings: dict[str, _Sighting] = {}

    def note(self, peer_id: str, control_addresses: Iterable[str], *, at: float) -> None:
        """A member is alive, and its control plane is there."""
        addresses = tuple(a for a in control_addresses if 3 <= len(a) <= 128)[:MAX_ADDRESSES]
        if not addresses:
            return
        self._sightings[peer_id] = _Sighting(at, addresses)
        if len(self._sightings) > MAX_MEMBERS:
            del self._sightings[min(self._sightings, key=lambda peer: self._sightings[peer].at)]

    def forget(self, peer_id: str) -> None:
        """A member was removed."""
        self._sightings.pop(peer_id, None)

    def addresses(self) -> list[tuple[str, ...]]:
        """The control addresses of each member, last seen first."""
        newest_first = sorted(self._sightings.values(), key=lambda it: -it.at)
        return [sighting.control_addresses for sighting in newest_first]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"members": msgspec.to_builtins(self._sightings)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """What `to_dict` gave; empty if it is anything else: it is but a convenience."""
        seen = cls()
        try:
            found = msgspec.convert(state.get("members"), dict[str, _Sighting])
        except msgspec.ValidationError:
            return seen
        newest = sorted(found, key=lambda peer: -found[peer].at)[:MAX_MEMBERS]
        seen._sightings = {peer: found[peer] for peer in newest}
        return seen
