"""TLS 1.3 between members, with no authority but the secret they share.

The secret yields a certificate authority that each member derives for itself and signs its own
leaf with: who lacks the secret fails inside the handshake. The leaf carries the identity's
signature over the leaf key, which says *which* member it is. The same is done with an invite's
token key instead of the secret. Nothing here reads or writes a socket.
"""

from __future__ import annotations

import secrets
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID, ObjectIdentifier

from .errors import NotAMember
from .identity import Identity, peer_id_of, verify

# Under libp2p's private enterprise number, as its own TLS extension (libp2p tls spec) is.
_IDENTITY_EXTENSION = ObjectIdentifier("1.3.6.1.4.1.53594.1.1001")
_SIGNED_PREFIX = b"covey tls leaf key 1:"
_AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "covey")])
_LEAF_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "member")])
# Trust ends with the secret's epoch, not with a date: a node's clock may be wrong.
_VALID = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """The two ends of mutual TLS under one authority, for one identity."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def build_contexts(authority_seed: bytes, identity: Identity) -> TlsContexts:
    """Contexts that admit whoever derives the same authority from `authority_seed` (32 bytes)."""
    authority_key = Ed25519PrivateKey.from_private_bytes(authority_seed)
    authority = _certificate(
        _AUTHORITY_NAME,
        authority_key.public_key(),
        authority_key,
        x509.BasicConstraints(ca=True, path_length=0),
    )
    leaf_key = Ed25519PrivateKey.generate()
    proof = _proof(identity, leaf_key.public_key())
    leaf = _certificate(
        _LEAF_NAME,
        leaf_key.public_key(),
        authority_key,
        x509.UnrecognizedExtension(_IDENTITY_EXTENSION, proof),
    )
    contexts = TlsContexts(
        server=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        client=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    contexts.server.num_tickets = 0  # a resumed session would skip the certificates
    for context in (contexts.server, contexts.client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the identity in the leaf is checked instead
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authority.public_bytes(Encoding.DER))
        _load_leaf(context, leaf, leaf_key)
    return contexts


def authenticate(
    tls: ssl.SSLObject, *, expected: str | None, is_allowed: Callable[[str], bool]
) -> str:
    """The peer id at the other end of a finished handshake.

    Args:
        tls: the connection.
        expected: whom we dialled; None when they dialled us.
        is_allowed: False for whoever was revoked.

    Raises:
        NotAMember: no valid proof of identity, not the expected one, or not allowed.
    """
    certificate = tls.getpeercert(binary_form=True)
    if certificate is None:
        raise NotAMember("the peer showed no certificate")
    peer_id = _proven_peer_id(certificate)
    if expected is not None and peer_id != expected:
        raise NotAMember("another peer answers at this address")
    if not is_allowed(peer_id):
        raise NotAMember("the peer was removed from the swarm")
    return peer_id


def _proof(identity: Identity, leaf_key: Ed25519PublicKey) -> bytes:
    """Identity's public key (32 bytes) and its signature over the leaf key (64 bytes)."""
    return identity.public_key.public_bytes_raw() + identity.sign(
        _SIGNED_PREFIX + leaf_key.public_bytes_raw()
    )


def _proven_peer_id(certificate_der: bytes) -> str:
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        extension = certificate.extensions.get_extension_for_oid(_IDENTITY_EXTENSION).value
        leaf_key = certificate.public_key()
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise NotAMember("the peer's certificate names no identity") from error
    if not isinstance(extension, x509.UnrecognizedExtension) or len(extension.value) != 96:
        raise NotAMember("the peer's proof of identity is malformed")
    if not isinstance(leaf_key, Ed25519PublicKey):
        raise NotAMember("the peer's certificate has another kind of key")
    identity_key, signature = extension.value[:32], extension.value[32:]
    peer_id = peer_id_of(Ed25519PublicKey.from_public_bytes(identity_key))
    if not verify(peer_id, signature, _SIGNED_PREFIX + leaf_key.public_bytes_raw()):
        raise NotAMember("the peer's proof of identity is false")
    return peer_id


def _certificate(
    subject: x509.Name,
    key: Ed25519PublicKey,
    authority_key: Ed25519PrivateKey,
    extension: x509.BasicConstraints | x509.UnrecognizedExtension,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY_NAME)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_VALID[0])
        .not_valid_after(_VALID[1])
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(authority_key, None)
    )


def _load_leaf(context: ssl.SSLContext, leaf: x509.Certificate, key: Ed25519PrivateKey) -> None:
    """`load_cert_chain` takes only files: this one is gone at once, and was encrypted anyway."""
    password = secrets.token_bytes(32).hex().encode()
    pem = leaf.public_bytes(Encoding.PEM) + key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password)
    )
    with tempfile.TemporaryDirectory(prefix="covey-") as folder:  # made with mode 0700
        path = Path(folder) / "leaf.pem"
        path.write_bytes(pem)
        context.load_cert_chain(path, password=password)
