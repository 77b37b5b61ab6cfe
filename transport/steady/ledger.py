"""Which frames of a steady link were sent, which arrived, and which must be sent again.

Sans-IO. Every frame has a number, from 1, and tells up to which number the other side's frames have
arrived; a frame is kept until that is known of it. When a link moves to another carrier each side
tells what it has (`Receipt`), and the other begins with the first frame that is missing. A frame
that comes twice is dropped, so a carrier may be left at any moment (as in XEP-0198, with numbers
in place of counts, because short frames may overtake long ones).
"""

from __future__ import annotations

from covey.transport.errors import MalformedFrame
from covey.transport.frame import Frame
from covey.transport.messages import Ack, Receipt

WINDOW_BYTES = 16 << 20  # kept at most before `send` waits; one frame may always be kept
WINDOW_FRAMES = 2048
MAX_KEPT_FRAMES = 4096  # with those that were posted; a receiver refuses to remember more
ACK_EVERY_BYTES = 1 << 20
ACK_EVERY_FRAMES = 64
_FRAME_BYTES = 256  # what a frame costs beside its tensors


class Ledger:
    """Both directions of one link."""

    def __init__(self) -> None:
        # Out
        self._kept: dict[int, tuple[Frame, int]] = {}  # without gaps; with the size of each
        self._kept_bytes = 0
        self._first_kept = 1
        self._next_number = 1
        self._next_unsent = 1  # everything kept from here on waits for the carrier
        self._known: frozenset[int] = frozenset()  # kept, but the other side has them
        # In
        self._received_upto = 0
        self._received_beyond: set[int] = set()
        self._unacked_frames = self._unacked_bytes = 0

    # --- out -------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether another frame may be kept without waiting."""
        return self._kept_bytes < WINDOW_BYTES and len(self._kept) < WINDOW_FRAMES

    @property
    def is_overrun(self) -> bool:
        """Whether so much was posted that the other side cannot be reading."""
        return len(self._kept) >= MAX_KEPT_FRAMES

    def stamp(self, frame: Frame) -> Frame:
        """Number a frame and keep it; it is the last to be sent."""
        number = self._next_number
        stamped = Frame(
            message=frame.message,
            tensors=frame.tensors,
            request=frame.request,
            reply_to=frame.reply_to,
            number=number,
            ack=self.acknowledge(),
        )
        nbytes = _size(stamped)
        self._kept[number] = (stamped, nbytes)
        self._kept_bytes += nbytes
        self._next_number = number + 1
        return stamped

    def next_unsent(self) -> Frame | None:
        """The next frame for the carrier; None when all have been handed out."""
        while self._next_unsent < self._next_number:
            number = self._next_unsent
            self._next_unsent = number + 1
            kept = self._kept.get(number)
            if kept is not None and number not in self._known:
                return kept[0]
        return None

    def blank(self, number: int) -> Frame:
        """Take a frame back that the carrier did not take; what goes in its place says nothing."""
        filler = Frame(message=Ack(), number=number, ack=self._received_upto)
        if number in self._kept:
            self._kept_bytes += _FRAME_BYTES - self._kept[number][1]
            self._kept[number] = (filler, _FRAME_BYTES)
        return filler

    def confirm(self, upto: int) -> None:
        """The other side has every frame up to this number.

        Raises:
            MalformedFrame: it cannot have.
        """
        if upto >= self._next_number:
            raise MalformedFrame("the peer confirms what was never sent")
        while self._first_kept <= upto:
            self._kept_bytes -= self._kept.pop(self._first_kept)[1]
            self._first_kept += 1

    def rewind(self, receipt: Receipt) -> None:
        """Begin again on a new carrier, with what the other side lacks. Raises as `confirm`."""
        self.confirm(receipt.upto)
        self._known = frozenset(receipt.beyond)
        self._next_unsent = self._first_kept

    # --- in --------------------------------------------------------------------------------

    def take(self, frame: Frame) -> bool:
        """Note a frame that arrived; False if it had arrived before.

        Raises:
            MalformedFrame: it confirms too much, or is too far ahead.
        """
        self.confirm(frame.ack)
        number, beyond = frame.number, self._received_beyond
        if number <= self._received_upto or number in beyond:
            return False
        if number > self._received_upto + MAX_KEPT_FRAMES:
            raise MalformedFrame("the peer runs too far ahead")
        if number > self._received_upto + 1:
            beyond.add(number)
        else:
            self._received_upto = number
            while self._received_upto + 1 in beyond:
                self._received_upto += 1
                beyond.remove(self._received_upto)
        self._unacked_frames += 1
        self._unacked_bytes += _size(frame)
        return True

    @property
    def owes_ack(self) -> bool:
        """Whether so much has arrived that the other side should be told by itself."""
        return self._unacked_bytes >= ACK_EVERY_BYTES or self._unacked_frames >= ACK_EVERY_FRAMES

    def acknowledge(self) -> int:
        """Up to where all has arrived; whoever asks tells the other side."""
        self._unacked_frames = self._unacked_bytes = 0
        return self._received_upto

    @property
    def receipt(self) -> Receipt:
        """What has arrived."""
        return Receipt(self._received_upto, sorted(self._received_beyond))


def _size(frame: Frame) -> int:
    if not frame.tensors:
        return _FRAME_BYTES
    return _FRAME_BYTES + sum(len(tensor.data) for tensor in frame.tensors.values())
