"""Typed views of what all members published, merged in a fixed order.

A record that is malformed, sits under the wrong key, or speaks for somebody else is left out and
listed in `Views.skipped`; one bad author cannot spoil a view for the rest. Decides nothing: which
plan is active, whose manifest to trust, is the node's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import RecordMalformed
from .replica import Replica
from .schema import (
    Admission,
    Delegation,
    Experience,
    IndexCache,
    MemberCard,
    ModelManifest,
    Pin,
    PlanRecord,
    ProfileRecord,
    Ready,
    Record,
    Revocation,
    Rotation,
)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Authored(Generic[R]):
    """A record and the member that signed it."""

    author: str
    record: R


class Views:
    """The records of a replica as they are now; nothing is cached between calls."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        # (author, key) -> why it was left out, as of the last view that met it
        self.skipped: dict[tuple[str, str], str] = {}

    def members(self) -> dict[str, MemberCard]:
        """Peer id -> the card it published of itself."""
        cards = self._records(MemberCard, MemberCard.prefix)
        return {entry.author: entry.record for entry in cards}

    def manifests(self) -> list[Authored[ModelManifest]]:
        """Every manifest; members may contradict each other about one digest."""
        return list(self._records(ModelManifest, ModelManifest.prefix))

    def plans(self, model: str) -> list[PlanRecord]:
        """The plans proposed for a model, by their own proposers."""
        found = self._records(PlanRecord, f"{PlanRecord.prefix}{model}/")
        return [entry.record for entry in found]

    def newest_pin(self, model: str) -> Authored[Pin] | None:
        """The last word on whether a plan of a model is pinned; of two at once, one for all."""
        found = self._records(Pin, f"{Pin.prefix}{model}")
        return max(found, key=lambda entry: (entry.record.version, entry.author), default=None)

    def ready(self, plan_digest: str) -> list[Authored[Ready]]:
        """Who said that which stage of a plan is ready; anybody may say so of any stage."""
        return list(self._records(Ready, f"{Ready.prefix}{plan_digest}/"))

    def profiles(self) -> list[Authored[ProfileRecord]]:
        """Every device and link profile, by whoever measured it."""
        return list(self._records(ProfileRecord, ProfileRecord.prefix))

    def experiences(self, model: str) -> list[Authored[Experience]]:
        """How fast everybody found others to run a model."""
        return list(self._records(Experience, f"{Experience.prefix}{model}"))

    def index_caches(self) -> list[Authored[IndexCache]]:
        """Which member holds which prefixes, and the patterns they were made with."""
        return list(self._records(IndexCache, IndexCache.prefix))

    def admissions(self) -> list[Authored[Admission]]:
        """Who says to have let in whom; anybody may say so of anybody."""
        return list(self._records(Admission, Admission.prefix))

    def statements(self) -> list[Delegation | Revocation | Rotation]:
        """Signed statements about membership, each by its author; signatures are not checked."""
        kinds: tuple[type[Delegation | Revocation | Rotation], ...] = (
            Delegation,
            Revocation,
            Rotation,
        )
        return [entry.record for kind in kinds for entry in self._records(kind, kind.prefix)]

    def _records(self, kind: type[R], prefix: str) -> Iterator[Authored[R]]:
        self.skipped = {at: why for at, why in self.skipped.items() if not at[1].startswith(prefix)}
        for author, key, value in self._replica.items(prefix):
            try:
                record = kind.from_value(value)
                _check_place(record, author=author, key=key)
            except RecordMalformed as error:
                self.skipped[author, key] = str(error)
                continue
            yield Authored(author, record)


def _check_place(record: Record, *, author: str, key: str) -> None:
    if record.key != key:
        raise RecordMalformed("it is stored under the key of another record")
    match record:
        case (
            MemberCard(peer_id=speaker)
            | PlanRecord(proposer=speaker)
            | Delegation(by=speaker)
            | Revocation(by=speaker)
            | Rotation(by=speaker)
        ) if speaker != author:
            raise RecordMalformed("it speaks for another member")
