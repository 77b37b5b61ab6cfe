"""What members found others to take, and what that makes of their profiles: a pure rule.

A profile is its owner's word. Whoever is the head of a session sees what the stages of others took
and says so in its own document; every member combines what it reads in the same way:

- Observations only ever make a member slower than it says. Nobody can make another look faster.
- The median of all observers counts, of two in the middle the one that finds it faster. So one who
  lies can expel nobody whom another has used as well, and to shield a liar takes as many liars as
  there are honest observers.
- A lone observer's word counts in full. In a household one machine may do all the asking, and what
  it finds is all there is to know; lying about others, it gains nothing but their blocks.
- One session is an accident: an observer counts from `MIN_SESSIONS` on.
- Up to `TOLERATED` times its word, a member was just busy, and its own moving averages will say
  so. From `GROSS` times on the whole difference counts; in between it is phased in, so that no
  small change in what was observed makes a large one in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .bounds import check_name, check_real, check_whole
from .profile import MAX_SECONDS, MIN_SECONDS, DeviceProfile

MIN_SESSIONS = 2
TOLERATED, GROSS = 1.25, 2.0
MAX_SLOWNESS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one member found another to take, running one model."""

    observer: str
    peer_id: str
    decode_s_per_block: float  # what the observed one's profile would have to say
    n_sessions: int  # that it is an average of

    def __post_init__(self) -> None:
        """Check every bound."""
        check_name("observation.observer", self.observer)
        check_name("observation.peer_id", self.peer_id)
        check_real(
            "observation.decode_s_per_block", self.decode_s_per_block, MIN_SECONDS, MAX_SECONDS
        )
        check_whole("observation.n_sessions", self.n_sessions, 1, 1 << 31)


def slowness(claimed: DeviceProfile, observations: Sequence[Observation]) -> float:
    """How many times slower than it says a device is to be taken for; at least 1."""
    found = {
        seen.observer: seen.decode_s_per_block / claimed.decode_s_per_block
        for seen in observations
        if seen.peer_id == claimed.peer_id != seen.observer and seen.n_sessions >= MIN_SESSIONS
    }
    if not found:
        return 1.0
    ratio = sorted(found.values())[(len(found) - 1) // 2]
    if ratio >= GROSS:
        return min(ratio, MAX_SLOWNESS)
    phased_in = max(0.0, ratio - TOLERATED) / (GROSS - TOLERATED)
    return 1.0 + phased_in * (GROSS - 1.0)


def corrected(claimed: DeviceProfile, observations: Sequence[Observation]) -> DeviceProfile:
    """The profile that plans are made with: what a device says, as slow as others find it.

    A device that is slower than it says is so in all its work, prompts and the head's included.
    Its memory and its disk are nobody else's to see.
    """
    return slowed(claimed, slowness(claimed, observations))


def slowed(device: DeviceProfile, factor: float) -> DeviceProfile:
    """A device that takes `factor` times as long for everything it computes; below 1, is faster."""
    if factor == 1.0:
        return device

    def times(seconds: float) -> float:
        return min(max(seconds * factor, MIN_SECONDS), MAX_SECONDS) if seconds else 0.0

    return replace(
        device,
        decode_s_per_block=times(device.decode_s_per_block),
        prefill_s_per_token_per_block=times(device.prefill_s_per_token_per_block),
        head_s=times(device.head_s),
        batch_decode_s_per_block=tuple(map(times, device.batch_decode_s_per_block)),
        batch_head_s=tuple(map(times, device.batch_head_s)),
        depth_s_per_block=times(device.depth_s_per_block),
        prefill_s_per_block=tuple(
            (n_tokens, times(seconds)) for n_tokens, seconds in device.prefill_s_per_block
        ),
        step_s=times(device.step_s),
        split_s_per_block=times(device.split_s_per_block),
    )
