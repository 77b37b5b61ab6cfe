"""Views: the records of honest members, whatever one bad author publishes."""

from __future__ import annotations

import msgspec

from covey.store.replica import Replica
from covey.store.schema import (
    BlobEntry,
    IndexCache,
    MemberCard,
    ModelManifest,
    PlanRecord,
    ProfileRecord,
    Ready,
    Record,
)
from covey.store.views import Authored, Views
from support.swarm_keys import MEMBERS, replica_of

DIGEST, OTHER = "0f" * 32, "1e" * 32
BLOB = BlobEntry("blk.0", 1, DIGEST)


def card(peer_id: str) -> MemberCard:
    return MemberCard(
        peer_id=peer_id,
        name=peer_id,
        addresses=(),
        control_addresses=(),
        models=(),
        max_blocks=None,
        memory_bytes=None,
        version="0",
        started_at=0.0,
    )


def plan(proposer: str, *, model: str = DIGEST) -> PlanRecord:
    return PlanRecord(plan={}, digest=DIGEST, model=model, epoch=1, proposer=proposer)


def meeting() -> dict[str, Replica]:
    """All members' replicas, each of which hears what the others write."""
    replicas = {author: replica_of(author) for author in MEMBERS}
    for writer in replicas.values():
        for reader in replicas.values():
            if reader is not writer:
                writer.on_local(reader.apply)
    return replicas


def publish(replica: Replica, record: Record) -> None:
    replica.set(record.key, record.to_value())


def test_every_member_sees_the_same_records() -> None:
    replicas = meeting()
    index = IndexCache(model=DIGEST, pattern="F", calibration=DIGEST, prefixes=())
    device = ProfileRecord(kind="device", value={"cores": 4})
    link = ProfileRecord(kind="link", value={}, peer="bob")
    ready = Ready(plan_digest=DIGEST, stage_idx=1, at=0.0)
    for author, replica in reversed(replicas.items()):
        publish(replica, card(author))
        publish(replica, plan(author))
        publish(replica, device)
    publish(replicas["alice"], link)
    publish(replicas["alice"], index)
    publish(replicas["alice"], ready)
    publish(replicas["alice"], plan("alice", model=OTHER))
    for replica in replicas.values():
        views = Views(replica)
        assert views.members() == {author: card(author) for author in MEMBERS}
        assert list(views.members()) == list(MEMBERS)
        assert views.plans(DIGEST) == [plan(author) for author in MEMBERS]
        assert views.plans(OTHER) == [plan("alice", model=OTHER)]
        assert views.ready(DIGEST) == [Authored("alice", ready)]
        assert views.ready(OTHER) == []
        assert views.index_caches() == [Authored("alice", index)]
        assert views.profiles() == [
            Authored("alice", device),
            Authored("alice", link),
            Authored("bob", device),
            Authored("carol", device),
            Authored("dave", device),
        ]
        assert views.skipped == {}


def test_members_may_contradict_each_other_about_a_model() -> None:
    replicas = meeting()
    for author, n_blocks in (("alice", 1), ("bob", 2)):
        manifest = ModelManifest(
            name="m",
            digest=DIGEST,
            architecture="llama",
            n_blocks=n_blocks,
            hidden_size=1,
            vocab_size=1,
            context_length=1,
            blobs=(BLOB,),
        )
        publish(replicas[author], manifest)
    found = Views(replicas["carol"]).manifests()
    assert [(entry.author, entry.record.n_blocks) for entry in found] == [("alice", 1), ("bob", 2)]


def test_a_record_that_speaks_for_another_member_is_left_out() -> None:
    replicas = meeting()
    publish(replicas["bob"], card("alice"))
    publish(replicas["bob"], plan("alice"))
    views = Views(replicas["carol"])
    assert views.members() == {}
    assert views.plans(DIGEST) == []
    assert views.skipped == {
        ("bob", "member"): "it speaks for another member",
        ("bob", plan("alice").key): "it speaks for another member",
    }


def test_a_malformed_record_is_left_out_until_it_is_mended() -> None:
    replicas = meeting()
    publish(replicas["alice"], card("alice"))
    replicas["bob"].set("member", {"peer_id": 7})
    views = Views(replicas["carol"])
    assert list(views.members()) == ["alice"]
    assert list(views.skipped) == [("bob", "member")]
    assert views.profiles() == []
    assert list(views.skipped) == [("bob", "member")]
    publish(replicas["bob"], card("bob"))
    assert list(views.members()) == ["alice", "bob"]
    assert views.skipped == {}


def test_a_record_under_the_key_of_another_is_left_out() -> None:
    replicas = meeting()
    replicas["bob"].set(plan("bob").key, msgspec.to_builtins(plan("bob", model=OTHER)))
    assert Views(replicas["carol"]).plans(DIGEST) == []
