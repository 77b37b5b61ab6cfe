"""The map from errors to the wire's codes: one to one where a class is bound to a code."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest

import covey.node
import covey.transport
from covey.errors import CoveyError
from covey.node.engine.errors import CacheFull, CacheOverflow, LeaseExpired, UnknownSession
from covey.node.switch import _CODES, WrongFrame, code_of
from covey.transport.errors import (
    ErrorCode,
    LinkBroken,
    LinkClosed,
    ProtocolViolation,
    RefusedByPeer,
)
from covey.transport.messages import AnyMessage, Failure, SessionFailed


def classes(base: type[CoveyError] = CoveyError) -> Iterator[type[CoveyError]]:
    for child in base.__subclasses__():
        if child.__module__.startswith("covey."):
            yield child
        yield from classes(child)


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported() -> None:
    for package in (covey.transport, covey.node):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith("covey.node.kernels._"):  # libraries for ctypes
                importlib.import_module(module.name)


def bound() -> dict[type[CoveyError], ErrorCode]:
    own = {
        kind: code for kind in classes() if isinstance(code := vars(kind).get("code"), ErrorCode)
    }
    return own | dict(_CODES)


def test_no_two_classes_share_a_code() -> None:
    codes = list(bound().values())
    assert len(codes) > 10
    assert len(set(codes)) == len(codes)


def test_a_class_with_a_code_crosses_with_that_code() -> None:
    for kind, code in bound().items():
        assert code_of(kind.__new__(kind)) is code


def test_every_violation_has_a_code_of_its_class_or_of_its_own() -> None:
    for kind in classes(ProtocolViolation):
        assert kind is WrongFrame or isinstance(vars(kind).get("code"), ErrorCode), kind


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CacheFull(needed_bytes=1, free_bytes=0), ErrorCode.CACHE_FULL),
        (LeaseExpired("s"), ErrorCode.DEADLINE_EXCEEDED),
        (UnknownSession("s"), ErrorCode.UNKNOWN_SESSION),
        (LinkClosed(by_peer=True), ErrorCode.PEER_LOST),
        (LinkBroken("x"), ErrorCode.PEER_LOST),
        (RefusedByPeer(ErrorCode.WRONG_EPOCH), ErrorCode.WRONG_EPOCH),
        (WrongFrame(ErrorCode.WRONG_POSITION, "x"), ErrorCode.WRONG_POSITION),
        # What a stage checks itself before the engine sees it: a bug if it comes up there.
        (CacheOverflow(session="s", needed_tokens=2, capacity_tokens=1), ErrorCode.INTERNAL),
    ],
)
def test_codes_of_some_errors(error: CoveyError, code: ErrorCode) -> None:
    assert code_of(error) is code


def test_messages_of_failure_have_no_room_for_a_text() -> None:
    texts = {
        field.encode_name
        for kind in (Failure, SessionFailed)
        for field in msgspec.structs.fields(kind)
        if field.type is str
    }
    assert texts == set()
    assert {Failure, SessionFailed} <= set(AnyMessage.__args__)
