"""Leases on KV-cache memory: which session may keep how many bytes here, and until when.

Sans-IO: callers pass `now` in and act on what comes back; nothing here sleeps, logs or reads
a clock. Every lease lasts equally long and is re-inserted when renewed, so the dict is always
in order of expiry. Invariant: `0 <= free_bytes <= capacity_bytes`, also after a call raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CacheFull, LeaseExpired


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One session's right to `nbytes` of KV cache until `expires_at` (monotonic seconds)."""

    session: str
    nbytes: int
    expires_at: float


class LeaseTable:
    """Every lease on one stage; the only owner of its KV-cache budget.

    Args:
        bytes_per_token: `Stage.kv_bytes_per_token`.
        capacity_bytes: all that sessions may take together.
        ttl_s: how long a lease lasts without a renewal.
    """

    def __init__(self, *, bytes_per_token: int, capacity_bytes: int, ttl_s: float) -> None:
        if bytes_per_token < 1 or capacity_bytes < 0 or ttl_s <= 0:
            raise ValueError(f"{bytes_per_token=}, {capacity_bytes=}, {ttl_s=}")
        self.bytes_per_token = bytes_per_token
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self._ttl_s = ttl_s
        self._leases: dict[str, Lease] = {}  # oldest expiry first

    def grant(self, session: str, *, n_tokens: int, now: float) -> Lease:
        """Reserve room for `n_tokens`, in place of whatever `session` held before.

        Raises:
            CacheFull: the request does not fit. The old lease, if any, still stands.
        """
        if n_tokens < 1:
            raise ValueError(f"n_tokens = {n_tokens}")
        needed, held = self.bytes_per_token * n_tokens, self._leases.get(session)
        free = self.free_bytes + (held.nbytes if held else 0)
        if needed > free:
            raise CacheFull(needed_bytes=needed, free_bytes=free)
        self.free_bytes = free - needed
        return self._insert(session, needed, now)

    def renew(self, session: str, *, now: float) -> Lease:
        """Restart the time of a lease; called once for each frame of the session.

        Raises:
            LeaseExpired: unknown, or past its time even if `expire` has not run since.
        """
        held = self._leases.get(session)
        if held is None or held.expires_at <= now:
            raise LeaseExpired(session)
        return self._insert(session, held.nbytes, now)

    def release(self, session: str) -> None:
        """End a lease before its time; nothing happens if there is none."""
        held = self._leases.pop(session, None)
        if held is not None:
            self.free_bytes += held.nbytes

    def expire(self, *, now: float) -> list[Lease]:
        """End the leases past their time; return them so that the caller frees the tensors."""
        ended = [lease for lease in self._leases.values() if lease.expires_at <= now]
        for lease in ended:
            self.release(lease.session)
        return ended

    def next_deadline(self) -> float | None:
        """When to call `expire` next (monotonic seconds); None while nothing is leased."""
        return next((lease.expires_at for lease in self._leases.values()), None)

    def _insert(self, session: str, nbytes: int, now: float) -> Lease:
        self._leases.pop(session, None)
        lease = Lease(session=session, nbytes=nbytes, expires_at=now + self._ttl_s)
        self._leases[session] = lease
        return lease
