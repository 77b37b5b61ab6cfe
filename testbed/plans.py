"""Plans as `covey plan --json` shows them and `--apply-file` takes them, and how labs apply one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from covey.cli.child import wait_for
from covey.client import ClientError
from covey.errors import CoveyError

from .fleet import Fleet

ACTIVE_S = 60.0
NOT_HEARD_OF = "is not there"  # what a node says of a member whose profile has yet to come

Plan = Mapping[str, Any]


def chain(shares: Sequence[tuple[str, int]]) -> Plan:
    """One pipeline: members in order, and how many blocks each runs; those with none are left out.

    Raises:
        ValueError: a share is negative.
    """
    stages, start = [], 0
    for name, n_blocks in shares:
        if n_blocks < 0:
            raise ValueError(f"{name} cannot run {n_blocks} blocks")
        if n_blocks:
            stages.append({"span": [start, start + n_blocks], "members": [{"name": name}]})
            start += n_blocks
    return {"pipelines": [{"stages": stages}]}


def group(
    members: Sequence[str],
    *,
    n_blocks: int,
    kv_heads: Sequence[int],
    mlp_columns: Sequence[int],
    sum_codec: str = "fp16",
) -> Plan:
    """One stage of all blocks that a group shares out, the first member its hub."""
    shares = [
        {"name": name, "kv_heads": n_heads, "mlp_columns": n_columns}
        for name, n_heads, n_columns in zip(members, kv_heads, mlp_columns, strict=True)
    ]
    stage = {"span": [0, n_blocks], "members": shares, "hub": members[0], "sum_codec": sum_codec}
    return {"pipelines": [{"stages": [stage]}]}


def shape(plan: Plan) -> tuple[object, ...]:
    """What tells two plans apart: who runs which blocks and shares, whatever crosses borders.

    The order of members within a stage says nothing: nodes have one of their own.
    """
    return tuple(
        tuple(
            (tuple(stage["span"]), tuple(sorted(_share(member) for member in stage["members"])))
            for stage in pipeline["stages"]
        )
        for pipeline in plan["pipelines"]
    )


def _share(member: Mapping[str, Any]) -> tuple[str, int, int, int]:
    return (
        member["name"],
        member.get("kv_heads", 0),
        member.get("mlp_columns", 0),
        member.get("streamed_blocks", 0),
    )


def heads(plan: Plan) -> list[str]:
    """For each pipeline the member whose own texts have no border in front of them: its hub."""
    firsts = [pipeline["stages"][0] for pipeline in plan["pipelines"]]
    return [stage.get("hub") or stage["members"][0]["name"] for stage in firsts]


def text(plan: Plan) -> str:
    """For people: `desktop-a 0-20 > pi5-a 20-30`."""
    return " | ".join(
        " > ".join(
            "+".join(member["name"] for member in stage["members"])
            + " {}-{}".format(*stage["span"])
            for stage in pipeline["stages"]
        )
        for pipeline in plan["pipelines"]
    )


def apply(fleet: Fleet, plan: Plan) -> Mapping[str, Any]:
    """Pin a plan and wait until all heads of it use it.

    Returns:
        The active plan's facts at its first head, predicted figures among them.

    Raises:
        ClientError: the node refuses it.
        CoveyError: it is not used in time; says why, if the node does.
    """
    founder = fleet.askers[fleet.founder]
    wanted = shape(plan)

    def is_pinned() -> bool:
        fleet.check()
        try:
            founder.call(lambda client: client.pin_plan(fleet.model, plan))
        except ClientError as error:
            if NOT_HEARD_OF not in str(error):
                raise
            return False
        return True

    wait_for(is_pinned, ACTIVE_S, "the founder does not hear of all members")

    def is_active_at(name: str) -> bool:
        fleet.check()
        active = fleet.askers[name].plan()["active"]
        return active is not None and shape(active) == wanted

    for name in heads(plan):
        try:
            wait_for(lambda name=name: is_active_at(name), ACTIVE_S, f"{name} has no such plan")  # type: ignore[misc]
        except CoveyError as error:
            facts = fleet.askers[name].plan()
            why = (facts["pinned"] or {}).get("why_not") or facts["why_not"] or "it does not say"
            raise CoveyError(f"{error}: {why}") from error
    active: Mapping[str, Any] = fleet.askers[heads(plan)[0]].plan()["active"]
    return active
