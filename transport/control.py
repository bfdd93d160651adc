"""A rank's end of the control connection: join, barrier, report a failure, be told of one.

One daemon thread reads. Whatever the rank's own threads do meanwhile, the first cause of a failure
reaches it at once, and `on_failure` carries it to every blocked wait.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from transport.addresses import Address
from transport.contract import deadline_after, remaining
from transport.errors import (
    AuthenticationError,
    Failure,
    JobFailed,
    ProtocolError,
    RendezvousError,
    TransportClosed,
    WaitTimeout,
)
from transport.handshake import ANY_RANK, Hello, Initiator, Role, Verdict
from transport.rendezvous import RecordStream


class ControlClient:
    """Connects to the rendezvous at `address` and claims `rank`, or takes the one it assigns.

    Blocks until the rendezvous has answered, `timeout` seconds at most.

    Raises:
        RendezvousError: nobody answers, or the rank is taken or does not exist.
        AuthenticationError: the rendezvous does not hold the job's secret.
    """

    def __init__(
        self, address: tuple[str, int], secret: bytes, rank: int = ANY_RANK, timeout: float = 30.0
    ) -> None:
        self.rank = rank
        self.failure: Failure | None = None
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[Failure], None]] = []
        self._refused: str | None = None
        self._addresses: dict[int, Address] | None = None
        self._barriers = 0
        self._releases = 0
        self._attached = False
        self._closed = False
        self._stream = RecordStream(_connect(address, secret, rank, timeout))
        self._thread = threading.Thread(target=self._listen, name="barepp-control", daemon=True)
        self._thread.start()
        self._wait(lambda: self._attached, timeout, "waiting for a rank")

    def on_failure(self, callback: Callable[[Failure], None]) -> None:
        """Call back, in the control thread, with the first cause; at once if it is known."""
        with self._changed:
            self._callbacks.append(callback)
            failure = self.failure
        if failure is not None:
            callback(failure)

    def join(
        self, world_size: int, address: Address, timeout: float | None = None
    ) -> dict[int, Address]:
        """Announce that this rank is ready; block until all are, and return the address book.

        Raises:
            RendezvousError: another world size, or some rank did not come.
            JobFailed: some rank failed meanwhile.
        """
        self._send({"record": "join", "world_size": world_size, "address": address.to_record()})
        self._wait(lambda: self._addresses is not None, timeout, "waiting for all ranks to join")
        assert self._addresses is not None
        return self._addresses

    def barrier(self, timeout: float | None = None) -> None:
        """Block until every rank of the world has called.

        Raises:
            JobFailed: some rank failed, so that it cannot come any more.
            WaitTimeout: it took longer than `timeout` seconds.
        """
        self._barriers += 1
        due = self._barriers
        self._send({"record": "barrier"})
        self._wait(lambda: self._releases >= due, timeout, "waiting at a barrier")

    def report(self, failure: Failure) -> None:
        """Tell the launcher that this rank failed; does not wait and never raises."""
        with contextlib.suppress(OSError, TransportClosed, JobFailed):
            self._send({"record": "failed", "failure": failure.to_record()})

    def say_doing(self, doing: str) -> None:
        """Tell the launcher what this rank was about when the failure reached it; never raises."""
        with contextlib.suppress(OSError, TransportClosed, JobFailed):
            self._send({"record": "doing", "doing": doing})

    def close(self, *, goodbye: bool = True) -> None:
        """Hang up; without a goodbye the launcher takes it for this rank's loss."""
        with self._changed:
            if self._closed:
                return
        if goodbye:
            with contextlib.suppress(OSError, TransportClosed, JobFailed):
                self._send({"record": "goodbye"})
        with self._changed:
            self._closed = True
        with contextlib.suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._stream.socket.close()

    def _send(self, record: dict[str, Any]) -> None:
        with self._changed:
            if self._closed:
                raise TransportClosed("this rank has hung up on the rendezvous")
            try:
                self._stream.send(record)
            except OSError:
                return  # the reader finds the end of the stream and tells everyone
            while self._stream.unsent:
                select.select([], [self._stream.socket], [], 1.0)
                self._stream.flush()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, doing: str) -> None:
        deadline = deadline_after(timeout)
        with self._changed:
            while not ready():
                if self._refused is not None:
                    raise RendezvousError(self._refused)
                if self.failure is not None:
                    raise JobFailed(self.failure, doing)
                if self._closed:
                    raise TransportClosed("this rank has hung up on the rendezvous")
                if remaining(deadline) == 0.0:
                    raise WaitTimeout(f"rank {self.rank}: nothing after {timeout} s of {doing}")
                self._changed.wait(remaining(deadline))

    def _listen(self) -> None:
        goes_on = True
        while goes_on:
            select.select([self._stream.socket], [], [])
            try:
                records, goes_on = self._stream.receive()
                for record in records:
                    self._handle(record)
            except ProtocolError as error:
                self._fail(Failure(-1, "lost", f"the rendezvous sent nonsense: {error}"))
                return
        with self._changed:
            closed = self._closed or self._refused is not None
        if not closed:
            self._fail(Failure(-1, "lost", "the launcher, which served the rendezvous, is gone"))

    def _handle(self, record: dict[str, Any]) -> None:
        match record:
            case {"record": "attached", "rank": int(rank)}:
                self.rank, self._attached = rank, True
            case {"record": "refused", "message": str(message)}:
                self._refused = message
            case {"record": "world", "addresses": list(addresses)}:
                self._addresses = dict(enumerate(map(Address.from_record, addresses)))
            case {"record": "release"}:
                self._releases += 1
            case {"record": "failure", "failure": failure}:
                self._fail(Failure.from_record(failure))
            case _:
                raise ProtocolError(f"there is no record {record!r:.100}")
        with self._changed:
            self._changed.notify_all()

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            if self.failure is not None:
                return  # the first one told is the cause
            self.failure = failure
            self._changed.notify_all()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(failure)


def _connect(address: tuple[str, int], secret: bytes, rank: int, timeout: float) -> socket.socket:
    """Connect and authenticate, blocking; return the socket, non-blocking from here on."""
    initiator = Initiator(secret, Hello(Role.CONTROL, rank, ANY_RANK))
    where = f"the rendezvous at {address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, timeout)
    except OSError as error:
        raise RendezvousError(f"{where} cannot be reached: {error.strerror or error}") from error
    try:
        sock.sendall(initiator.hello)
        while initiator.verdict is None:
            data = b""
            while len(data) < initiator.needed:
                more = sock.recv(initiator.needed - len(data))
                if not more:
                    raise AuthenticationError(f"{where} hung up: does it serve another job?")
                data += more
            sock.sendall(initiator.receive(data))
        if initiator.verdict is not Verdict.ACCEPTED:
            raise RendezvousError(f"{where} refused rank {rank}")
    except OSError as error:
        sock.close()
        raise RendezvousError(f"{where} did not finish the handshake: {error}") from error
    except (AuthenticationError, RendezvousError):
        sock.close()
        raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock
