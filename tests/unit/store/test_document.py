"""Documents: what one author's updates add up to, and what hostile ones cannot do."""

from __future__ import annotations

from typing import Any

import pytest
from pycrdt import Doc

from covey.store.author_log import AuthorLog, Entry
from covey.store.document import MAX_DOCUMENT_BYTES, Document
from covey.store.envelope import MAX_PAYLOAD_BYTES, decode
from covey.store.errors import RejectReason, StoreFull, UpdateRejected
from support.swarm_keys import sealed


def test_a_copy_that_applies_the_updates_is_equal() -> None:
    document, copy = Document(), Document()
    for changes in ({"a": b'{"n":1}', "b": b"{}"}, {"a": b'{"n":2}'}, {"b": None}, {"b": b"{}"}):
        assert copy.apply(document.write(changes)) == changes.keys()
    assert copy.values == document.values == {"a": b'{"n":2}', "b": b"{}"}


def test_writing_the_same_value_again_changes_no_key() -> None:
    document, copy = Document(), Document()
    copy.apply(document.write({"a": b"{}"}))
    assert copy.apply(document.write({"a": b"{}"})) == frozenset()


def test_a_document_goes_on_after_it_was_made_from_its_log() -> None:
    first = Document()
    log = [first.write({"a": b'{"n":1}'}), first.write({"a": b'{"n":2}'})]
    second = Document()
    for payload in log:
        second.apply(payload)
    log.append(second.write({"a": b'{"n":3}'}))
    third = Document()
    for payload in log:
        third.apply(payload)
    assert third.values == {"a": b'{"n":3}'}


def test_a_snapshot_forgets_what_ten_thousand_overwrites_left_behind() -> None:
    document = Document()
    for i in range(10_000):
        document.write({f"key{i % 100}": b'{"n":%d}' % i})
    fresh, snapshot = document.compacted()
    assert fresh.values == document.values
    assert document.nbytes() > 40_000
    assert fresh.nbytes() == len(snapshot) < 100 * 32


def test_a_full_document_takes_no_more_and_its_snapshot_fits_an_envelope() -> None:
    document = Document()
    n_written = MAX_DOCUMENT_BYTES // (len("k1000") + len(b"{}") + 32)
    document.write({f"k{1000 + i}": b"{}" for i in range(n_written)})
    with pytest.raises(StoreFull, match="delete older records"):
        document.write({"k0": b"{}"})
    assert len(document.values) == n_written
    assert len(document.compacted()[1]) <= MAX_PAYLOAD_BYTES


def test_overwriting_a_full_document_at_once_fits_an_envelope() -> None:
    document = Document()
    keys = [f"k{i}" for i in range(5000)]
    document.write(dict.fromkeys(keys, b"{}"))
    assert len(document.write(dict.fromkeys(reversed(keys), b"{ }"))) <= MAX_PAYLOAD_BYTES


# Yjs update format 1 by hand: writers, items, client, clock; then the deletions.
_ITEM = b"\x28\x01\x01r\x01k\x01\x74\x02{}"


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "empty"),
        (b"\x00", "no deletions"),
        (b"\x00\x00\x00", "left over"),
        (b"\x01\x00\x01\x00\x00", "a writer without items makes the library panic"),
        (b"\x02\x01\x01\x00" + _ITEM + b"\x00", "a second writer"),
        (b"\x01\x01\x02\x00" + _ITEM + b"\x00", "another client id"),
        (b"\x01\x01\x01\x01" + _ITEM + b"\x00", "a gap, which the library would keep for ever"),
        (b"\x01\x01\x01\x00" + _ITEM.replace(b"\x01r", b"\x01s") + b"\x00", "another root"),
        (b"\x01\x01\x01\x00" + _ITEM.replace(b"\x01k", b"\x01\x20") + b"\x00", "no key"),
        (b"\x01\x01\x01\x00" + _ITEM.replace(b"\x02{}", b"\x02[]") + b"\x00", "no object"),
        (b"\x01\x01\x01\x00" + _ITEM.replace(b"\x01\x74", b"\x01\x77") + b"\x00", "a text"),
        (b"\x01\x01\x01\x00" + _ITEM.replace(b"\x28", b"\x27") + b"\x00", "a nested type"),
        (b"\x01\x01\x01\x00\xa8\x01\x00\x01\x74\x02{}\x00", "replaces itself"),
        (b"\x01\xff\xff\xff\xff\x07\x01\x00" + _ITEM, "two thousand million items"),
        (b"\x01\xff\xff\xff\xff\xff\xff\xff\x01", "a number over 32 bits"),
        (b"\x01\x01\x01\x00" + _ITEM[:-3] + b"\xff\xff\xff\x07{}\x00", "a huge value"),
        (b"\x00\x01\x01\x01\x00\x01", "deletes what does not exist"),
    ],
)
def test_a_payload_that_no_document_of_ours_makes_changes_nothing(payload: bytes, why: str) -> None:
    document = Document()
    with pytest.raises(UpdateRejected) as caught:
        document.apply(payload)
    assert caught.value.reason is RejectReason.UNREADABLE, why
    document.apply(b"\x01\x01\x01\x00" + _ITEM + b"\x00")
    assert document.values == {"k": b"{}"}


def test_a_failure_of_the_library_leaves_the_log_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    author = Document()
    one, two = (author.write({"k": b'{"n":%d}' % n}) for n in range(2))
    log = AuthorLog()
    log.append(entry(1, one))
    apply_update = Doc.apply_update

    def fail_half_way(doc: Doc[Any], update: bytes) -> None:
        apply_update(doc, update)
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(
            Doc,
            "apply_update",
            lambda doc, update: (
                fail_half_way(doc, update) if update == two else apply_update(doc, update)
            ),
        )
        with pytest.raises(UpdateRejected):
            log.append(entry(2, two))
    assert log.document.values == {"k": b'{"n":0}'}
    assert log.append(entry(2, two)) == {"k"}


def entry(sequence: int, payload: bytes) -> Entry:
    data = sealed("bob", sequence, payload)
    return Entry(decode(data), data)
