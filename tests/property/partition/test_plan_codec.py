"""Plans on the wire: round trips, and any bytes in."""

from __future__ import annotations

from contextlib import suppress

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from covey.partition.errors import InvalidPlan, PartitionError
from covey.partition.plan import LayerPlan
from covey.partition.profile import DeviceProfile, LinkProfile, ModelLayout
from support.plans import plan

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def plans(draw: st.DrawFn) -> LayerPlan:
    cuts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True))
    ends = sorted(cuts)
    spans = [
        (f"peer-{i}", start, end)
        for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    pattern = draw(st.none() | st.text("FS", min_size=ends[-1] - 1, max_size=ends[-1] - 1))
    return plan(
        *spans,
        epoch=draw(st.integers(0, 1 << 31)),
        index_pattern=None if pattern is None else f"F{pattern}",
        tpot_s=draw(st.floats(0, 1e9)),
    )


@settings(deadline=None)
@given(plans())
def test_a_plan_survives_the_wire(made: LayerPlan) -> None:
    again = LayerPlan.decode(made.encode())
    assert again == made
    assert (again.encode(), again.digest) == (made.encode(), made.digest)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_plan_or_refused(data: bytes) -> None:
    with suppress(InvalidPlan):
        LayerPlan.decode(data)


@settings(deadline=None)
@given(plans(), st.data())
def test_a_damaged_plan_is_refused_or_a_plan_in_its_own_right(
    made: LayerPlan, data: st.DataObject
) -> None:
    raw = bytearray(made.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(InvalidPlan):
        again = LayerPlan.decode(bytes(raw))
        assert again.encode() == bytes(raw)
        assert again != made


@settings(deadline=None)
@given(plans(), st.sampled_from(LayerPlan.__slots__), JSON)
def test_a_plan_with_any_field_replaced_is_refused_or_sound(
    made: LayerPlan, field: str, value: object
) -> None:
    fields = {**msgspec.to_builtins(made), field: value}
    with suppress(InvalidPlan, OverflowError):
        data = msgspec.msgpack.encode(fields, order="sorted")
        again = LayerPlan.decode(data)
        assert [stage.span.start for stage in again.stages] == [
            0,
            *(stage.span.end for stage in again.stages[:-1]),
        ]


@settings(deadline=None)
@given(JSON, st.sampled_from([ModelLayout, DeviceProfile, LinkProfile]))
def test_any_value_is_a_profile_or_refused(
    value: object, kind: type[ModelLayout | DeviceProfile | LinkProfile]
) -> None:
    with suppress(PartitionError):
        kind.from_value(value)
