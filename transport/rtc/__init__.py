"""Links over WebRTC data channels: UDP through NATs that TCP cannot be punched through."""

from .link import RtcLink
from .opening import Signal, open_rtc_link

__all__ = ["RtcLink", "Signal", "open_rtc_link"]
