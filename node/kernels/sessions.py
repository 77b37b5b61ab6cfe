"""Sessions and their pages of KV cache, as the native stage and the native shard hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from covey.node.engine.errors import CacheFull, UnknownSession
from covey.node.engine.sessions import check_capacity, check_position, check_room
from covey.node.engine.stage import PAGE_TOKENS
from covey.node.model.config import ModelConfig

from .library import Bytes, Library, PageTable, page_memory
from .pages import PagePool, SessionPages
from .structures import Shape


@dataclass(slots=True)
class PagedSession:
    """A session's pages and, as the kernels take them, their addresses."""

    pages: SessionPages[Bytes]
    table: PageTable
    is_long: bool  # see `ModelConfig.is_long`


class PagedSessions:
    """Sessions by name, on pages that those with the same beginning share.

    Args:
        config: of the model.
        library: that the pages are for.
        shape: of the blocks, as the library is told of it.
        n_blocks: that a page holds positions of.
        kv_bytes: of all pages; None leaves sessions unlimited.
        kept_bytes: of pages that no session holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        library: Library,
        shape: Shape,
        n_blocks: int,
        *,
        kv_bytes: int | None,
        kept_bytes: int,
    ) -> None:
        self._config = config
        self._page_bytes = library.page_bytes(shape, n_blocks)
        self._pool: PagePool[Bytes] = PagePool(
            page_bytes=self._page_bytes,
            make=self._new_page,
            copy=_copy,
            limit_bytes=kv_bytes,
            kept_bytes=kept_bytes,
        )
        self._sessions: dict[str, PagedSession] = {}

    @property
    def bytes_per_token(self) -> int:
        """Memory that one position of one session takes."""
        return self._page_bytes // PAGE_TOKENS

    @property
    def memory_bytes(self) -> int:
        """Memory that pages take now, of open sessions and kept for others."""
        return self._pool.memory_bytes

    def open(self, session: str, n_tokens: int, prefix: Sequence[bytes] = ()) -> int:
        """See `Stage.open_session`."""
        check_capacity(self._config, session, n_tokens)
        self.close(session)  # before the new one is made, not after
        is_long = self._config.is_long(n_tokens)
        if is_long:  # its keys are rotated by other angles than a short session's
            prefix = [key + b"long" for key in prefix]
        pages = self._pool.open(n_tokens, prefix)
        self._sessions[session] = PagedSession(pages, self._addresses(pages), is_long)
        return pages.length

    def close(self, session: str) -> None:
        """See `Stage.close_session`."""
        held = self._sessions.pop(session, None)
        if held is not None:
            self._pool.close(held.pages)

    def prepare(self, session: str, position: int, n_rows: int) -> PagedSession:
        """Cut the session back to `position` and make the next `n_rows` writable.

        Raises:
            UnknownSession, PositionGap, CacheOverflow: see `Stage.forward`.
            CacheFull: the system gives no memory.
        """
        held = self._sessions.get(session)
        if held is None:
            raise UnknownSession(session)
        pages, end = held.pages, position + n_rows
        check_position(session, position, pages.length)
        self._pool.rewind(pages, position)
        check_room(session, end, pages.capacity)
        if self._pool.prepare(pages, end):
            held.table = self._addresses(pages)
        return held

    def advance(self, held: PagedSession, end: int) -> None:
        """Positions up to `end` are written now."""
        if self._pool.advance(held.pages, end):
            held.table = self._addresses(held.pages)

    def _addresses(self, pages: SessionPages[Bytes]) -> PageTable:
        return PageTable([page.memory for page in pages.table], self._page_bytes)

    def _new_page(self) -> Bytes:
        try:
            return page_memory(self._page_bytes)
        except OSError as error:
            raise CacheFull(needed_bytes=self._page_bytes, free_bytes=0) from error


def _copy(source: Bytes, target: Bytes) -> None:
    target[:] = source
