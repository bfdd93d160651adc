"""One caller, the rank that it wants, and what a network makes of the bytes between them.

1. Bytes of one direction keep their order, and none is lost but by a `Fault`.
2. An end is passed on as an end and a reset as a reset, behind the bytes that came before it.
3. A stalled direction is not read from, so that its sender comes to feel it, as over a real wire.
"""

from __future__ import annotations

import contextlib
import math
import random
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import troubles
from troubles import CALLEE_NBYTES, CALLER_NBYTES, RENDEZVOUS, Act, Fault, Layout, Pace, Trouble

from transport.sockets.handshake import HELLO

if TYPE_CHECKING:
    from proxy import Address, Switch

READ_NBYTES: Final = 65536
BACKLOG_NBYTES: Final = 4 * 1024 * 1024  # of one direction; beyond it its sender has to wait
NO_LINGER: Final = struct.pack("ii", 1, 0)  # socket(7): close() then resets the connection


class Direction:
    """The bytes from one socket to the other."""

    def __init__(self, conversation: Conversation, handshake_nbytes: int) -> None:
        self.src = self.dst = RENDEZVOUS
        self.struck: list[Act] = []
        self.nbytes = 0
        self.over = False  # nothing more will come out
        self.layout = Layout(handshake_nbytes)
        self.queue: deque[tuple[float, bytes | Act]] = deque()
        self.stalled = b""  # what waits to be released, and all that comes behind it
        self.silent = False
        self.deaf = False  # what comes in is thrown away
        self._conversation = conversation
        self._queued = 0
        self._due = 0.0
        self._faults: list[Fault] = []
        self._pace: Pace | None = None
        self._rng = random.Random()

    def begin(self, src: int, dst: int, number: int, what: Sequence[Trouble]) -> None:
        """Say whose bytes these are, and what they will suffer."""
        self.src, self.dst = src, dst
        mine = [trouble for trouble in what if troubles.applies(trouble, src, dst)]
        self._faults = [trouble for trouble in mine if isinstance(trouble, Fault)]
        self._pace = next((trouble for trouble in mine if isinstance(trouble, Pace)), None)
        if self._pace is not None:
            self._rng.seed(f"{self._pace.seed} {src} {dst} {number}")

    @property
    def full(self) -> bool:
        """Whether its sender has to wait."""
        return self.silent or self._queued > BACKLOG_NBYTES

    def take(self, data: bytes) -> None:
        """Queue what has come in, as it will go out."""
        if self.deaf:
            return
        if self.silent:
            self.stalled += data
            return
        self.nbytes += len(data)
        runs = deque(self.layout.runs(data))
        while runs:
            spot, run = runs.popleft()
            found = troubles.strike(self._faults, spot, run)
            if found is None:
                self._put(run)
                continue
            fault, at = found
            self._faults.remove(fault)
            if not self._conversation.switch.may_strike(fault):
                runs.appendleft((spot, run))
                continue
            self.struck.append(fault.act)
            if fault.act is Act.FLIP:
                changed = bytes([run[at] ^ 1 << fault.bit])
                runs.appendleft((spot, run[:at] + changed + run[at + 1 :]))
                continue
            self._put(run[:at])
            if fault.act is Act.STALL:
                self.silent = True
                self.stalled = run[at:] + b"".join(rest for _, rest in runs)
            else:
                self.deaf = True
                self.queue.append((self._due, fault.act))
            return

    def release(self) -> None:
        """Go on after a stall."""
        data, self.stalled, self.silent = self.stalled, b"", False
        for start in range(0, len(data), READ_NBYTES):
            self._put(data[start : start + READ_NBYTES])
        # (No second fault within what was held back: the layout has passed it.)

    def end(self, act: Act) -> None:
        """Queue the end that the source itself has made."""
        if not self.deaf:
            self.deaf = True
            self.queue.append((self._due, act))

    def _put(self, run: bytes) -> None:
        pace, now = self._pace, time.monotonic()
        while run:
            size = self._rng.randint(1, pace.largest) if pace else len(run)
            piece, run = run[:size], run[size:]
            self._due = max(self._due, now + (pace.delay(self._rng) if pace else 0.0))
            self.queue.append((self._due, piece))
            self._queued += len(piece)

    def flush(self, sink: socket.socket) -> bool:
        """Send what is due; return whether the sink is full."""
        try:
            while self.queue and self.queue[0][0] <= time.monotonic():
                due, item = self.queue[0]
                if isinstance(item, Act):
                    self._finish(sink, item)
                    return False
                sent = sink.send(item)
                self._queued -= sent
                self.queue.popleft()
                if sent < len(item):
                    self.queue.appendleft((due, item[sent:]))
        except BlockingIOError:
            return True
        except OSError:  # nobody is there to take it; the other direction finds out why
            self.queue.clear()
            self.over = self.deaf = True
            self._queued = 0
        return False

    def _finish(self, sink: socket.socket, act: Act) -> None:
        self.queue.clear()
        self.over = True
        if act is Act.RESET:
            self._conversation.reset()
        else:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


class Conversation:
    """A caller, the rank that it wants, and what they say to one another."""

    def __init__(self, switch: Switch, caller: socket.socket, callee_rank: int) -> None:
        self.switch = switch
        self._rank = callee_rank
        self._sockets = [caller]
        self._hello = b""  # from which it shows who calls; held back until it has
        self._ready = False
        self._closed = False
        self._wakes_at = math.inf
        self.directions = [Direction(self, CALLER_NBYTES), Direction(self, CALLEE_NBYTES)]
        caller.setblocking(False)
        self._update()

    def connect(self, target: Address) -> None:
        """Connect on to the rank."""
        if self._closed or len(self._sockets) == 2:
            return
        try:
            callee = socket.create_connection(target, timeout=5.0)
        except OSError:
            self.reset()
            return
        callee.setblocking(False)
        self._sockets.append(callee)
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._update()

    def reset(self) -> None:
        """End both connections by a reset."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.close()

    def close(self) -> None:
        """Close both sockets."""
        if not self._closed:
            self._closed = True
            for sock in self._sockets:
                self.switch.loop.watch(sock, 0, lambda _: None)
                sock.close()

    def release(self) -> None:
        """Let stalled directions go on."""
        for direction in self.directions:
            if direction.silent:
                direction.release()
        self._update()

    def _on_events(self, side: int, events: int) -> None:
        if events & selectors.EVENT_READ:
            self._read(side)
        self._update()

    def _read(self, side: int) -> None:
        direction = self.directions[side]
        try:
            data = self._sockets[side].recv(READ_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            direction.end(Act.RESET)
            return
        if not data:
            self._identify(b"", at_end=True)
            direction.end(Act.FINISH)
            return
        if side == 0 and not self._ready:
            self._identify(data)
        else:
            direction.take(data)

    def _identify(self, data: bytes, *, at_end: bool = False) -> None:
        """Hold the hello back until it says who calls."""
        self._hello += data
        if self._ready or (len(self._hello) < HELLO.size and not at_end):
            return
        self._ready = True
        whole = len(self._hello) >= HELLO.size
        rank = HELLO.unpack(self._hello[: HELLO.size])[3] if whole else RENDEZVOUS
        number, what = self.switch.next_number(), self.switch.troubles
        self.directions[0].begin(rank, self._rank, number, what)
        self.directions[1].begin(self._rank, rank, number, what)
        self.directions[0].take(self._hello)

    def _update(self) -> None:
        """Send what is due and watch for what can be done next."""
        loop = self.switch.loop
        wanted = [0, 0]
        for side, direction in enumerate(self.directions):
            if self._closed:
                return
            if len(self._sockets) == 2 and direction.flush(self._sockets[1 - side]):
                wanted[1 - side] |= selectors.EVENT_WRITE
            elif direction.queue and len(self._sockets) == 2:
                self._wake_at(direction.queue[0][0])
            if not direction.deaf and not direction.full:
                wanted[side] |= selectors.EVENT_READ
        if all(direction.over for direction in self.directions):
            self.close()
        if not self._closed:
            for side, sock in enumerate(self._sockets):
                handler = lambda events, side=side: self._on_events(side, events)  # noqa: E731
                loop.watch(sock, wanted[side], handler)

    def _wake_at(self, due: float) -> None:
        if due < self._wakes_at:
            self._wakes_at = due
            self.switch.loop.at(due, self._wake)

    def _wake(self) -> None:
        self._wakes_at = math.inf
        self._update()
