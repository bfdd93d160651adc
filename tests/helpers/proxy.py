"""A network between ranks that misbehaves as it is told: a process of its own, one event loop.

    with Network() as network:
        fronts = network.arrange(3, [Pace(seed=1, largest=1)])   # a port in front of each rank
        network.aim(0, where_rank_0_listens)                     # ... and what stands behind it

Whoever connects to `fronts[rank]` is connected on to that rank, and every byte in both directions
passes through the troubles. A process, because ranks that are forked would otherwise hold copies
of its sockets, and a copy keeps a connection open that it has reset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from conversation import Conversation
from troubles import RENDEZVOUS, Act, Fault, Trouble

Address = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Trail:
    """What one direction of one connection has seen."""

    src: int
    dst: int
    frames: int
    nbytes: int
    struck: tuple[Act, ...]


class Network:
    """The parent's handle on the process; every method waits until it has obeyed."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        paths = [str(here), str(here.parent.parent)]
        self._pipe, theirs = Pipe()
        code = f"import sys; sys.path[:0] = {paths!r}; import proxy; proxy.main({theirs.fileno()})"
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def arrange(self, ranks: int, troubles: Sequence[Trouble] = ()) -> dict[int, Address]:
        """Drop every connection and start anew; return a front per rank and `RENDEZVOUS`."""
        fronts: dict[int, Address] = self._ask("arrange", ranks, list(troubles))
        return fronts

    def aim(self, rank: int, target: Address) -> None:
        """Say what stands behind the front of `rank`; who called before has been kept waiting."""
        self._ask("aim", rank, target)

    def release(self) -> None:
        """Let what is stalled go on."""
        self._ask("release")

    def trails(self) -> list[Trail]:
        """Return what has passed so far, a `Trail` for each direction of each connection."""
        trails: list[Trail] = self._ask("trails")
        return trails

    def struck(self) -> list[Act]:
        """Return the faults that have happened."""
        return [act for trail in self.trails() for act in trail.struck]

    def _ask(self, *command: Any) -> Any:
        self._pipe.send(command)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the process ends at the end of its pipe
        self._process.wait(10)


def main(fd: int) -> None:
    """Be the network's process until the parent lets go of the pipe."""
    Switch(Connection(fd)).serve()


class Loop:
    """Sockets and timers, one thread."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def at(self, due: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (due, next(self._number), callback))

    def watch(self, sock: socket.socket, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` for these events only; for none when `events` is 0."""
        known = sock.fileno() in self.selector.get_map()
        if not events:
            if known:
                self.selector.unregister(sock)
        elif known:
            self.selector.modify(sock, events, handler)
        else:
            self.selector.register(sock, events, handler)

    def turn(self) -> None:
        left = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, events in self.selector.select(left):
            if self.selector.get_map().get(key.fd) is key:  # not closed by an earlier handler
                key.data(events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()


class Switch:
    """Obeys the parent: listens in front of each rank and connects callers on."""

    def __init__(self, pipe: Connection) -> None:
        self.loop = Loop()
        self.troubles: Sequence[Trouble] = ()
        self._pipe = pipe
        self._struck: dict[Fault, int] = {}
        self._fronts: dict[int, socket.socket] = {}
        self._targets: dict[int, Address] = {}
        self._conversations: list[tuple[int, Conversation]] = []
        self._numbers = itertools.count()
        self.loop.selector.register(pipe, selectors.EVENT_READ, lambda _: self._obey())

    def serve(self) -> None:
        """Run until the parent has gone."""
        with contextlib.suppress(EOFError):
            while True:
                self.loop.turn()

    def next_number(self) -> int:
        """Return the number of a conversation, from which its random delays follow."""
        return next(self._numbers)

    def may_strike(self, fault: Fault) -> bool:
        """Whether a fault has not struck often enough; count it."""
        self._struck[fault] = self._struck.get(fault, 0) + 1
        return self._struck[fault] <= fault.times

    def _obey(self) -> None:
        name, *arguments = self._pipe.recv()
        try:
            answer = getattr(self, f"_on_{name}")(*arguments)
        except Exception as error:
            answer = error
        self._pipe.send(answer)

    def _on_arrange(self, ranks: int, what: Sequence[Trouble]) -> dict[int, Address]:
        for _, conversation in self._conversations:
            conversation.reset()
        for front in self._fronts.values():
            self.loop.watch(front, 0, lambda _: None)
            front.close()
        self._struck, self._targets, self._conversations = {}, {}, []
        self._numbers = itertools.count()
        self.troubles = what
        self._fronts = {
            rank: socket.create_server(("127.0.0.1", 0), backlog=128)
            for rank in [RENDEZVOUS, *range(ranks)]
        }
        for rank, front in self._fronts.items():
            front.setblocking(False)
            accept = lambda _, rank=rank: self._accept(rank)  # noqa: E731
            self.loop.watch(front, selectors.EVENT_READ, accept)
        return {rank: front.getsockname() for rank, front in self._fronts.items()}

    def _on_aim(self, rank: int, target: Address) -> None:
        self._targets[rank] = target
        for waiting, conversation in self._conversations:
            if waiting == rank:
                conversation.connect(target)

    def _on_release(self) -> None:
        for _, conversation in self._conversations:
            conversation.release()

    def _on_trails(self) -> list[Trail]:
        return [
            Trail(way.src, way.dst, way.layout.frame, way.nbytes, tuple(way.struck))
            for _, conversation in self._conversations
            for way in conversation.directions
        ]

    def _accept(self, rank: int) -> None:
        with contextlib.suppress(OSError):  # the caller has gone again
            conversation = Conversation(self, self._fronts[rank].accept()[0], rank)
            self._conversations.append((rank, conversation))
            if rank in self._targets:
                conversation.connect(self._targets[rank])
