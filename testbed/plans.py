"""Plans as `covey plan --json` shows them and `--apply-file` takes them, and how labs apply one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from covey.cli.child import wait_for
from covey.client import ClientError

from .fleet import Fleet

ACTIVE_S = 60.0

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
    """What tells two plans apart: who runs which blocks and shares, whatever crosses borders."""
    return tuple(
        tuple(
            (
                tuple(stage["span"]),
                tuple(
                    (
                        member["name"],
                        member.get("kv_heads", 0),
                        member.get("mlp_columns", 0),
                        member.get("streamed_blocks", 0),
                    )
                    for member in stage["members"]
                ),
            )
            for stage in pipeline["stages"]
        )
        for pipeline in plan["pipelines"]
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
        CalledProcessError: the node refuses it.
        CoveyError: it is not used in time.
    """
    machine = fleet.machines[fleet.founder]
    file = machine.folder / "plan.json"
    file.write_text(json.dumps(plan))
    machine.covey("plan", fleet.model, "--apply-file", str(file))
    wanted = shape(plan)

    def is_active_at(name: str) -> bool:
        fleet.check()
        try:
            active = fleet.askers[name].plan()["active"]
        except ClientError:
            return False
        return active is not None and shape(active) == wanted

    for name in heads(plan):
        wait_for(lambda name=name: is_active_at(name), ACTIVE_S, f"{name} does not use the plan")  # type: ignore[misc]
    active: Mapping[str, Any] = fleet.askers[heads(plan)[0]].plan()["active"]
    return active
