"""Anti-entropy between two ends: what is sent, how much of it, and when it stops."""

from __future__ import annotations

from collections import deque

import pytest

from covey.store.document import Document
from covey.store.errors import RejectReason, UpdateRejected
from covey.store.replica import Replica
from covey.store.sync import (
    MAX_ENVELOPES_PER_BATCH,
    MAX_MESSAGE_BYTES,
    SyncSession,
    is_batch,
    is_summary,
)
from support.swarm_keys import replica_of, sealed


def converse(one: SyncSession, other: SyncSession) -> list[bytes]:
    """Deliver what one end's hello sets off until both fall silent; return all messages."""
    said, queue = [], deque([(other, one, one.hello())])
    while queue:
        receiver, sender, message = queue.popleft()
        said.append(message)
        queue.extend((sender, receiver, answer) for answer in receiver.receive(message))
        assert len(said) < 100
    return said


def sessions(*replicas: Replica) -> list[SyncSession]:
    return [SyncSession(replica) for replica in replicas]


def test_one_hello_makes_both_ends_equal() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.set("a", {})
    bob.set("b", {})
    converse(*sessions(alice, bob))
    assert list(alice.items()) == list(bob.items()) == [("alice", "a", {}), ("bob", "b", {})]


def test_equal_ends_say_one_hello_and_no_more() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.on_local(bob.apply)
    alice.set("a", {})
    ends = sessions(alice, bob)
    assert len(converse(*ends)) == 1


def test_a_summary_is_answered_only_by_who_holds_something_else() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.set("a", {})
    at_alice, at_bob = sessions(alice, bob)
    (hello,) = at_bob.receive(at_alice.summary())
    (batch,) = at_alice.receive(hello)
    at_bob.receive(batch)
    assert alice.state_vector() == bob.state_vector()
    assert at_bob.receive(at_alice.summary()) == at_alice.receive(at_bob.summary()) == []


def test_messages_are_told_apart_unread() -> None:
    alice = replica_of("alice")
    alice.set("a", {})
    session = SyncSession(alice)
    (batch,) = session.receive(SyncSession(replica_of("bob")).hello())
    assert [is_summary(m) for m in (session.summary(), session.hello(), batch)] == [1, 0, 0]
    assert [is_batch(m) for m in (session.summary(), session.hello(), batch)] == [0, 0, 1]
    assert not is_summary(session.summary() + b"x")


def test_a_batch_without_news_is_not_answered() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.set("a", {})
    at_bob = SyncSession(bob)
    (batch,) = SyncSession(alice).receive(at_bob.hello())
    assert len(at_bob.receive(batch)) == 1
    assert at_bob.receive(batch) == []


def test_messages_stay_under_their_limits() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    for n in range(MAX_ENVELOPES_PER_BATCH * 2 + 1):
        alice.set("small", {"n": n})
    for n in range(3):
        alice.set(f"large{n}", {"text": "x" * 60_000})
    said = converse(*sessions(alice, bob))
    assert max(map(len, said)) <= MAX_MESSAGE_BYTES
    assert alice.state_vector() == bob.state_vector()


def test_what_exceeds_one_reply_comes_with_the_next_hello() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    document = Document()
    for sequence in range(1, 21):
        update = document.write({"k": b'{"x":"%s"}' % (b"x" * 64_000 + b"%d" % sequence)})
        alice.apply(sealed("carol", sequence, update))
    ends = sessions(alice, bob)
    converse(*ends)
    assert alice.state_vector() == bob.state_vector()


def test_an_envelope_that_is_refused_does_not_stop_the_rest() -> None:
    alice, bob = replica_of("alice"), replica_of("bob")
    alice.set("a", {})
    bob.set("b", {})
    message = SyncSession(alice).receive(SyncSession(bob).hello())[0]
    tampered = message.replace(sealed_of(alice), b"\x01" + bytes(len(sealed_of(alice)) - 1))
    assert tampered != message
    SyncSession(bob).receive(tampered)
    assert bob.rejected == {RejectReason.MALFORMED: 1}


def sealed_of(replica: Replica) -> bytes:
    (data,) = replica.missing_for(b"\x90", max_bytes=9999)
    return data


def test_ends_that_refuse_each_others_envelopes_fall_silent() -> None:
    # Two authors each told the two ends different things under one number. What follows makes
    # sense to the end that knows its beginning only, so that each lacks something for ever.
    document = Document()
    told = [document.write({"k": b'{"n":%d}' % n}) for n in range(2)]
    alice, bob = replica_of("alice"), replica_of("bob")
    for knowing, other, author in ((alice, bob, "carol"), (bob, alice, "dave")):
        other.apply(sealed(author, 1, b"\x00\x00"))
        for sequence, payload in enumerate(told, start=1):
            knowing.apply(sealed(author, sequence, payload))
    assert len(converse(*sessions(alice, bob))) == 4
    assert alice.rejected == bob.rejected == {RejectReason.UNREADABLE: 1}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", RejectReason.MALFORMED),
        (b"\x01", RejectReason.MALFORMED),
        (b"\x02\x93\xa5hello\xc4\x01\x90\xc2", RejectReason.WRONG_VERSION),
        (b"\x01\x92\xa7summary\xc4\x0f" + bytes(15), RejectReason.MALFORMED),
        (b"\x01\x93\xa5howdy\xc4\x01\x90\xc2", RejectReason.MALFORMED),
        (b"\x01\x93\xa5hello\xc4\x01\x91\xc2", RejectReason.MALFORMED),
        (b"\x01\x93\xa5batch\xdd\xff\xff\xff\xff\xc2", RejectReason.MALFORMED),
        (b"\x01\x93\xa5batch\xdc\x00\x81" + b"\xc4\x00" * 129 + b"\xc2", RejectReason.MALFORMED),
        (bytes(MAX_MESSAGE_BYTES + 1), RejectReason.TOO_LARGE),
    ],
)
def test_bytes_that_are_no_message_are_refused(message: bytes, reason: RejectReason) -> None:
    with pytest.raises(UpdateRejected) as caught:
        SyncSession(replica_of("alice")).receive(message)
    assert caught.value.reason is reason
