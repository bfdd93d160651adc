"""Who drives: threads that wait, the background thread, interrupts, timers, and the end of it."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S, eventually, start

from transport.errors import InternalError, PeerLost, TransportError
from transport.message.mailbox import Mailbox
from transport.message.work import Receive, Work
from transport.sockets import event_loop as progress
from transport.sockets.event_loop import Progress


class Loop:
    """A `Progress` with pipes; a byte on pipe i completes `works[i]`."""

    def __init__(self, pipes: int) -> None:
        self.crashes: list[BaseException] = []
        self.progress = Progress("progress-under-test", self.crashes.append)
        self.pipes = [os.pipe() for _ in range(pipes)]
        self.works = [self.new_work() for _ in self.pipes]
        self.threads: list[str] = []  # who handled what
        with self.progress.lock, self.progress.guard:
            for i, (reading, _) in enumerate(self.pipes):
                self.progress.register(reading, select.EPOLLIN, lambda _, i=i: self.on_byte(i))  # type: ignore[misc]

    @staticmethod
    def new_work() -> Work:
        return Receive(None, 1, 0, None, None)  # type: ignore[arg-type]

    def on_byte(self, i: int) -> None:
        os.read(self.pipes[i][0], 1)
        self.threads.append(threading.current_thread().name)
        self.works[i].complete()

    def write(self, i: int) -> None:
        os.write(self.pipes[i][1], b"!")

    def close(self) -> None:
        with self.progress.lock, self.progress.guard:
            for work in self.works:
                work.complete()
            self.progress.wake()
        self.progress.stop()
        self.progress.stop()
        with self.progress.lock, self.progress.guard:
            self.progress.wake()  # too late, and harmless
        for pipe in self.pipes:
            for fd in pipe:
                os.close(fd)


@pytest.fixture
def loop() -> Iterator[Loop]:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    made = Loop(8)
    yield made
    made.close()
    eventually(
        lambda: (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before, timeout=5
    )


def test_a_waiting_thread_handles_what_it_waits_for_itself(loop: Loop) -> None:
    """No hand-off between threads: that is what makes a small message fast."""

    def write_while_one_waits(i: int) -> None:
        eventually(lambda: loop.progress.driver is not None)
        loop.write(i)

    for i in range(8):
        writing = start(lambda i=i: write_while_one_waits(i))  # type: ignore[misc]
        assert loop.progress.run_until(loop.works[i], SOON_S)
        writing.result(SOON_S)
    name = threading.current_thread().name
    assert loop.threads == [name] * 8


def test_the_background_thread_handles_the_rest(loop: Loop) -> None:
    for i in range(8):
        loop.write(i)
        eventually(lambda i=i: loop.works[i].done)  # type: ignore[misc]
    assert set(loop.threads) == {"progress-under-test"}


def test_the_background_thread_leaves_what_comes_to_a_driver_that_comes_back(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "RETURN_S", 0.5)
    assert not loop.progress.run_until(loop.works[0], 0.01)  # somebody has been driving
    loop.write(1)
    time.sleep(0.05)  # no event says that a thread that was woken leaves it at that
    assert loop.progress.run_until(loop.works[1], SOON_S)
    loop.write(2)
    eventually(lambda: loop.works[2].done)
    assert loop.threads == [threading.current_thread().name, "progress-under-test"]


def test_a_stop_does_not_wait_for_a_driver_to_come_back(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "RETURN_S", 10 * SOON_S)
    assert not loop.progress.run_until(loop.works[0], 0.01)
    loop.write(1)
    time.sleep(0.05)
    start(loop.progress.stop).result(SOON_S)


def test_followers_are_told_and_one_of_them_takes_over(loop: Loop) -> None:
    order = list(range(8))
    random.Random(0).shuffle(order)
    waiting = [
        start(lambda w=work: loop.progress.run_until(w, SOON_S))  # type: ignore[misc]
        for work in loop.works
    ]
    for i in order:
        loop.write(i)
        assert waiting[i].result(SOON_S)


def test_timeouts_of_driver_and_followers(loop: Loop) -> None:
    begin = time.monotonic()
    waiting = [
        start(lambda w=work, t=0.02 * i: loop.progress.run_until(w, t))  # type: ignore[misc]
        for i, work in enumerate(loop.works)
    ]
    assert [future.result(SOON_S) for future in waiting] == [False] * 8
    assert 0.14 <= time.monotonic() - begin < 2


@pytest.mark.parametrize("driven", [True, False])
def test_timers_fire_whoever_polls(loop: Loop, driven: bool) -> None:
    fired: list[float] = []
    begin = time.monotonic()

    def again() -> None:
        fired.append(time.monotonic() - begin)
        if len(fired) < 5:
            with_lock_held = time.monotonic() + 0.02
            loop.progress.call_at(with_lock_held, again)
        else:
            loop.works[0].complete()

    with loop.progress.lock, loop.progress.guard:
        loop.progress.call_at(begin + 0.02, again)
    if driven:
        assert loop.progress.run_until(loop.works[0], SOON_S)
    else:
        eventually(lambda: loop.works[0].done)
    assert len(fired) == 5
    assert all(a + 0.0199 <= b for a, b in zip([0.0, *fired], fired, strict=False))
    assert fired[-1] < 1


def test_a_timer_set_while_one_drives_is_kept_when_that_one_leaves(loop: Loop) -> None:
    """The background thread sleeps without knowing of it; somebody has to wake it."""
    fired = threading.Event()

    def on_first(_: int = 0) -> None:
        loop.progress.call_at(time.monotonic() + 0.05, fired.set)
        loop.works[0].complete()

    driver = start(lambda: loop.progress.run_until(loop.works[0], SOON_S))
    eventually(lambda: loop.progress.driver is not None)
    time.sleep(0.01)
    with loop.progress.lock, loop.progress.guard:
        loop.progress.call_at(0.0, on_first)
    assert driver.result(SOON_S)
    assert fired.wait(SOON_S)


def test_a_distant_timer_does_not_wake_the_background_thread_after_each_wait(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loop.progress.lock, loop.progress.guard:
        loop.progress.call_at(time.monotonic() + 60, lambda: None)
    loop.write(0)
    assert loop.progress.run_until(loop.works[0], SOON_S)
    time.sleep(0.02)
    wakes: list[int] = []
    monkeypatch.setattr(loop.progress, "wake", lambda: wakes.append(1))
    for i in range(1, 8):
        loop.write(i)
        assert loop.progress.run_until(loop.works[i], SOON_S)
    monkeypatch.undo()
    assert wakes == []


def test_a_handler_may_close_what_comes_next_in_the_same_round(loop: Loop) -> None:
    def closes_all(_: int) -> None:
        for reading, _unused in loop.pipes:
            loop.progress.unregister(reading)
        loop.works[0].complete()

    with loop.progress.lock, loop.progress.guard:
        for i, (reading, _) in enumerate(loop.pipes):
            loop.progress.unregister(reading)
            loop.progress.register(reading, select.EPOLLIN, closes_all)
            loop.write(i)
    assert loop.progress.run_until(loop.works[0], SOON_S)
    assert loop.crashes == []


def test_stop_while_a_driver_sleeps() -> None:
    """The driver reads the wake-up call that was meant for the background thread too."""
    rng = random.Random(8)
    for _ in range(60):
        loop = Loop(3)
        waiting = [
            start(lambda w=work: loop.progress.run_until(w, SOON_S))  # type: ignore[misc] # noqa: B023
            for work in loop.works[: rng.randrange(1, 4)]
        ]
        if rng.random() < 0.8:
            eventually(lambda: loop.progress.driver is not None)  # noqa: B023
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.002)
        closing = start(loop.close)
        closing.result(SOON_S)
        assert all(future.result(SOON_S) for future in waiting)


def test_a_handler_that_raises_is_reported_and_kills_no_thread(loop: Loop) -> None:
    def broken(_: int) -> None:
        os.read(loop.pipes[0][0], 1)
        raise KeyError("a bug")

    with loop.progress.lock, loop.progress.guard:
        loop.progress.unregister(loop.pipes[0][0])
        loop.progress.register(loop.pipes[0][0], select.EPOLLIN, broken)
    loop.write(0)
    eventually(lambda: len(loop.crashes) == 1)
    waiting = start(lambda: loop.progress.run_until(loop.works[1], SOON_S))
    eventually(lambda: loop.progress.driver is not None)
    loop.write(0)
    eventually(lambda: len(loop.crashes) == 2)
    loop.write(1)
    assert waiting.result(SOON_S)
    with pytest.raises(ZeroDivisionError), loop.progress.guard:
        raise ZeroDivisionError
    with pytest.raises(TransportError), loop.progress.guard:
        raise PeerLost("an ordinary end is no crash")
    assert [type(crash) for crash in loop.crashes] == [KeyError, KeyError, ZeroDivisionError]
    loop.write(2)
    eventually(lambda: loop.works[2].done)


def test_what_a_crash_took_off_every_list_fails_for_whoever_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupt between "no longer arriving" and "complete" once left its receive to wait on."""
    with worlds.world("unix", 2) as ranks:
        in_hand, other = ranks[0].irecv(1, 1), ranks[0].irecv(1, 2)
        waits = [start(lambda w=work: w.wait(SOON_S)) for work in (in_hand, other)]  # type: ignore[misc]
        eventually(lambda: ranks[0].progress._followers == 1)
        monkeypatch.setattr(Mailbox, "complete", lambda *_: 1 // 0)
        ranks[1].send(torch.ones(1), 0, 1, timeout=SOON_S)
        for wait in waits:
            assert isinstance(wait.exception(SOON_S / 2), InternalError)
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            in_hand.wait(SOON_S)


class Interrupt(BaseException):
    """What a signal handler raises in the main thread, like Ctrl-C does."""


@pytest.fixture
def interrupts() -> Iterator[None]:
    def handler(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("driving", [True, False])
def test_an_interrupted_wait_leaves_everything_in_order(loop: Loop, driving: bool) -> None:
    other = None
    if not driving:
        other = start(lambda: loop.progress.run_until(loop.works[7], SOON_S))
        eventually(lambda: loop.progress.driver is not None)
    for i in range(20):
        with pytest.raises(Interrupt):
            threading.Timer(0.002 + 0.0002 * i, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            loop.progress.run_until(loop.works[0], SOON_S)
        assert loop.progress._followers == 0
        assert (loop.progress.driver is None) is driving
    loop.write(0)
    assert loop.progress.run_until(loop.works[0], SOON_S)
    if other is not None:
        loop.write(7)
        assert other.result(SOON_S)
    loop.write(1)
    eventually(lambda: loop.works[1].done)  # the background thread is on watch again
    assert loop.crashes == []


# (One that strikes between a socket's birth and its name leaves the closing to the collector.)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("interrupts")
def test_interrupts_in_the_midst_of_traffic_never_corrupt_a_message() -> None:
    """Wherever it strikes: the transport goes on as if nothing had been, or has ended by name."""
    rng = random.Random(2)
    for _ in range(12):
        with worlds.world("unix", 2) as ranks:

            def echo(transport: Any = ranks[1]) -> None:
                try:
                    while True:
                        transport.isend(transport.recv(0, timeout=SOON_S), 0)
                except TransportError:
                    pass

            echoing = start(echo)
            timer = threading.Timer(
                0.002 + rng.random() * 0.02, os.kill, (os.getpid(), signal.SIGUSR1)
            )
            sent = got = 0
            try:
                timer.start()
                while True:
                    sent += 1
                    ranks[0].isend(torch.full((200_000,), sent, dtype=torch.int32), 1)
                    message = ranks[0].recv(1, timeout=SOON_S)
                    got += 1
                    assert (message == got).all()
            except Interrupt:
                pass
            timer.join()
            try:
                message = ranks[0].recv(1, 99, timeout=0.01)
            except TimeoutError:
                for rank in ranks:
                    rank.close(SOON_S)
            except (InternalError, PeerLost) as error:
                assert isinstance(error, PeerLost) or "Interrupt" in str(error)
            for rank in ranks:
                rank.abort(PeerLost("over"))
            echoing.result(SOON_S)
