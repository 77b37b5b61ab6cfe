"""Pages under any order of sessions: nothing shared is written, nothing leaks, limits hold."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from covey.node.engine.errors import CacheFull
from covey.node.engine.stage import PAGE_TOKENS
from covey.node.kernels.pages import PagePool, SessionPages, page_count

PAGE_BYTES = 10
NAMES = "abcd"
LENGTHS = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 192, 200])

Memory = list[Any]  # what each position of a page holds
MakePool = Any


def keys_of(tokens: list[int]) -> list[bytes]:
    n_pages = len(tokens) // PAGE_TOKENS
    return [sha256(bytes(tokens[: PAGE_TOKENS * (i + 1)])).digest() for i in range(n_pages)]


class Sessions(RuleBasedStateMachine):
    """Sessions write tokens to their pages; a model of each keeps what it should hold."""

    @initialize(limit=st.sampled_from([None, 1, 3, 4, 6, 9]), kept=st.sampled_from([0, 1, 3, 9]))
    def begin(self, limit: int | None, kept: int) -> None:
        self.limit, self.kept = limit, kept
        self.n_made = 0
        self.pool: PagePool[Memory] = PagePool(
            page_bytes=PAGE_BYTES,
            make=self.make,
            copy=self.copy,
            limit_bytes=None if limit is None else limit * PAGE_BYTES + 3,
            kept_bytes=kept * PAGE_BYTES,
        )
        self.open: dict[str, SessionPages[Memory]] = {}
        self.tokens: dict[str, list[int]] = {}

    def make(self) -> Memory:
        return ["garbage"] * PAGE_TOKENS

    @staticmethod
    def copy(source: Memory, target: Memory) -> None:
        target[:] = source

    @rule(
        name=st.sampled_from(NAMES),
        start=st.sampled_from([0, 1]),
        length=LENGTHS,
        more=st.sampled_from([0, 1, 64]),
        changed=st.sampled_from([None, 0, 70, 150]),
    )
    def open_session(
        self, name: str, start: int, length: int, more: int, changed: int | None
    ) -> None:
        if name in self.open:
            self.pool.close(self.open.pop(name))
        prompt = [start] * length
        if changed is not None and changed < length:
            prompt[changed] = 2
        reserved = sum(session.n_reserved for session in self.open.values())
        try:
            session = self.pool.open(length + more, keys_of(prompt))
        except CacheFull:
            assert self.limit is not None
            assert reserved + page_count(length + more) > self.limit
            return
        assert self.limit is None or reserved + page_count(length + more) <= self.limit
        assert session.length % PAGE_TOKENS == 0
        assert session.length <= length
        self.open[name] = session
        self.tokens[name] = prompt[: session.length]
        self.prompts = getattr(self, "prompts", {}) | {name: prompt}

    @precondition(lambda self: self.open)
    @rule(data=st.data(), n=LENGTHS, back=st.sampled_from([0, 0, 0, 1, 2, 64, 100]))
    def forward(self, data: st.DataObject, n: int, back: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        session, tokens = self.open[name], self.tokens[name]
        position = max(len(tokens) - back, 0)
        end = min(position + n, session.capacity)
        if end == position:
            return
        if position < len(tokens):  # a rewind may go on with other tokens
            self.prompts[name] = tokens[:position] + [data.draw(st.sampled_from([0, 1, 7]))] * 300
        self.pool.rewind(session, position)
        self.pool.prepare(session, end)
        new = (self.prompts[name] + [9] * 300)[position:end]
        for at, token in enumerate(new, position):
            page = session.table[at // PAGE_TOKENS]
            assert page.n_holders == 1
            assert page.key is None
            page.memory[at % PAGE_TOKENS] = token
        is_broken = data.draw(st.sampled_from([False, False, False, True]))
        if is_broken:  # the rows were not finite
            self.tokens[name] = tokens[:position]
            return
        self.pool.advance(session, end)
        self.tokens[name] = tokens[:position] + new

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.pool.close(self.open.pop(name))

    @invariant()
    def every_session_holds_its_own_tokens(self) -> None:
        for name, session in getattr(self, "open", {}).items():
            tokens = self.tokens[name]
            assert session.length == len(tokens)
            held = [value for page in session.table for value in page.memory]
            assert held[: len(tokens)] == tokens

    @invariant()
    def counts_and_limits_hold(self) -> None:
        if not hasattr(self, "pool"):
            return
        holders: dict[int, int] = {}
        pages = {}
        for session in self.open.values():
            for page in session.table:
                holders[id(page)] = holders.get(id(page), 0) + 1
                pages[id(page)] = page
        assert all(page.n_holders == holders[at] for at, page in pages.items())
        n_kept = self.pool.n_pages - len(pages)
        assert 0 <= n_kept <= self.kept
        assert self.pool.memory_bytes == self.pool.n_pages * PAGE_BYTES
        reserved = sum(session.n_reserved for session in self.open.values())
        assert self.pool.reserved_bytes == reserved * PAGE_BYTES
        assert self.limit is None or self.pool.n_pages <= self.limit
        assert self.open or self.pool.reserved_bytes == 0

    def teardown(self) -> None:
        for session in getattr(self, "open", {}).values():
            self.pool.close(session)
        if hasattr(self, "pool"):
            assert self.pool.reserved_bytes == 0
            assert self.pool.n_pages <= self.kept


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_pages_of_the_session_that_ended_first_make_way_first() -> None:
    pool: PagePool[Memory] = PagePool(
        page_bytes=1, make=list, copy=lambda _source, _target: None, limit_bytes=4, kept_bytes=4
    )
    for prompt in ([0] * 128, [1] * 64):
        session = pool.open(128, keys_of(prompt))
        pool.prepare(session, len(prompt))
        pool.advance(session, len(prompt))
        pool.close(session)
    assert pool.n_pages == 3
    other = pool.open(128)
    pool.prepare(other, 128)
    found = pool.open(128, keys_of([0] * 128))  # its second page went, being useless alone
    assert found.length == 64
    pool.close(found)
    assert pool.open(64, keys_of([1] * 64)).length == 64


def test_calls_out_of_order_are_refused() -> None:
    pool: PagePool[Memory] = PagePool(
        page_bytes=1, make=list, copy=lambda _source, _target: None, limit_bytes=None, kept_bytes=0
    )
    session = pool.open(64)
    with pytest.raises(ValueError, match="end 65"):
        pool.prepare(session, 65)
    with pytest.raises(ValueError, match="position 1 of 0"):
        pool.rewind(session, 1)
    with pytest.raises(ValueError, match="capacity = 0"):
        pool.open(0)
