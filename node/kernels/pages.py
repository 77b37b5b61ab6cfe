"""KV-cache pages of 64 positions: who holds which, and which may be written.

A session is a table of pages. Sessions that begin with the same tokens share pages, and pages of
ended sessions are kept for the next ones, least recently used first to go. The pool knows no
tokens: a page is found under an opaque key that says what it and all before it hold. What a page's
memory is, it does not know either: `make` makes one and `copy` copies one's content.

Opening reserves as many pages as the session may ever write, shared ones included, so whoever was
admitted never fails half way. Memory is taken when a page is first written.

Invariants, also after a call raised: a page that is shared or can be found under a key is never
handed out for writing; pages in memory never exceed the limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from covey.node.engine.errors import CacheFull
from covey.node.engine.stage import PAGE_TOKENS

M = TypeVar("M")


class Page(Generic[M]):
    """Memory for PAGE_TOKENS positions; `n_holders` sessions have it in their table."""

    __slots__ = ("key", "memory", "n_holders")

    def __init__(self, memory: M) -> None:
        self.memory = memory
        self.n_holders = 1
        self.key: bytes | None = None  # under which it can be found; its content is then fixed


class SessionPages(Generic[M]):
    """One session's pages; made by `PagePool.open`, changed only by its pool."""

    __slots__ = ("capacity", "keys", "length", "n_reserved", "table")

    def __init__(self, capacity: int, keys: list[bytes]) -> None:
        self.capacity = capacity  # positions
        self.length = 0  # positions that are filled
        self.n_reserved = page_count(capacity)
        self.keys = keys  # of the first pages, as long as the session keeps to its promise
        self.table: list[Page[M]] = []  # at least those of the filled positions


class PagePool(Generic[M]):
    """All pages of one stage.

    Args:
        page_bytes: of one page, for the limits.
        make: memory for one page; what it holds does not matter.
        copy: copy(source, target).
        limit_bytes: of all pages, held or kept; None leaves sessions unlimited.
        kept_bytes: of pages that no session holds.
    """

    def __init__(
        self,
        *,
        page_bytes: int,
        make: Callable[[], M],
        copy: Callable[[M, M], None],
        limit_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        if page_bytes < 1 or kept_bytes < 0 or (limit_bytes is not None and limit_bytes < 0):
            raise ValueError(f"{page_bytes=}, {limit_bytes=}, {kept_bytes=}")
        self.page_bytes = page_bytes
        self._make = make
        self._copy = copy
        self._limit = None if limit_bytes is None else limit_bytes // page_bytes
        self._most_kept = kept_bytes // page_bytes
        self._n_reserved = 0
        self._n_held = 0  # pages that some session holds
        self._found: dict[bytes, Page[M]] = {}
        self._kept: OrderedDict[bytes, Page[M]] = OrderedDict()  # held by none, oldest first

    @property
    def reserved_bytes(self) -> int:
        """What open sessions may take at most."""
        return self._n_reserved * self.page_bytes

    @property
    def memory_bytes(self) -> int:
        """What pages take, held or kept."""
        return self.n_pages * self.page_bytes

    @property
    def n_pages(self) -> int:
        """Pages in memory."""
        return self._n_held + len(self._kept)

    def open(self, capacity: int, prefix: Sequence[bytes] = ()) -> SessionPages[M]:
        """Reserve room for `capacity` positions; `length` says how many are filled already.

        Args:
            capacity: positions, at least 1.
            prefix: keys of the pages that the session promises to fill first, in order. Those
                that are found at once become its own; the others can be found when they are full.

        Raises:
            CacheFull: the limit does not allow it; nothing has changed.
        """
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}")
        needed = page_count(capacity)
        if self._limit is not None and needed > self._limit - self._n_reserved:
            raise CacheFull(
                needed_bytes=needed * self.page_bytes,
                free_bytes=(self._limit - self._n_reserved) * self.page_bytes,
            )
        session: SessionPages[M] = SessionPages(capacity, list(prefix[: capacity // PAGE_TOKENS]))
        self._n_reserved += needed
        for key in session.keys:
            page = self._found.get(key)
            if page is None:
                break
            self._hold(page)
            session.table.append(page)
        session.length = len(session.table) * PAGE_TOKENS
        return session

    def close(self, session: SessionPages[M]) -> None:
        """Give everything back; the session must not be used again."""
        # From the end, since a page is of no use without those before it.
        while session.table:
            self._release(session.table.pop())
        self._n_reserved -= session.n_reserved
        session.n_reserved = session.capacity = session.length = 0

    def rewind(self, session: SessionPages[M], position: int) -> None:
        """Forget the positions from `position` on, and what was promised about them."""
        if not 0 <= position <= session.length:
            raise ValueError(f"position {position} of {session.length}")
        if position < session.length:
            # What comes may be other tokens than the keys stand for.
            del session.keys[position // PAGE_TOKENS :]
            session.length = position
            while len(session.table) > page_count(position):
                self._release(session.table.pop())

    def prepare(self, session: SessionPages[M], end: int) -> bool:
        """Make positions [length, end) writable; returns whether the table changed.

        Nothing behind `length` may be written before, and nothing before it at all.
        """
        if not session.length <= end <= session.capacity:
            raise ValueError(f"end {end}: {session.length} of {session.capacity} are filled")
        changed = False
        if session.length % PAGE_TOKENS and end > session.length:
            changed = self._own_last(session)
        while len(session.table) < page_count(end):
            session.table.append(self._take())
            changed = True
        return changed

    def advance(self, session: SessionPages[M], end: int) -> bool:
        """Positions [length, end) are written now; returns whether the table changed.

        Pages that became full can be found from now on. If one with the same key can be found
        already, the session takes that and gives up its own, which holds the same.
        """
        first, session.length = session.length // PAGE_TOKENS, end
        changed = False
        for i in range(first, min(end // PAGE_TOKENS, len(session.keys))):
            page, key = session.table[i], session.keys[i]
            if page.key is not None:
                continue
            found = self._found.get(key)
            if found is None:
                page.key = key
                self._found[key] = page
                continue
            self._hold(found)
            session.table[i] = found
            self._release(page)
            changed = True
        return changed

    def _own_last(self, session: SessionPages[M]) -> bool:
        """Make the partly filled last page the session's alone."""
        page = session.table[-1]
        if page.n_holders == 1:
            if page.key is None:
                return False
            if self._limit is not None and self._n_held >= self._limit:
                # No room for a copy, as there is whenever a page is held twice.
                self._unpublish(page)
                return False
        own = self._take()
        self._copy(page.memory, own.memory)
        session.table[-1] = own
        self._release(page)
        return True

    def _take(self) -> Page[M]:
        """A new page; by the reservations there is room when kept ones make way."""
        if self._limit is not None and self.n_pages >= self._limit:
            self._drop_oldest()
        page = Page(self._make())
        self._n_held += 1
        return page

    def _hold(self, page: Page[M]) -> None:
        if page.n_holders == 0 and page.key is not None:
            del self._kept[page.key]
            self._n_held += 1
        page.n_holders += 1

    def _release(self, page: Page[M]) -> None:
        page.n_holders -= 1
        if page.n_holders:
            return
        self._n_held -= 1
        if page.key is not None:
            self._kept[page.key] = page
            if len(self._kept) > self._most_kept:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, page = self._kept.popitem(last=False)
        self._unpublish(page)

    def _unpublish(self, page: Page[M]) -> None:
        if page.key is not None:
            del self._found[page.key]
            page.key = None


def page_count(n_tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-n_tokens // PAGE_TOKENS)
