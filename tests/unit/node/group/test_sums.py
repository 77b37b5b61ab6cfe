"""Sums of a group: every member has the same bits, by every algorithm, codec and with gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from covey.node.group.all_reduce import AllReduce
from covey.node.group.choosing import GroupLink
from covey.node.group.codec import Coder, Sum, SumCodec, encoded_bytes
from covey.node.group.errors import ReduceAborted
from covey.node.kernels import halves
from support.lanes import memory_mesh

Floats = npt.NDArray[np.float32]
CODECS: tuple[SumCodec, ...] = ("exact", "fp16", "int8")
FOR_A_RING = GroupLink(latency_s=1e-9, bytes_per_s=1.0)
TIMEOUT_S = 20.0


def floats(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_group(
    n: int, codec: SumCodec, work: Callable[[AllReduce], object], *, link: GroupLink | None = None
) -> list[object]:
    """What `work` returns at each member, each in a thread."""
    mesh = memory_mesh(n)
    members = [
        AllReduce(i, 0, mesh[i], codec, n_members=n, link=link, timeout_s=TIMEOUT_S)
        for i in range(n)
    ]
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, members))


def sums(partials: Sequence[Floats | None], codec: SumCodec, link: GroupLink | None) -> list[bytes]:
    """Of two calls at each member; the second may be a ring's."""
    shape = (3, 50)

    def work(member: AllReduce) -> bytes:
        found = b""
        for _ in range(2):
            found += member.sum(partials[member.rank], shape, epoch=1).tobytes()
        return found

    return [bytes(it) for it in in_group(len(partials), codec, work, link=link)]  # type: ignore[call-overload]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("link", [None, FOR_A_RING], ids=["star", "ring"])
def test_every_member_gets_the_same_bits(n: int, codec: SumCodec, link: GroupLink | None) -> None:
    partials = [floats(i, 3, 50) for i in range(n)]
    found = sums(partials, codec, link)
    assert len(set(found)) == 1
    both = np.frombuffer(found[0], np.float32).reshape(2, 3, 50)
    tolerance = {"exact": 1e-5, "fp16": 0.02, "int8": 0.2}[codec]
    for total in both:
        assert np.abs(total - np.sum(partials, axis=0)).max() < tolerance


@pytest.mark.parametrize("link", [None, FOR_A_RING], ids=["star", "ring"])
def test_who_adds_nothing_is_no_zero_and_nobody_is_zero(link: GroupLink | None) -> None:
    only = floats(1, 3, 50)
    for total in sums([None, only, None], "exact", link):
        assert total == only.tobytes() * 2
    for total in sums([None, None, None], "fp16", link):
        assert not any(total)


def test_what_halves_cannot_hold_travels_exactly() -> None:
    big = np.full((3, 50), 1e6, np.float32)
    assert sums([big, big], "fp16", None) == [(big + big).tobytes() * 2] * 2


def test_only_the_hub_gets_what_is_reduced_and_all_get_what_it_broadcasts() -> None:
    def work(member: AllReduce) -> tuple[bool, float, float]:
        total = member.reduce(np.full((1, 4), 2.0, np.float32), (1, 4), epoch=1)
        told = np.full((1, 4), 7.0, np.float32) if member.is_hub else None
        heard = float(member.broadcast(told, (1, 4), epoch=1)[0, 3])
        return total is not None, 0.0 if total is None else float(total[0, 0]), heard

    assert in_group(3, "fp16", work) == [(True, 6.0, 7.0), (False, 0.0, 7.0), (False, 0.0, 7.0)]


def test_another_shape_aborts_every_member_and_leaves_its_part_alone() -> None:
    def work(member: AllReduce) -> bool:
        shape = (1, 4 + member.rank // 2)
        partial = np.full(shape, 2.0, np.float32)
        with pytest.raises(ReduceAborted):
            member.sum(partial, shape, epoch=1)
        return bool((partial == 2.0).all())

    assert in_group(3, "fp16", work) == [True] * 3


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("is_native", [True, False])
def test_halves_are_numpys(size: int, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(halves, "_native", lambda: None)
    values = floats(size, size) * np.float32(1e-4) + np.float32(60_000.0) * (np.arange(size) % 2)
    values = values.astype(np.float32)
    body = halves.Narrowed(size).fill(values)
    assert body is not None
    assert bytes(body) == values.astype("<f2").tobytes()
    total = halves.Total(size + 3)
    total.values[:] = 1.0
    total.put(body, 2)
    total.add(body, 3)
    expected = np.ones(size + 3, np.float32)
    expected[2 : size + 2] = values.astype("<f2")
    expected[3 : size + 3] += values.astype("<f2").astype(np.float32)
    assert total.values.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="do not fit"):
        total.put(body, 4)


@pytest.mark.parametrize("value", [65_504.1, -65_520.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 20, 33])
@pytest.mark.parametrize("is_native", [True, False])
def test_halves_refuse_what_they_cannot_hold(
    value: float, at: int, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(halves, "_native", lambda: None)
    values = floats(1, 34)
    narrowed = halves.Narrowed(34)
    assert narrowed.fill(values) is not None
    values[at] = value
    assert narrowed.fill(values) is None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 32, 33, 100])
def test_a_sum_goes_on_from_where_it_is_told(codec: SumCodec, size: int) -> None:
    total = Sum()
    for n in (size, 2 * size, size):  # memory is kept, and grows
        values = floats(n, size)
        said, body = Coder(codec).encode(values)
        assert (said, len(body)) == (codec, encoded_bytes(codec, size))
        total.start(n)
        assert total.values.shape == (n,)
        total.values[:] = 0.0
        total.put(said, body, n - size)
        total.add(said, body, n - size)
        assert np.abs(total.values[n - size :] - 2 * values).max() < 0.1
        assert not total.values[: n - size].any()
