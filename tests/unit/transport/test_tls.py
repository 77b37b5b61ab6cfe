"""Mutual TLS under a derived authority, handshakes in memory."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

import pytest

from covey.transport import tls
from covey.transport.errors import NotAMember
from covey.transport.identity import Identity
from covey.transport.tls import TlsContexts, authenticate, build_contexts

A, B = Identity(bytes(32)), Identity(bytes([1] * 32))
SECRET, OTHER = b"s" * 32, b"o" * 32


def handshake(client: TlsContexts, server: TlsContexts) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.client.wrap_bio(to_client, to_server),
        server.server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends


def allow(peer_id: str) -> bool:
    return True


def test_both_ends_learn_who_the_other_is() -> None:
    client, server = handshake(build_contexts(SECRET, A), build_contexts(SECRET, B))
    assert authenticate(client, expected=B.peer_id, is_allowed=allow) == B.peer_id
    assert authenticate(server, expected=None, is_allowed=allow) == A.peer_id
    assert client.version() == server.version() == "TLSv1.3"


def test_another_secret_fails_inside_the_handshake() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(build_contexts(OTHER, A), build_contexts(SECRET, B))


def test_a_client_without_certificate_is_refused() -> None:
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(TlsContexts(nobody, nobody), build_contexts(SECRET, B))


def test_tls_1_2_is_refused() -> None:
    old = build_contexts(SECRET, A)
    old.client.minimum_version = ssl.TLSVersion.TLSv1_2
    old.client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        handshake(old, build_contexts(SECRET, B))


def test_another_identity_than_expected_is_refused() -> None:
    client, _ = handshake(build_contexts(SECRET, A), build_contexts(SECRET, B))
    with pytest.raises(NotAMember, match="another peer"):
        authenticate(client, expected=A.peer_id, is_allowed=allow)


def test_a_removed_member_is_refused() -> None:
    _, server = handshake(build_contexts(SECRET, A), build_contexts(SECRET, B))
    with pytest.raises(NotAMember, match="removed"):
        authenticate(server, expected=None, is_allowed=lambda peer_id: peer_id != A.peer_id)


def test_a_member_cannot_pass_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    proof_of_a = tls._proof(A, Identity.generate().public_key)  # seen in A's certificate
    monkeypatch.setattr(tls, "_proof", lambda identity, leaf_key: proof_of_a)
    forged = build_contexts(SECRET, B)
    _, server = handshake(forged, build_contexts(SECRET, B))
    with pytest.raises(NotAMember, match="false"):
        authenticate(server, expected=None, is_allowed=allow)


@pytest.mark.parametrize("proof", [b"", bytes(95), bytes(96), bytes(97)])
def test_a_malformed_proof_is_refused(monkeypatch: pytest.MonkeyPatch, proof: bytes) -> None:
    monkeypatch.setattr(tls, "_proof", lambda identity, leaf_key: proof)
    forged = build_contexts(SECRET, A)
    _, server = handshake(forged, build_contexts(SECRET, B))
    with pytest.raises(NotAMember):
        authenticate(server, expected=None, is_allowed=allow)


def test_no_key_file_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build_contexts(SECRET, A)
    assert list(tmp_path.iterdir()) == []
