"""The rendezvous and a rank's end of the control connection: real sockets, ranks as threads."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from transport_worlds import SOON_S, eventually, start

from transport.errors import (
    RECORD_TEXT_LIMIT,
    AuthenticationError,
    Failure,
    JobFailed,
    RendezvousError,
    TransportClosed,
    WaitTimeout,
)
from transport.rendezvous import dial as dial_module
from transport.rendezvous.client import ControlClient
from transport.rendezvous.loop import EventLoop
from transport.rendezvous.server import Event, EventKind, RendezvousServer
from transport.sockets.addresses import Address, dial, serve
from transport.sockets.handshake import ANY_RANK, new_secret
from transport.sockets.listener import MAX_PENDING
from transport.wire.format import HEADER, MAGIC, FrameKind, encode
from transport.wire.records import RECORD_LIMITS, RecordStream

AT_ONCE_S = 2.0  # far below every timeout in these tests, far above what it takes


class Served:
    """A server whose owner does nothing but note the events; failures are passed on if asked."""

    def __init__(
        self,
        world_size: int,
        *,
        tell: bool = False,
        secret: bytes | None = None,
        **options: float | str,
    ) -> None:
        self.secret = secret or new_secret()
        self.loop = EventLoop()
        self.server = RendezvousServer(world_size, self.secret, self.loop, self._take, **options)  # type: ignore[arg-type]
        self.events: list[Event] = []
        self.changed = threading.Condition()
        self._tell = tell
        self._stop = False
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while not self._stop:
            self.loop.turn()

    def _take(self, event: Event) -> None:
        if event.failure is not None and self._tell:
            self.server.tell_failure(event.failure)
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def event(self, kind: EventKind, rank: int | None = None) -> Event:
        """Wait for an event and return it."""

        def found() -> Event | None:
            fits = [e for e in self.events if e.kind is kind and rank in (None, e.rank)]
            return fits[0] if fits else None

        with self.changed:
            assert self.changed.wait_for(found, SOON_S), (kind, self.events)
            event = found()
        assert event is not None
        return event

    def kinds(self, kind: EventKind) -> list[int]:
        with self.changed:
            return [event.rank for event in self.events if event.kind is kind]

    def client(self, rank: int = ANY_RANK, **options: float) -> ControlClient:
        return ControlClient(self.server.address, self.secret, rank, **options)

    def close(self) -> None:
        self._stop = True
        self.loop.wake()
        self.thread.join(SOON_S)
        self.server.close()
        self.loop.close()


@contextlib.contextmanager
def serving(world_size: int, **options: float | bool) -> Iterator[Served]:
    served = Served(world_size, **options)  # type: ignore[arg-type]
    try:
        yield served
    finally:
        served.close()


@contextlib.contextmanager
def joined(served: Served, world_size: int) -> Iterator[list[ControlClient]]:
    """A complete world."""
    clients = [served.client(rank) for rank in range(world_size)]
    try:
        for future in [start_join(client, world_size) for client in clients]:
            future.result(SOON_S)
        yield clients
    finally:
        for client in clients:
            client.close()


def address(rank: int) -> Address:
    return Address("host", f"unix-{rank}", ("127.0.0.1", 1000 + rank))


def start_join(client: ControlClient, world_size: int) -> Future[dict[int, Address]]:
    return start(lambda: client.join(world_size, address(client.rank)))


def raised(future: Future[object], kind: type[BaseException]) -> BaseException:
    error = future.exception(SOON_S)
    assert isinstance(error, kind), error
    return error


# -- joining --------------------------------------------------------------------------------------


def test_free_ranks_are_assigned_and_everyone_gets_the_address_book() -> None:
    with serving(4) as served:
        clients = [served.client(2), served.client(), served.client(), served.client()]
        assert [client.rank for client in clients] == [2, 0, 1, 3]
        books = [start_join(client, 4) for client in clients]
        for book in books:
            assert book.result(SOON_S) == {rank: address(rank) for rank in range(4)}
        assert served.event(EventKind.COMPLETE).rank == -1
        for client in clients:
            client.close()
        for rank in range(4):
            served.event(EventKind.LEFT, rank)
        assert served.kinds(EventKind.LOST) == []


def test_a_claimed_rank_is_refused_with_a_sentence() -> None:
    with serving(2) as served:
        first = served.client(1)
        threads = threading.active_count()
        with pytest.raises(RendezvousError, match="rank 1 is taken already"):
            served.client(1)
        with pytest.raises(RendezvousError, match="rank 7 does not exist"):
            served.client(7)
        with pytest.raises(RendezvousError, match="rank -5 does not exist"):
            served.client(-5)
        assert threading.active_count() == threads  # a refused client leaves no thread behind
        first.close()


def test_more_ranks_than_the_world_has_are_refused() -> None:
    with serving(1) as served:
        only = served.client()
        with pytest.raises(RendezvousError, match="no rank is free, in a world of 1"):
            served.client()
        only.close()


def test_a_rank_is_claimed_once_even_after_its_loss() -> None:
    with serving(2) as served:
        served.client(1).close(goodbye=False)
        served.event(EventKind.LOST, 1)
        with pytest.raises(RendezvousError, match="taken already"):
            served.client(1)


def test_another_world_size_is_an_error_with_both_numbers() -> None:
    with serving(3) as served:
        client = served.client(2)
        with pytest.raises(RendezvousError, match=r"rank 2 wants a world of 4 .* this one has 3"):
            client.join(4, address(2))
        client.close()


def test_the_join_timeout_names_all_who_are_missing_in_time() -> None:
    with serving(4, tell=True, join_timeout_s=0.3) as served:
        clients = [served.client(rank) for rank in (0, 2, 3)]  # 3 is here, but never joins
        began = time.monotonic()
        joins = [start_join(client, 4) for client in clients[:2]]
        for join in joins:
            error = raised(join, JobFailed)
            assert isinstance(error, JobFailed)
            assert "2 of 4 ranks joined within 0.3 s; missing: rank 1, rank 3" in str(error)
            assert error.failure.cause == "rendezvous"
        assert 0.3 <= time.monotonic() - began < 0.3 + AT_ONCE_S
        for client in clients:
            client.close()


def test_nobody_waits_for_the_join_timeout_when_all_have_come() -> None:
    with serving(2, join_timeout_s=0.2) as served, joined(served, 2):
        time.sleep(0.3)  # the timeout, and no event may tell that it did not strike
        assert served.kinds(EventKind.FAILED) == []


def test_a_world_can_be_left_and_joined_again() -> None:
    with serving(3) as served:
        clients = [served.client(rank) for rank in range(3)]
        for _ in range(3):
            for join in [start_join(client, 3) for client in clients]:
                join.result(SOON_S)
            for work in [start(lambda c=client: c.barrier(SOON_S)) for client in clients]:  # type: ignore[misc]
                work.result(SOON_S)
            for client in clients:
                client.leave()
        # One that comes back alone waits for the others: their old addresses do not count.
        again = start_join(clients[1], 3)
        served.event(EventKind.JOINED, 1)
        with pytest.raises(TimeoutError):
            again.result(0.1)
        for client in clients:
            client.close()


def test_a_lost_rendezvous_and_a_closed_port_are_named() -> None:
    with serving(2) as served:
        address = served.server.address
        client = served.client(0)
    with pytest.raises(JobFailed, match="the launcher, which served the rendezvous, is gone"):
        client.barrier(SOON_S)
    with pytest.raises(RendezvousError, match="cannot be reached: Connection refused"):
        ControlClient(address, served.secret, 1)
    client.close()


# -- barriers -------------------------------------------------------------------------------------


def test_barriers_hold_for_many_ranks_and_many_rounds() -> None:
    world_size, rounds = 8, 100
    arrived = [0] * world_size
    with serving(world_size) as served, joined(served, world_size) as clients:

        def rank_main(client: ControlClient) -> None:
            for number in range(1, rounds + 1):
                arrived[client.rank] = number
                client.barrier(SOON_S)
                assert min(arrived) >= number, "it was released before all had come"
                assert max(arrived) <= number + 1

        for future in [start(lambda c=client: rank_main(c)) for client in clients]:  # type: ignore[misc]
            future.result(SOON_S)


def test_a_barrier_that_timed_out_is_waited_for_again() -> None:
    with serving(2) as served, joined(served, 2) as (first, second):
        for _ in range(3):
            with pytest.raises(WaitTimeout, match=r"rank 0: nothing after 0.01 s at a barrier"):
                first.barrier(0.01)
        other = start(lambda: second.barrier(SOON_S))
        eventually(lambda: not first.at_barrier())  # released, before it is asked for again
        first.barrier(SOON_S)  # the same one, not the second
        other.result(SOON_S)
        # And the next is a new one.
        with pytest.raises(WaitTimeout):
            first.barrier(0.01)
        # Leaving waits for it first: the other rank reaches it, then leaves too.
        leaving = start(lambda: first.barrier(SOON_S, last=True))
        second.barrier(SOON_S)
        second.barrier(SOON_S, last=True)
        leaving.result(SOON_S)


def test_a_barrier_that_ended_after_its_timeout_is_not_taken_for_the_next() -> None:
    """The release came between the call that timed out and its repetition: a rank hung for ever."""
    with serving(2) as served, joined(served, 2) as (first, second):
        for number in range(1, 4):
            with pytest.raises(WaitTimeout):
                first.barrier(0.01)
            second.barrier(SOON_S)
            eventually(lambda number=number: first.released == number)  # type: ignore[misc]
            first.barrier(0.0)  # over already
        leaving = start(lambda: second.barrier(SOON_S, last=True))
        first.barrier(SOON_S, last=True)
        leaving.result(SOON_S)


def test_a_barrier_that_a_rank_has_left_without_can_never_end_and_says_so() -> None:
    with serving(2, tell=True) as served, joined(served, 2) as (first, second):
        waiting = start(lambda: first.barrier(SOON_S))
        second.leave()
        error = raised(waiting, JobFailed)
        assert "rank 1 has left the world without it" in str(error)


def test_no_record_waits_for_the_acknowledgement_of_the_one_before() -> None:
    """Nagle's algorithm at the server's end held the news of a failure up by 40 ms."""
    with serving(2) as served, joined(served, 2) as clients:
        streams = [member.stream for member in served.server._members.values()]
        for stream in [*streams, *(client._stream for client in clients)]:
            assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- failures -------------------------------------------------------------------------------------


def test_a_failure_reaches_everyone_blocked_or_not_at_once() -> None:
    with serving(5, tell=True) as served:
        clients = [served.client(rank) for rank in range(5)]
        told = [threading.Event() for _ in clients]
        for client, event in zip(clients, told, strict=True):
            client.on_failure(lambda failure, event=event: event.set())  # type: ignore[misc]
        joins = [start_join(client, 5) for client in clients[:3]]  # blocked; 3 and 4 are not
        served.event(EventKind.JOINED, 2)
        began = time.monotonic()
        clients[3].report(Failure(3, "exception", "ValueError: boom", traceback="line 12"))
        for join in joins:
            error = raised(join, JobFailed)
            assert "rank 3 failed: ValueError: boom" in str(error)
            assert "waiting for all ranks to join" in str(error)
            assert "Traceback of rank 3:\nline 12" in str(error)
        assert all(event.wait(SOON_S) for event in told)
        assert time.monotonic() - began < AT_ONCE_S
        with pytest.raises(JobFailed):  # whoever calls later is told at once
            clients[4].barrier()
        late: list[Failure] = []
        clients[4].on_failure(late.append)
        assert [failure.rank for failure in late] == [3]
        for client in clients:
            client.close()


def test_a_failure_releases_a_blocked_barrier_and_reaches_who_comes_later() -> None:
    with serving(3, tell=True) as served:
        clients = [served.client(rank) for rank in range(2)]
        waiting = start_join(clients[0], 3)
        clients[1].report(Failure(1, "exit", "it called sys.exit(3)", exit_code=3))
        assert isinstance(raised(waiting, JobFailed), JobFailed)
        late = served.client(2)  # started after the failure
        with pytest.raises(JobFailed, match=r"it called sys.exit\(3\)"):
            late.join(3, address(2))
        for client in [*clients, late]:
            client.close()


def test_a_rank_speaks_for_itself_alone() -> None:
    with serving(2) as served, joined(served, 2) as (first, _):
        first.report(Failure(1, "exception", "it was rank 1"))
        event = served.event(EventKind.REPORTED)
        assert event.rank == 0 and event.failure is not None and event.failure.rank == 0


def test_a_huge_report_is_bounded_and_escaped() -> None:
    with serving(2, tell=True) as served, joined(served, 2) as (first, second):
        waiting = start(lambda: second.barrier(SOON_S))
        nasty = "\x1b[2J\x1b[31m\x07\x00 surrogate \udcff \r " + "x" * 30_000_000 + "the end"
        first.report(Failure(0, "exception", nasty, traceback=nasty, doing="computing 2F3"))
        error = raised(waiting, JobFailed)
        assert isinstance(error, JobFailed)
        for text in (error.failure.message, error.failure.traceback):
            assert len(text) <= RECORD_TEXT_LIMIT
            assert text.startswith("\\x1b[2J\\x1b[31m\\x07\\x00 surrogate \\udcff \\r xxx")
            assert text.endswith("the end")
            assert "characters left out" in text
            assert all(c == "\n" or c.isprintable() for c in text)


def test_escapes_alone_cannot_make_a_report_longer_than_its_bound() -> None:
    record = Failure(0, "exception", "\x1b" * 10_000_000).to_record()
    assert len(record["message"]) <= RECORD_TEXT_LIMIT


def test_goodbye_and_loss_are_told_apart() -> None:
    with serving(2) as served, joined(served, 2) as (first, second):
        first.say_doing("computing\n2F3 \x1b[2J" + "y" * 1000)
        first.close()
        second.close(goodbye=False)
        served.event(EventKind.LEFT, 0)
        served.event(EventKind.LOST, 1)
        assert served.kinds(EventKind.LEFT) == [0]
        assert served.kinds(EventKind.LOST) == [1]
        text = served.event(EventKind.DOING, 0).text
        assert text.startswith("computing 2F3 \\x1b[2Jyyy") and len(text) <= 200
        with pytest.raises(TransportClosed):
            first.barrier()
        first.close()  # a second time does nothing
        first.report(Failure(0, "exception", "too late"))  # never raises


# -- nonsense -------------------------------------------------------------------------------------


def record(number: int, content: object) -> bytes:
    return encode(FrameKind.RECORD, number, content)


def say(client: ControlClient, words: Callable[[int], bytes]) -> None:
    """Send bytes in the place of the client's next record, and nothing after them."""
    with client._sending, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        client._closed = True
        client._stream.socket.setblocking(True)
        client._stream.socket.sendall(words(client._stream._sequence))


def hang_up(client: ControlClient) -> None:
    client._closed = False
    client.close()


JOIN = {"record": "join", "world_size": 3, "address": ["host", "", "127.0.0.1", 1000, 0]}
NONSENSE: dict[str, Callable[[int], bytes]] = {
    "garbage": lambda n: b"GET / HTTP/1.0\r\n\r\n",
    "a message": lambda n: encode(FrameKind.MESSAGE, n, {"record": "join"}),
    "not a map": lambda n: record(n, [1, 2, 3]),
    "no name": lambda n: record(n, {"name": "join"}),
    "no such record": lambda n: record(n, {"record": "obey"}),
    "a wrong sequence": lambda n: record(n + 5, {"record": "barrier"}),
    "a payload": lambda n: encode(FrameKind.RECORD, n, {"record": "barrier"}, payload_nbytes=5),
    "too long": lambda n: MAGIC + bytes(HEADER.size - 4),
    "over the limit": lambda n: encode(
        FrameKind.RECORD, n, {"record": "doing", "doing": "x" * RECORD_LIMITS.meta_nbytes}
    ),
    "an address that is none": lambda n: record(
        n, {"record": "join", "world_size": 3, "address": [1, 2]}
    ),
    "fewer GPUs than none": lambda n: record(
        n, {**JOIN, "address": ["host", "", "127.0.0.1", 1000, -1]}
    ),
    "more GPUs than there can be": lambda n: record(
        n, {**JOIN, "address": ["host", "", "127.0.0.1", 1000, 10**6]}
    ),
    "versions that are none": lambda n: record(n, {**JOIN, "versions": "1.0"}),
    "versions of what is no name": lambda n: record(n, {**JOIN, "versions": {"torch": 2}}),
    "too many versions": lambda n: record(
        n, {**JOIN, "versions": {f"{i}": "1" for i in range(17)}}
    ),
    "a failure that is none": lambda n: record(n, {"record": "failed", "failure": "boom"}),
    "a failure without a cause": lambda n: record(
        n, {"record": "failed", "failure": {"rank": 0, "message": "m", "cause": "bad luck"}}
    ),
    "an exit code that is a list": lambda n: record(
        n,
        {
            "record": "failed",
            "failure": {"rank": 0, "message": "", "cause": "exit", "exit_code": []},
        },
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_ends_that_connection_with_an_event_and_disturbs_nobody(name: str) -> None:
    with serving(3) as served:
        others = [served.client(rank) for rank in (0, 1)]
        joins = [start_join(client, 3) for client in others]
        bad = served.client(2)
        say(bad, NONSENSE[name])
        event = served.event(EventKind.FAILED, 2)
        assert event.failure is not None and event.failure.cause == "lost"
        assert event.failure.message.startswith("its control connection sent nonsense: ")
        assert event.failure.message.isprintable()
        for join in joins:
            assert not join.done()
        assert set(served.kinds(EventKind.LOST)) <= {2}
        assert served.kinds(EventKind.FAILED) == [2]
        hang_up(bad)
        for client in others:
            client.close()


def test_what_came_before_nonsense_is_still_heard() -> None:
    with serving(2) as served:
        bad = served.client(1)
        report = {"record": "failed", "failure": Failure(1, "exit", "m").to_record()}
        say(bad, lambda n: record(n, report) + b"garbage, in the same breath")
        assert served.event(EventKind.REPORTED, 1).failure == Failure(1, "exit", "m")
        served.event(EventKind.FAILED, 1)
        hang_up(bad)


def test_who_was_interrupted_while_it_spoke_ends_the_stream_and_talks_no_nonsense() -> None:
    class InterruptError(BaseException):
        """Like Ctrl-C."""

    class Interrupted(socket.socket):
        def send(self, *arguments: Any) -> int:
            super().send(*arguments)
            raise InterruptError  # as between two steps of the interpreter

    one, other = socket.socketpair()
    with other, Interrupted(fileno=one.detach()) as sock:
        other.setblocking(False)
        mine, theirs = RecordStream(sock), RecordStream(other)
        with pytest.raises(InterruptError):
            mine.send({"record": "first"})
        mine.send({"record": "second"})
        assert not mine.unsent
        assert theirs.receive() == ([{"record": "first"}], False)
        assert theirs.error is None


def test_the_last_words_of_a_rank_that_reads_nothing_are_heard() -> None:
    # It dies with unread records in its buffer: the kernel resets the connection.
    with serving(2, tell=True) as served:
        mute, talker = served.client(0), served.client(1)
        mute._stream.socket.setblocking(True)
        talker.report(Failure(1, "exit", "first"))
        served.event(EventKind.REPORTED, 1)
        mute.report(Failure(0, "exit", "second"))
        mute.close(goodbye=False)
        assert served.event(EventKind.REPORTED, 0).failure == Failure(0, "exit", "second")
        served.event(EventKind.LOST, 0)
        talker.close()


def test_nonsense_from_the_rendezvous_is_a_failure_with_a_name() -> None:
    with serving(2) as served, joined(served, 2) as (first, _):
        waiting = start(lambda: first.barrier(SOON_S))
        served.event(EventKind.JOINED, 0)
        (member,) = [m for m in served.server._members.values() if m.rank == 0]
        member.stream.socket.send(b"nonsense")
        error = raised(waiting, JobFailed)
        assert "the rendezvous sent nonsense" in str(error)


# -- several hosts --------------------------------------------------------------------------------


def test_who_does_not_know_its_own_name_is_found_as_the_rendezvous_was() -> None:
    """Ranks on the rendezvous's host: each of the others has reached that by some address."""
    served = Served(2, listening=[serve("")])
    port = served.server.address[1]
    try:
        clients = [
            ControlClient((host, port), served.secret, rank, timeout=SOON_S)
            for rank, host in enumerate(("127.0.0.1", "127.0.0.2"))
        ]
        assert clients[0].local_host == "127.0.0.1"
        unnamed = Address("host", "", ("", 1234))
        books = [start(lambda c=client: c.join(2, unnamed)) for client in clients]  # type: ignore[misc]
        for rank, host in enumerate(("127.0.0.1", "127.0.0.2")):
            book = books[rank].result(SOON_S)
            assert [entry.tcp for entry in book.values()] == [(host, 1234)] * 2
        for client in clients:
            client.close()
    finally:
        served.close()


def test_ranks_that_run_other_software_are_not_put_together() -> None:
    with serving(3, tell=True) as served:
        clients = [served.client(rank) for rank in range(3)]
        joins = []
        for client, versions in zip(
            clients, ({"a": "1", "b": "2"}, {"a": "1", "c": "x"}, {"a": "2"}), strict=True
        ):
            joins.append(start(lambda c=client, v=versions: c.join(3, address(c.rank), versions=v)))
            served.event(EventKind.JOINED, client.rank)
        for join in joins:
            error = raised(join, JobFailed)
            assert isinstance(error, JobFailed) and error.failure.rank == 2
            assert error.failure.cause == "rendezvous"
            says = "it runs a 2, but rank 0 runs a 1: all must run the same"
            assert error.failure.message == says
        assert served.kinds(EventKind.COMPLETE) == []
        for client in clients:
            client.close()


def test_one_that_does_not_fit_is_not_forgotten_when_the_last_one_comes_or_time_is_up() -> None:
    with serving(3, join_timeout_s=0.5) as served:
        clients = [served.client(rank) for rank in range(3)]
        for client, version in zip(clients, ("1", "2", "1"), strict=True):
            start(lambda c=client, v=version: c.join(3, address(c.rank), versions={"a": v}))  # type: ignore[misc]
            served.event(EventKind.JOINED, client.rank)
        assert [e.rank for e in served.events if e.kind is EventKind.FAILED] == [1, 2]
        eventually(lambda: math.isinf(served.loop.next_time()))
        clients[0].close()
        served.event(EventKind.HUNG_UP, 0)  # it is still served
        assert served.kinds(EventKind.COMPLETE) == []
        for client in clients:
            client.close()


def test_an_echo_says_after_what_moment_a_sign_of_life_was_made() -> None:
    for far in (False, True):
        with serving(1, far=far) as served:
            client = served.client(0, timeout=SOON_S)
            eventually(lambda s=served: len(s.kinds(EventKind.BEAT)) >= 3)  # type: ignore[misc]
            now = time.monotonic()
            first, second, third = [
                event.after for event in served.events if event.kind is EventKind.BEAT
            ][:3]
            assert first == -math.inf
            assert (-math.inf < second < third < now) == far
            client.close()


def test_a_rendezvous_that_comes_later_is_waited_for_by_who_is_patient() -> None:
    secret = new_secret()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        where = sock.getsockname()
    with pytest.raises(RendezvousError, match="cannot be reached: Connection refused"):
        ControlClient(where, secret, 0, timeout=SOON_S)
    with pytest.raises(RendezvousError, match="cannot be reached: Connection refused"):
        ControlClient(where, secret, 0, timeout=0.2, patient=True)
    waiting = start(lambda: ControlClient(where, secret, 0, timeout=SOON_S, patient=True))
    time.sleep(0.1)
    served = Served(1, secret=secret, listening=[serve(*where)])
    waiting.result(SOON_S).close()
    served.close()
    began = time.monotonic()
    with pytest.raises(RendezvousError, match="cannot be reached"):
        ControlClient(("no.such.host.invalid", 1), secret, 0, timeout=SOON_S, patient=True)
    assert time.monotonic() - began < SOON_S / 2  # a name that does not exist stays so


@pytest.mark.parametrize("name", ["a..b", "a" * 64])
def test_a_name_that_no_host_can_have_is_an_error_like_one_that_none_has(name: str) -> None:
    says = "no host can have this name"
    with pytest.raises(RendezvousError, match=f"cannot be reached: {says}"):
        ControlClient((name, 1), new_secret(), 0, timeout=SOON_S, patient=True)
    with pytest.raises(OSError, match=says):
        serve(name)
    with pytest.raises(OSError, match=says):
        dial(Address("", "", (name, 1)), unix=True)


# -- strangers ------------------------------------------------------------------------------------


def test_strangers_at_the_door_disturb_no_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_module, "DIAL_AGAIN_S", 0.2)
    with serving(4) as served:
        where = served.server.address
        strangers = [socket.create_connection(where) for _ in range(MAX_PENDING)]
        for number, stranger in enumerate(strangers):
            with contextlib.suppress(OSError):
                if number % 3 == 0:
                    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(100))
                elif number % 3 == 1:
                    stranger.send(b"b")
        clients = [served.client() for _ in range(4)]  # while the door is full of them
        with pytest.raises(AuthenticationError, match="does it serve another job"):
            ControlClient(where, new_secret(), 0, timeout=SOON_S)
        for join in [start_join(client, 4) for client in clients]:
            assert len(join.result(SOON_S)) == 4
        assert served.kinds(EventKind.FAILED) == served.kinds(EventKind.LOST) == []
        assert sorted(served.kinds(EventKind.ATTACHED)) == [0, 1, 2, 3]
        for client in clients:
            client.close()
        for stranger in strangers:
            stranger.close()


def test_a_caller_who_is_pushed_out_by_a_crowd_knocks_again() -> None:
    with serving(1) as served:
        where = served.server.address
        stop = threading.Event()

        def crowd() -> None:
            held: list[socket.socket] = []
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(where, 1.0))
                if len(held) > 4 * MAX_PENDING:
                    held.pop(0).close()
            for sock in held:
                sock.close()

        crowds = [start(crowd) for _ in range(2)]
        try:
            client = served.client(0, timeout=SOON_S)
        finally:
            stop.set()
        for future in crowds:
            future.result(SOON_S)
        assert client.join(1, address(0), SOON_S) == {0: address(0)}
        client.close()


def test_somebody_else_at_the_port_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            caller, _ = impostor.accept()
            with caller:
                caller.recv(64)
                caller.sendall(bytes(64))  # a challenge without the secret
                caller.recv(1)

        answering = start(answer)
        where = impostor.getsockname()
        with pytest.raises(AuthenticationError, match="could not prove that it holds the secret"):
            ControlClient(where, new_secret(), 0, timeout=SOON_S)
        answering.result(SOON_S)


def test_a_server_that_says_nothing_is_given_up_on_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(RendezvousError, match="did not finish the handshake: timed out"):
            ControlClient(silent.getsockname(), new_secret(), 0, timeout=0.2)
        assert time.monotonic() - began < AT_ONCE_S


def test_a_server_that_hung_up_and_then_says_nothing_is_told_as_one_that_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up_once() -> None:
            server.accept()[0].close()  # the calls after it are never answered

        hanging_up = start(hang_up_once)
        with pytest.raises(AuthenticationError, match="keeps hanging up: does it serve another"):
            ControlClient(server.getsockname(), new_secret(), 0, timeout=0.5)
        hanging_up.result(SOON_S)


def test_a_flooding_rank_does_not_starve_the_others() -> None:
    with serving(2) as served, joined(served, 2) as (first, second):
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                second.say_doing("x" * 200)

        flooding = start(flood)
        try:
            began = time.monotonic()
            first.say_doing("I am here")
            served.event(EventKind.DOING, 0)
            assert time.monotonic() - began < AT_ONCE_S
        finally:
            stop.set()
        flooding.result(SOON_S)
