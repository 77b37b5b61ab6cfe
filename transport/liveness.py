"""When to ask a peer for a sign of life, when to give it up, when to close a link nobody uses.

Sans-IO: callers pass `now` (monotonic seconds) in and act on what comes back. The round-trip
estimate is Jacobson's (RFC 6298, section 2).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

RTT_WINDOW = 10  # answers


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessRules:
    """Times of one link, in seconds."""

    busy_ping_s: float = 1.0  # while a session depends on the link
    idle_ping_s: float = 20.0
    busy_silence_s: float = 2.5  # two lost heartbeats and a half
    idle_silence_s: float = 10.0  # after a ping; nobody waits, so a slow answer is no harm
    unused_s: float = 60.0


class Action(Enum):
    """What the owner of a link should do now."""

    WAIT = auto()
    PING = auto()
    SUSPECT = auto()  # the peer is as good as dead
    CLOSE = auto()  # the link is of no use to anybody


class Liveness:
    """What is known of one peer's life and of the use of its link."""

    def __init__(self, *, now: float, rules: LivenessRules | None = None) -> None:
        self.rules = rules or LivenessRules()
        self.srtt_s: float | None = None
        self._rttvar_s = 0.0
        self._last_rtts_s: deque[float] = deque(maxlen=RTT_WINDOW)
        self._heard_at = now
        self._spoke_at = now
        self._pinged_at = now
        self._used_at = now
        self._peer_pinged_at = float("-inf")
        self._peer_needed_at = float("-inf")
        self._busy_since: float | None = None

    @property
    def least_rtt_s(self) -> float | None:
        """The quickest of the last answers: what the way takes when nothing is in front of it."""
        return min(self._last_rtts_s, default=None)

    def set_busy(self, *, is_busy: bool, now: float) -> None:
        """Sessions began or ceased to depend on the link."""
        if is_busy and self._busy_since is None:
            self._busy_since = now
            self._pinged_at = now - self.rules.busy_ping_s  # ask at once
        elif not is_busy and self._busy_since is not None:
            self._busy_since = None
            self._used_at = now

    def heard(self, *, now: float) -> None:
        """Bytes came, of whatever kind."""
        self._heard_at = self._spoke_at = now

    def moved(self, *, now: float) -> None:
        """The link goes another way from now on: its times are to be measured anew."""
        self.srtt_s, self._rttvar_s = None, 0.0
        self._last_rtts_s.clear()
        self._heard_at = now
        self._pinged_at = self._spoke_at = now - self.rules.idle_ping_s  # ask at once

    def used(self, *, now: float) -> None:
        """A frame that was no heartbeat went either way."""
        self._used_at = now

    def peer_pinged(self, *, now: float) -> None:
        """A Ping came. One that follows soon on another means that the peer needs the link."""
        if now - self._peer_pinged_at < self.rules.idle_ping_s / 2:
            self._used_at = self._peer_needed_at = now
        self._peer_pinged_at = now

    def is_needed(self, *, now: float) -> bool:
        """Whether either end depends on the link, as far as its pings tell."""
        is_recent = now - self._peer_needed_at < self.rules.idle_ping_s / 2
        return self._busy_since is not None or is_recent

    def pinged(self, *, now: float) -> None:
        """A Ping was sent."""
        self._pinged_at = now

    def measured(self, rtt_s: float) -> None:
        """A Pong came after `rtt_s`."""
        self._last_rtts_s.append(rtt_s)
        if self.srtt_s is None:
            self.srtt_s, self._rttvar_s = rtt_s, rtt_s / 2
        else:
            self._rttvar_s += (abs(self.srtt_s - rtt_s) - self._rttvar_s) / 4
            self.srtt_s += (rtt_s - self.srtt_s) / 8

    def excuse(self, lag_s: float) -> None:
        """We ourselves did not run for `lag_s`: the silence is not the peer's."""
        self._heard_at += lag_s
        if self._busy_since is not None:
            self._busy_since += lag_s

    def next_action(self, *, now: float) -> Action:
        """What to do at `now`."""
        if now >= self._suspect_at():
            return Action.SUSPECT
        if now >= self._ping_at():
            return Action.PING
        if now >= self._close_at():
            return Action.CLOSE
        return Action.WAIT

    def next_deadline(self) -> float:
        """When `next_action` may next be something else than WAIT (monotonic seconds)."""
        return min(self._suspect_at(), self._ping_at(), self._close_at())

    def _ping_at(self) -> float:
        if self._busy_since is not None:
            return self._pinged_at + self.rules.busy_ping_s
        # Whatever else is said on an idle link is as good a sign of life.
        return max(self._pinged_at, self._spoke_at) + self.rules.idle_ping_s

    def _suspect_at(self) -> float:
        if self._busy_since is not None:
            # A slow link's answers take their time, and are no less alive.
            retransmit_s = 4 * self._rttvar_s + (self.srtt_s or 0.0)
            silence_s = max(self.rules.busy_silence_s, self.rules.busy_ping_s + retransmit_s)
            return max(self._heard_at, self._busy_since) + silence_s
        if self._heard_at >= self._pinged_at:
            return float("inf")  # nothing is asked that was not answered
        return self._pinged_at + self.rules.idle_silence_s

    def _close_at(self) -> float:
        return float("inf") if self._busy_since is not None else self._used_at + self.rules.unused_s
