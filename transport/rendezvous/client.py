"""A rank's end of the control connection: join, barrier, report a failure, be told of one.

One daemon thread reads. Whatever the rank's own threads do meanwhile, the first cause of a failure
reaches it at once, and `on_failure` carries it to every blocked wait.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from transport.errors import Failure, ProtocolError, TransportClosed
from transport.message.work import remaining
from transport.rendezvous.barrier import RankControl
from transport.rendezvous.dial import dial
from transport.sockets.addresses import Address, local_host
from transport.sockets.handshake import ANY_RANK
from transport.wire.records import RecordStream, await_ready

BEAT_S: Final = 0.5  # between two signs of life
UNREACHABLE: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)  # TCP gave up


class ControlClient(RankControl):
    """Connects to the rendezvous at `address` and claims `rank`, or takes the one it assigns.

    Blocks until the rendezvous has answered, `timeout` seconds at most.

    Args:
        patient: whether to wait, within the timeout, for a rendezvous that does not listen yet.
        server: who serves it, in words, and which rank that is (-1 for none), for errors.
        silence_s: when what is sent has not arrived for so long, its host counts as lost; 0: never.

    Raises:
        RendezvousError: nobody answers, or the rank is taken or does not exist.
        AuthenticationError: the rendezvous does not hold the job's secret.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        rank: int = ANY_RANK,
        timeout: float = 30.0,
        *,
        patient: bool = False,
        server: tuple[str, int] = ("the launcher", -1),
        silence_s: float = 0.0,
    ) -> None:
        super().__init__(rank, threading.Condition())
        self._server, self._silence_s = server, silence_s
        self.cut_off = False  # the connection has ended, and nobody had told us a failure
        self._callbacks: list[Callable[[Failure], None]] = []
        self._addresses: dict[int, Address] | None = None
        self._left = False  # whether it has said goodbye since it joined
        self._echoes = 0  # how many signs of life were answered
        self._attached = False
        self._state: Callable[[], dict[str, Any] | None] = lambda: None
        self._sending = threading.Lock()
        deadline = time.monotonic() + timeout
        self._stream = RecordStream(dial(address, secret, rank, deadline, patient=patient))
        if silence_s:
            # We say something twice a second. A host that vanished does not acknowledge it, and
            # without this option the kernel would go on trying for a quarter of an hour (tcp(7)).
            limit_ms = max(1, int(silence_s * 1000))
            self._stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        self._thread = threading.Thread(target=self._listen, name="barepp-control", daemon=True)
        self._thread.start()
        try:
            self._wait(lambda: self._attached, remaining(deadline), "waiting for a rank")
        except BaseException:
            self.close(goodbye=False)
            raise

    def beat_with(self, state: Callable[[], dict[str, Any] | None]) -> None:
        """Say `state()` with every sign of life from now on; until then they say nothing more."""
        self._state = state

    def on_failure(self, callback: Callable[[Failure], None]) -> None:
        """Call back, in the control thread, with the first cause; at once if it is known."""
        with self._changed:
            self._callbacks.append(callback)
            failure = self.failure
        if failure is not None:
            callback(failure)

    @property
    def local_host(self) -> str:
        """The address of this host from which the rendezvous is reached."""
        return local_host(self._stream.socket)

    def join(
        self,
        world_size: int,
        address: Address,
        timeout: float | None = None,
        *,
        versions: Mapping[str, str] | None = None,
    ) -> dict[int, Address]:
        """Announce that this rank is ready; block until all are, and return the address book.

        `versions` are those of the software that must be the same on all ranks, by name.

        Raises:
            RendezvousError: another world size.
            JobFailed: some rank failed meanwhile, did not come, or runs other software.
        """
        self._addresses, self._left = None, False
        me = {"address": address.to_record(), "versions": dict(versions or {})}
        self._send({"record": "join", "world_size": world_size, **me})
        self._wait(lambda: self._addresses is not None, timeout, "waiting for all ranks to join")
        assert self._addresses is not None
        return self._addresses

    def call_barrier(self) -> None:
        """Tell the rendezvous that this rank has called for a barrier."""
        self._send({"record": "barrier"})

    def report(self, failure: Failure) -> None:
        """Tell the launcher that this rank failed; never raises."""
        with contextlib.suppress(TransportClosed):
            self._send({"record": "failed", "failure": failure.to_record()})

    def say_doing(self, doing: str) -> None:
        """Tell the launcher what this rank was about when the failure reached it; never raises.

        The first words count: what it says later, it has come to after it was told.
        """
        with contextlib.suppress(TransportClosed):
            self._send({"record": "doing", "doing": doing})

    def leave(self) -> None:
        """Say goodbye: from here on this rank may end, or join again."""
        if not self._left:
            self._left = True
            with contextlib.suppress(TransportClosed):
                self._send({"record": "goodbye"})

    def close(self, *, goodbye: bool = True) -> None:
        """Hang up; without a goodbye the launcher takes it for this rank's loss."""
        if goodbye:
            self.leave()
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._stream.socket.close()

    def disown(self) -> None:
        """Let go of the connection in a forked child: it stays the parent's, and stays open.

        The locks are made anew, because at the fork a thread that the child lacks may hold them.
        """
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._closed = True
        self._stream.socket.close()

    def _send(self, record: dict[str, Any]) -> None:
        with self._sending:
            if self._closed:
                raise TransportClosed("this rank has hung up on the rendezvous")
            with contextlib.suppress(OSError):  # the reader finds the end and tells everyone
                self._stream.send(record)
                while self._stream.unsent:
                    await_ready(self._stream.socket, select.POLLOUT)
                    self._stream.flush()

    def _listen(self) -> None:
        goes_on = True
        beat_at = 0.0
        while goes_on:
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + BEAT_S
                self._beat()
            await_ready(self._stream.socket, select.POLLIN, max(0.0, beat_at - time.monotonic()))
            records, goes_on = self._stream.receive()
            nonsense = self._stream.error
            try:
                for record in records:
                    self._handle(record)
            except ProtocolError as error:
                nonsense = error
            if nonsense is not None:
                self.cut_off = self.failure is None
                # What this rank says may still be heard, and nobody else knows why it will end.
                why = f"what the launcher says to it makes no sense: {nonsense}"
                self.report(Failure(self.rank, "exception", why, exit_code=1))
                self._fail(Failure(-1, "lost", f"the rendezvous sent nonsense: {nonsense}"))
                return
        with self._changed:
            closed = self._closed or self._refused is not None
        if not closed:
            self.cut_off = self.failure is None
            self._fail(self._server_lost())

    def _server_lost(self) -> Failure:
        who, rank = self._server
        how = "is gone"
        if getattr(self._stream.broken, "errno", 0) in UNREACHABLE:
            how = f"cannot be reached: no sign of life for {self._silence_s:g} s"
        return Failure(rank, "lost", f"{who}, which served the rendezvous, {how}")

    def _beat(self) -> None:
        echoes = self._echoes  # (read first: the state is then younger than the echo)
        with contextlib.suppress(TransportClosed):
            self._send({"record": "beat", "state": self._state(), "echoes": echoes})

    def _handle(self, record: dict[str, Any]) -> None:
        match record:
            case {"record": "attached", "rank": int(rank)}:
                self.rank, self._attached = rank, True
            case {"record": "refused", "message": str(message)}:
                self._refused = message
            case {"record": "world", "addresses": list(addresses)}:
                self._addresses = dict(enumerate(map(Address.from_record, addresses)))
            case {"record": "echo"}:
                self._echoes += 1
            case {"record": "release"}:
                self.released += 1
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
