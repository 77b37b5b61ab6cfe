"""Lanes that the members' links carry, for want of anything faster: their messages, and their ends.

Which lanes these are is agreed elsewhere; here a message that comes finds its lane.
"""

from __future__ import annotations

from contextlib import suppress

from covey.transport.errors import TransportError
from covey.transport.frame import Frame, Tensor
from covey.transport.mesh import Mesh
from covey.transport.messages import LaneData, LaneEnd
from covey.transport.peer import Peer

from .inbox import LinkLane


class OverLinks:
    """The lanes of one node that are carried by its links."""

    def __init__(self, mesh: Mesh, *, spin_s: float) -> None:
        self._spin_s = spin_s
        self._lanes: dict[tuple[str, bytes], LinkLane] = {}
        mesh.on_end(self._on_link_end)
        mesh.serve(LaneData, self._on_data)
        mesh.serve(LaneEnd, self._on_data_end)

    def lane(self, peer: Peer, lane_id: bytes) -> LinkLane:
        """A new lane over the link to `peer`, which keeps that link in use."""
        key = (peer.peer_id, lane_id)

        async def post(message: bytes) -> None:
            tensor = Tensor("u8", (len(message),), message)
            await peer.send(LaneData(lane=lane_id), {"message": tensor})

        def end() -> None:
            if self._lanes.pop(key, None) is not None:
                peer.release()
                with suppress(TransportError):
                    peer.post(LaneEnd(lane=lane_id))

        peer.hold()
        lane = self._lanes[key] = LinkLane(peer.peer_id, post=post, end=end, spin_s=self._spin_s)
        return lane

    def _on_data(self, peer: Peer, frame: Frame) -> None:
        data = frame.message
        if not isinstance(data, LaneData):
            return
        lane = self._lanes.get((peer.peer_id, data.lane))
        message = frame.tensors.get("message")
        if lane is not None and message is not None:
            lane.inbox.put(message.data)
        else:
            with suppress(TransportError):
                peer.post(LaneEnd(lane=data.lane))

    def _on_data_end(self, peer: Peer, frame: Frame) -> None:
        if isinstance(frame.message, LaneEnd):
            self._end(peer.peer_id, frame.message.lane, "the peer hung up")

    def _on_link_end(self, peer_id: str, _: TransportError) -> None:
        for owner, lane_id in list(self._lanes):
            if owner == peer_id:
                self._end(peer_id, lane_id, "the link to the peer ended")

    def _end(self, peer_id: str, lane_id: bytes, reason: str) -> None:
        lane = self._lanes.get((peer_id, lane_id))
        if lane is not None:
            lane.inbox.end(reason, keep=True)
