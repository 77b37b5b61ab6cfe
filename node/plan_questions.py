"""What somebody asks of a model's plans, with names of members and changes looked up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from covey.partition.advice.what_if import BadChange, Hardware, changed, parse_changes
from covey.partition.evaluate import World

from .errors import InvalidRequest
from .plan_facts import Question
from .planning_state import Outlook
from .service import PlanQuery

if TYPE_CHECKING:
    from .runtime import Node


def question_of(node: Node, outlook: Outlook, query: PlanQuery) -> Question:
    """The question that a query is, to this node.

    Raises:
        InvalidRequest: nobody is called so, or a change cannot be understood.
    """
    names = {peer: card.name for peer, card in node.views.members().items()}
    why = None if query.why is None else node.members.find(query.why)
    question = Question(
        query=query,
        prefer=query.prefer or node.config.prefer,
        names=names,
        why=why,
        why_unplanned=None if why is None else _why_unplanned(node, outlook, why),
    )
    if not query.what_if:
        return question
    world, added = _changed(node, outlook.world, query)
    return replace(question, what_if=world, what_if_names=added)


def _changed(node: Node, world: World, query: PlanQuery) -> tuple[World, dict[str, str]]:
    hardware = Hardware(devices=world.devices, links=world.links, names={})
    try:
        changes = parse_changes(query.what_if)
        hardware = changed(hardware, changes, world.layout, node.members.find)
    except BadChange as error:
        raise InvalidRequest("what_if", str(error)) from error
    world = replace(world, devices=hardware.devices, links=hardware.links)
    return world, dict(hardware.names)


def _why_unplanned(node: Node, outlook: Outlook, peer_id: str) -> str | None:
    """Why a member has no say in plans of the model at all; None if it has."""
    if peer_id in outlook.world.devices:
        return None
    name, model = node.members.name_of(peer_id), outlook.model
    if peer_id in node.members.standing.removed:
        return f"{name} was removed from the swarm"
    if peer_id not in node.live_peers():
        return f"{name} is not there: nothing has been heard of it lately"
    device = outlook.state.devices.get(peer_id)
    if device is None:
        return (
            f"{name} does not offer {model.name}: it has no file of it, or is still measuring; "
            f"`covey up` or `covey join` with --model {model.name} would change that"
        )
    return f"{name} runs {model.name} on {device.engine}, and a plan has one engine: {model.engine}"
