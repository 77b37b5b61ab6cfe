"""A member of a group that is not its hub: hears the hub's words and does what they say.

On a thread of its own: it waits for the hub most of the time, and node and engine have other work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from covey.errors import CoveyError
from covey.node.engine.errors import EngineError
from covey.node.engine.shard import Shard
from covey.node.engine.stage import PAGE_TOKENS, Step
from covey.transport.lane.errors import LaneTimeout

from .all_reduce import AllReduce, Round
from .blocks import run_blocks
from .codec import Floats
from .commands import Close, Keep, Open, Run, Word, unpack
from .errors import ReduceAborted
from .gather import gather

logger = logging.getLogger(__name__)

HEAR_S = 60.0  # a group may have nothing to do for as long as it likes
JOIN_S = 30.0  # how long a step that is under way may take to end


class Spoke:
    """A shard that does what its hub says, over one set of lanes after the other.

    `serve`, `stop`, `close` and what is asked of it are for any thread.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.n_runs = 0
        self.compute_s = 0.0  # of all runs, waiting for sums included
        self.sum_wait_s = 0.0
        self._sessions: dict[str, int] = {}  # positions that each has room for
        self._lock = threading.Lock()
        self._reduce: AllReduce | None = None
        self._has_ring = True
        self._thread: threading.Thread | None = None

    @property
    def leased_bytes(self) -> int:
        """Memory that the KV cache of the sessions may take."""
        return self.shard.kv_bytes_per_token * sum(list(self._sessions.values()))

    @property
    def rounds(self) -> Sequence[Round]:
        """The last ones that were added up here, on the lanes of now."""
        reduce = self._reduce
        return () if reduce is None else list(reduce.rounds)

    @property
    def is_in_use(self) -> bool:
        """Whether its lanes stand, as far as is known, and there are sessions on it."""
        thread = self._thread
        return thread is not None and thread.is_alive() and bool(self._sessions)

    def serve(self, reduce: AllReduce, *, has_ring: bool = True) -> None:
        """From now on hear the hub on these lanes, and no more on those before. Blocks for it.

        With `has_ring` there is a lane to both members next to this one.
        """
        with self._lock:
            self._end()
            self._reduce, self._has_ring = reduce, has_ring
            self._thread = threading.Thread(
                target=self._hear, args=(reduce,), name="covey-spoke", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Close the lanes and wait until the shard is idle."""
        with self._lock:
            self._end()

    def close(self) -> None:
        """Close the lanes, without waiting."""
        if (reduce := self._reduce) is not None:
            reduce.close()

    def _end(self) -> None:
        self.close()
        if self._thread is not None:
            self._thread.join(JOIN_S)
        self._reduce = self._thread = None

    def _hear(self, reduce: AllReduce) -> None:
        try:
            while self._hear_one(reduce):
                pass
        finally:  # whatever ends this thread, the hub must not wait for it
            reduce.close()

    def _hear_one(self, reduce: AllReduce) -> bool:
        """Do what the next word says; False if there will be none."""
        try:
            epoch, message = reduce.hear(HEAR_S)
            self._take(reduce, epoch, *unpack(message, self.shard.hidden_size))
        except LaneTimeout:
            pass
        except ReduceAborted as error:
            logger.info("%s", error)
            return not error.is_lost
        except CoveyError as error:
            logger.warning("a step of the group failed here: %s", error)
            reduce.abort()
        return True

    def _take(self, reduce: AllReduce, epoch: int, word: Word, hidden: Floats | None) -> None:
        match word:
            case Keep(sessions=sessions):
                self._keep(reduce, epoch, sessions)
            case Open():
                gather(reduce, self._open(word), epoch)
            case Close(session=session):
                self._close(session)
            case Run() if hidden is not None:
                self._run(reduce, epoch, word, hidden)

    def _keep(self, reduce: AllReduce, epoch: int, sessions: list[str]) -> None:
        for session in self._sessions.keys() - set(sessions):
            self._close(session)
        here = [self._has_ring, *(session in self._sessions for session in sessions)]
        lacking = np.logical_not([here]).astype(np.float32)
        reduce.reduce(lacking, lacking.shape, epoch=epoch)

    def _open(self, word: Open) -> int:
        """One more than the pages of the prefix that are held; 0 if there is no room."""
        self._sessions.pop(word.session, None)
        try:
            held = self.shard.open_session(word.session, word.n_tokens, word.prefix)
        except EngineError as error:
            logger.warning("no session for the group: %s", error)
            return 0
        self._sessions[word.session] = word.n_tokens
        return 1 + held // PAGE_TOKENS

    def _close(self, session: str) -> None:
        self._sessions.pop(session, None)
        self.shard.close_session(session)

    def _run(self, reduce: AllReduce, epoch: int, word: Run, hidden: Floats) -> None:
        began_at = perf_counter()
        steps, start = [], 0
        for rows in word.steps:
            steps.append(Step(rows.session, rows.position, hidden[start : start + rows.n_rows]))
            start += rows.n_rows
        for error in self.shard.begin(steps):
            if error is not None:  # we differ from the hub, which has them all
                self.shard.end(is_done=False)
                raise error
        sum_wait_s = run_blocks(self.shard, hidden, reduce, epoch)
        self.n_runs += 1
        self.sum_wait_s += sum_wait_s
        self.compute_s += perf_counter() - began_at
