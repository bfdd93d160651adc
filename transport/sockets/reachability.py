"""Notices that a peer's host cannot be reached: for too long it acknowledges nothing sent to it.

A pulled cable resets nothing, and TCP by itself goes on trying for a quarter of an hour. A control
connection has TCP_USER_TIMEOUT for that. Between ranks that would end healthy connections too: it
counts the time for which the receiver's window is full (tcp(7)), and a rank that computes may leave
messages unread for as long as it likes. Over a healthy wire a limit of 2 s ended such a connection
after 2.8 s.

So we look ourselves, some times within the limit: are packets on their way, and has no
acknowledgement come since the last look? A full window is neither: the kernel sends no more then.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from transport.sockets.event_loop import Progress

LOOKS: Final = 8  # within the limit
_INFO_NBYTES: Final = 104  # struct tcp_info of linux/tcp.h, up to what every kernel of today has
_UNACKNOWLEDGED: Final = 24  # offset of tcpi_unacked, a 32-bit count of packets
_LAST_ACK: Final = 56  # of tcpi_last_ack_recv, 32 bits: milliseconds since the last one


class Reachability:
    """Watches one connected TCP socket until it is closed; all under the lock of `progress`.

    `lose` is called once, when nothing has been acknowledged for `silence_s` seconds, or up to a
    quarter more.
    """

    def __init__(
        self, progress: Progress, sock: socket.socket, silence_s: float, lose: Callable[[], None]
    ) -> None:
        self._progress = progress
        self._socket = sock
        self._silence_s = silence_s
        self._lose = lose
        self._looked_at = time.monotonic()
        self._quiet_since: float | None = None  # the first of the looks that found no answer
        self._look_later()

    def _look_later(self) -> None:
        self._progress.call_after(self._silence_s / LOOKS, self._look)

    def _look(self) -> None:
        if self._socket.fileno() < 0:
            return
        now = time.monotonic()
        if not self._unanswered(now - self._looked_at):
            self._quiet_since = None
        elif self._quiet_since is None:
            # Not since the last look: we may have been stopped, and have sent only just now.
            self._quiet_since = now
        elif now - self._quiet_since >= self._silence_s:
            self._lose()
            return
        self._looked_at = now
        self._look_later()

    def _unanswered(self, seconds: float) -> bool:
        """Whether packets are on their way, and no acknowledgement has come for so long."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_NBYTES)
        (unacknowledged,) = struct.unpack_from("=I", info, _UNACKNOWLEDGED)
        (quiet_ms,) = struct.unpack_from("=I", info, _LAST_ACK)
        return bool(unacknowledged) and quiet_ms >= seconds * 1e3
