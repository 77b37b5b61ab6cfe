"""A group as its hub sees it: a `Stage` whose blocks are computed together with the spokes.

The hub tells its spokes what to do and does the same itself, so that all make the same calls in the
same order. What is aborted is made again under a new epoch, with the same input, and on new lanes
if one was lost; after a few attempts the group is broken, and with it every session.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from covey.node.engine.errors import CacheFull, EngineError, NonFiniteValues
from covey.node.engine.shard import Shard
from covey.node.engine.stage import PAGE_TOKENS, Step, StepResult
from covey.node.engine.tensors import EngineDtype, HiddenStates, finite_rows

from .all_reduce import AllReduce, Round
from .blocks import run_blocks
from .codec import Floats
from .commands import MAX_BODY_BYTES, MAX_STEPS, Close, Keep, Open, Rows, Run, pack
from .errors import GroupBroken, ReduceAborted
from .gather import gather

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
N_RECENT = 256  # rounds that tell how far apart parts arrive

T = TypeVar("T")

#: Makes the group's lanes anew and returns our end of its sums; raises GroupBroken. It blocks.
Form = Callable[[], AllReduce]


class GroupStage:
    """A `Stage` on the hub's shard and those of its spokes.

    `give_up`, `is_broken` and `spread` are for any thread, all else for one at a time.

    Args:
        shard: the hub's own.
        form: see `Form`; called on the thread that computes.
        on_broken: called once, there too, when the group cannot go on.
    """

    def __init__(
        self, shard: Shard, form: Form, on_broken: Callable[[], None] = lambda: None
    ) -> None:
        self.shard = shard
        self.span = shard.span
        self.dtype: EngineDtype = shard.dtype
        self.hidden_size = shard.hidden_size
        self.weight_bytes = shard.weight_bytes
        self.kv_bytes_per_token = max(shard.kv_bytes_per_token, 1)
        self.sum_wait_s = 0.0  # of all steps
        self._form = form
        self._on_broken = on_broken
        self._reduce: AllReduce | None = None
        self._why_broken: str | None = None
        self._is_agreed = False  # the spokes have the sessions that we have, under this epoch
        self._epoch = -1
        self._sessions: dict[str, int] = {}  # positions that each has room for
        self._max_rows = max(1, MAX_BODY_BYTES // (4 * shard.hidden_size))

    @property
    def is_broken(self) -> bool:
        """Whether it has to be formed anew, with `use`."""
        return self._why_broken is not None

    def use(self, reduce: AllReduce) -> None:
        """Begin, or begin again, on these lanes."""
        self._reduce, self._why_broken, self._is_agreed, self._epoch = reduce, None, False, -1

    def give_up(self, reason: str) -> None:
        """The group is broken; what is under way raises GroupBroken soon."""
        self._why_broken = self._why_broken or reason
        if (reduce := self._reduce) is not None:
            reduce.close()

    @property
    def rounds(self) -> Sequence[Round]:
        """The last ones, on the lanes of now."""
        reduce = self._reduce
        return () if reduce is None else list(reduce.rounds)

    def spread(self) -> float | None:
        """How far apart the members' parts are ready, as a share of a round; recent median."""
        reduce = self._reduce
        if reduce is None or not reduce.rounds:
            return None
        recent = islice(reversed(reduce.rounds), N_RECENT)
        return statistics.median(
            one.spread_s / max(one.busy_s[reduce.rank] + one.took_s, 1e-9) for one in recent
        )

    # --- the stage --------------------------------------------------------------------------------

    def open_session(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`; also GroupBroken."""
        self._sessions.pop(session, None)
        held = self.shard.open_session(session, n_tokens, prefix)
        word = pack(Open(session, n_tokens, list(prefix)))

        def open_everywhere(reduce: AllReduce) -> Sequence[float]:
            reduce.tell(*word, epoch=self._epoch)
            return gather(reduce, 1 + held // PAGE_TOKENS, self._epoch)

        n_pages = min(self._tried(open_everywhere))
        self._sessions[session] = n_tokens
        if not n_pages:
            self.close_session(session)
            raise CacheFull(needed_bytes=self.kv_bytes_per_token * n_tokens, free_bytes=0)
        return (int(n_pages) - 1) * PAGE_TOKENS

    def close_session(self, session: str) -> None:
        """See `Stage.close_session`; spokes that cannot be told hear of it with the next epoch."""
        self.shard.close_session(session)
        known = self._sessions.pop(session, None) is not None
        if known and self._reduce is not None and self._is_agreed and not self.is_broken:
            try:
                self._reduce.tell(*pack(Close(session)), epoch=self._epoch)
            except ReduceAborted:
                self._is_agreed = False

    def forward(self, session: str, position: int, hidden: HiddenStates) -> HiddenStates:
        """See `Stage.forward`; also GroupBroken."""
        [result] = self.forward_batch([Step(session, position, hidden)])
        if isinstance(result, EngineError):
            raise result
        return result

    def forward_batch(self, steps: Sequence[Step]) -> list[StepResult]:
        """See `Stage.forward_batch`; also GroupBroken."""
        results: dict[int, StepResult] = {}
        pending = list(enumerate(steps))
        while pending:
            taken = self._together(pending)
            found = self._tried(partial(self._run, list(taken.values())))
            results |= zip(taken, found, strict=True)
            pending = [each for each in pending if each[0] not in taken]
        return [results[idx] for idx in range(len(steps))]

    def _together(self, pending: Sequence[tuple[int, Step]]) -> Mapping[int, Step]:
        """The first steps that can be run at once: each of another session, and not too many."""
        taken: dict[int, Step] = {}
        sessions: set[str] = set()
        n_rows = 0
        for idx, step in pending:
            n_rows += len(step.hidden)
            if taken and (n_rows > self._max_rows or len(taken) == MAX_STEPS):
                break
            if step.session in sessions:
                break
            taken[idx] = step
            sessions.add(step.session)
        return taken

    def _run(self, steps: Sequence[Step], reduce: AllReduce) -> list[StepResult]:
        answers = enumerate(self.shard.begin(steps))
        results: dict[int, StepResult] = {idx: error for idx, error in answers if error}
        ready = [step for idx, step in enumerate(steps) if idx not in results]
        if ready:
            out = self._through(reduce, ready)
            rows = iter(np.split(out, np.cumsum([len(step.hidden) for step in ready])[:-1]))
            for idx, step in enumerate(steps):
                if idx not in results:
                    results[idx] = _checked(step, next(rows), self.dtype)
        return [results[idx] for idx in range(len(steps))]

    def _through(self, reduce: AllReduce, steps: Sequence[Step]) -> Floats:
        word = Run([Rows(step.session, step.position, len(step.hidden)) for step in steps])
        hidden: Floats = np.concatenate([step.hidden for step in steps])
        try:
            reduce.tell(*pack(word, hidden), epoch=self._epoch)
        except ReduceAborted:
            self.shard.end(is_done=False)
            raise
        self.sum_wait_s += run_blocks(self.shard, hidden, reduce, self._epoch)
        return hidden

    # --- attempts ---------------------------------------------------------------------------------

    def _tried(self, act: Callable[[AllReduce], T]) -> T:
        """What `act` comes to, in one of a few attempts. Raises GroupBroken."""
        reason = ""  # not the error itself, whose traceback would keep all that is on the stack
        for _ in range(MAX_ATTEMPTS):
            try:
                return act(self._agreed())
            except ReduceAborted as aborted:
                reason, self._is_agreed = str(aborted), False
                logger.warning("%s", reason)
                if aborted.is_lost and not self.is_broken:
                    self._form_anew()
            except BaseException:
                # What failed here left the spokes in the middle of something.
                if self._reduce is not None:
                    self._reduce.abort()
                self._is_agreed = False
                raise
        self._break(reason)
        raise GroupBroken(reason)

    def _agreed(self) -> AllReduce:
        """Our end of the sums, with an epoch in which all have the same sessions."""
        if self._why_broken is not None or self._reduce is None:
            raise GroupBroken(self._why_broken or "it was never formed")
        if not self._is_agreed:
            self._epoch = max(self._epoch, self._reduce.epoch) + 1
            sessions = list(self._sessions)
            self._reduce.tell(*pack(Keep(sessions)), epoch=self._epoch)
            # Of its ring, and of each session, how many lack it.
            lacking = self._reduce.reduce(None, (1, 1 + len(sessions)), epoch=self._epoch)
            if lacking is not None:
                n_rings, *n_of_each = lacking[0]
                if n_rings > 0:
                    self._reduce.drop_rings()
                self._forget([it for it, n in zip(sessions, n_of_each, strict=True) if n > 0])
            self._is_agreed = True
        return self._reduce

    def _forget(self, sessions: Sequence[str]) -> None:
        """A spoke has lost them; for their heads they are unknown from now on."""
        for session in sessions:
            self._sessions.pop(session)
            self.shard.close_session(session)

    def _form_anew(self) -> None:
        """New lanes for what is under way, unless others have given the group up meanwhile."""
        before = self._reduce
        if before is not None:
            before.close()
        try:
            made = self._form()
        except GroupBroken as error:
            if self._reduce is before:
                self._break(error.reason)
            raise
        is_wanted = self._reduce is before
        if is_wanted:  # and is closed by `give_up` from here on
            self._reduce, self._epoch = made, -1
        if not is_wanted or self.is_broken:
            made.close()
            raise GroupBroken(self._why_broken or "it was formed anew without its sessions")

    def _break(self, reason: str) -> None:
        self.give_up(reason)
        self._on_broken()


def _checked(step: Step, out: Floats, dtype: EngineDtype) -> StepResult:
    if finite_rows(out, dtype).all():
        return out
    is_received = not finite_rows(step.hidden, dtype).all()
    return NonFiniteValues(session=step.session, position=step.position, is_received=is_received)
