"""An arriving message meets the receive that wants it, by (source, tag), first in first out.

    transport: arrive(header) ──> ┌ (source, tag): receives, or arrivals ┐ <── post(receive)
               complete(payload)  └────────── match ── deliver ──────────┘ ──> the receive is done

1. A message is matched when its header arrives, so the order does not depend on how long a payload
   takes.
2. Messages and receives of one (source, tag) never both wait: one of the two queues is empty.
3. Only messages that no receive has asked for count as held.
4. The memory of a message is that of the receive that wants it (`into`), so that the payload is
   written there directly; otherwise it is fresh.
5. The mailbox does no input or output and takes no lock: its transport holds one around each call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from transport.errors import MessageMismatch, TransportError
from transport.message.specs import MessageSpec
from transport.message.tensors import overwrite
from transport.message.work import Receive

if TYPE_CHECKING:
    from transport.device import Loan

_Queued = TypeVar("_Queued")


class Arrival:
    """A message on its way in: the header is here, the payload comes or has come."""

    __slots__ = (
        "borrowed",
        "error",
        "here",
        "loan",
        "receive",
        "spec",
        "src",
        "sum",
        "tag",
        "tensors",
    )

    def __init__(self, src: int, tag: int, spec: MessageSpec) -> None:
        self.src = src
        self.tag = tag
        self.spec = spec
        self.sum: int | None = None  # what the payload's sum was when it was sent
        self.tensors: Sequence[torch.Tensor] = ()
        self.loan: Loan | None = None  # what a GPU has still to write, where memory of it is lent
        self.receive: Receive | None = None  # who gets it, once that is known
        self.error: MessageMismatch | None = None
        self.here = False  # whether the payload is complete
        self.borrowed = False  # whether its memory is that of a receive which was withdrawn


class Mailbox:
    """The queues of one rank: posted receives, and arrivals that nobody has asked for.

    `allocate` gives memory to what arrives and has none.
    """

    def __init__(
        self, allocate: Callable[[MessageSpec], Sequence[torch.Tensor]] = MessageSpec.allocate
    ) -> None:
        self._allocate = allocate
        self._receives: dict[tuple[int, int], deque[Receive]] = {}
        self._arrivals: dict[tuple[int, int], deque[Arrival]] = {}
        self._held: dict[int, int] = {}

    def held_nbytes(self, src: int) -> int:
        """Bytes of messages of `src` that nobody has asked for yet."""
        return self._held.get(src, 0)

    def wanted(self, src: int, tag: int) -> bool:
        """Whether a posted receive waits for the next message of (src, tag)."""
        return (src, tag) in self._receives

    def post(self, receive: Receive) -> None:
        """Match a receive with the oldest arrival of its (source, tag), or let it wait."""
        key = (receive.peer, receive.tag)
        arrivals = self._arrivals.get(key)
        if arrivals is None:
            self._receives.setdefault(key, deque()).append(receive)
            return
        arrival = _pop(self._arrivals, key)
        self._held[receive.peer] -= arrival.spec.nbytes
        self._match(arrival, receive)
        if arrival.here:
            self._deliver(arrival)

    def withdraw(self, receive: Receive, arriving: Arrival | None) -> bool:
        """Take a posted receive back; False when it is done already, so that nothing is taken.

        `arriving` is the message of its source whose payload is coming in. If it was meant for this
        receive, it goes to the next one of its (source, tag).
        """
        if receive.done:
            return False
        key = (receive.peer, receive.tag)
        receives = self._receives.get(key)
        if receives is not None and receive in receives:
            receives.remove(receive)
            if not receives:
                del self._receives[key]
        elif arriving is not None and arriving.receive is receive:
            arriving.receive = arriving.error = None
            arriving.borrowed = bool(receive.targets)
            if receives is not None:
                self._match(arriving, _pop(self._receives, key))
            else:
                self._arrivals.setdefault(key, deque()).appendleft(arriving)
                self._held[receive.peer] = self.held_nbytes(receive.peer) + arriving.spec.nbytes
        return True

    def arrive(self, arrival: Arrival) -> None:
        """Take a message whose header is here; afterwards `arrival.tensors` is its memory.

        That may be set already, when the payload lies somewhere. Otherwise it is the memory of the
        receive that wants it, or fresh.
        """
        key = (arrival.src, arrival.tag)
        if key not in self._receives:
            arrival.tensors = arrival.tensors or self._allocate(arrival.spec)
            self._arrivals.setdefault(key, deque()).append(arrival)
            self._held[arrival.src] = self.held_nbytes(arrival.src) + arrival.spec.nbytes
            return
        receive = _pop(self._receives, key)
        self._match(arrival, receive)
        if not arrival.tensors:
            into = receive.targets and arrival.error is None
            arrival.tensors = receive.targets if into else self._allocate(arrival.spec)

    def complete(self, arrival: Arrival) -> Receive | None:
        """Take note that the payload is here; return the receive that this completed, if any."""
        arrival.here = True
        if arrival.receive is not None:
            self._deliver(arrival)
        return arrival.receive

    def fail(self, error: TransportError, src: int | None = None) -> None:
        """Fail every waiting receive, of one source or of all.

        Complete messages of a source that is gone stay for who asks. When all is over nobody can
        ask any more, and they go too.
        """
        for key in [k for k in self._receives if src is None or k[0] == src]:
            for receive in self._receives.pop(key):
                receive.fail(error)
        if src is None:
            self._arrivals.clear()
            self._held.clear()
        for key in [k for k in self._arrivals if k[0] == src]:
            whole = deque(arrival for arrival in self._arrivals[key] if arrival.here)
            torn = sum(a.spec.nbytes for a in self._arrivals[key] if not a.here)
            self._held[key[0]] -= torn
            if whole:
                self._arrivals[key] = whole
            else:
                del self._arrivals[key]

    def _match(self, arrival: Arrival, receive: Receive) -> None:
        arrival.receive = receive
        if receive.expected is not None and receive.expected is not arrival.spec:
            arrival.error = receive.expected.check(arrival.spec, arrival.src, arrival.tag)

    def _deliver(self, arrival: Arrival) -> None:
        receive = arrival.receive
        assert receive is not None
        if arrival.error is not None:
            receive.fail(arrival.error)
            return
        if receive.into is None:
            mine = [t.clone() for t in arrival.tensors] if arrival.borrowed else arrival.tensors
            receive.complete(arrival.spec.pack(mine))
            return
        if arrival.tensors is not receive.targets:  # it lay elsewhere before it was asked for
            for target, tensor in zip(receive.targets, arrival.tensors, strict=True):
                overwrite(target, tensor)
        receive.complete(receive.into)


def _pop(queues: dict[tuple[int, int], deque[_Queued]], key: tuple[int, int]) -> _Queued:
    """Take the first of a queue; a queue that is empty goes."""
    queue = queues[key]
    first = queue.popleft()
    if not queue:
        del queues[key]
    return first
