"""The launcher's event loop by itself: what is called, in which order, and what is not."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator

import pytest

from transport.rendezvous.loop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_what_has_arrived_is_read_before_a_time_that_is_over(
    loop: EventLoop, pipe: tuple[int, int]
) -> None:
    """Else a launcher that was stopped for a while would take unread words for silence."""
    called: list[str] = []
    loop.register(pipe[0], lambda: called.append("read"))
    loop.call_at(0.0, called.append, "late")
    os.write(pipe[1], b"!")
    loop.turn()
    assert called == ["read", "late"]


def test_a_reader_may_put_off_or_cancel_what_is_due(loop: EventLoop, pipe: tuple[int, int]) -> None:
    called: list[str] = []

    def read() -> None:
        os.read(pipe[0], 1)
        loop.call_at(math.inf, called.append, "put off")
        loop.call_at(None, called.append, "cancelled")
        loop.call_at(0.0, called.append, "new")

    for name in ("put off", "cancelled", "as it was"):
        loop.call_at(0.0, called.append, name)
    loop.register(pipe[0], read)
    os.write(pipe[1], b"!")
    loop.turn()
    assert called == ["as it was", "new"] and math.isinf(loop.next_time())


def test_times_are_kept_in_their_order_and_one_for_each_call(loop: EventLoop) -> None:
    called: list[int] = []
    now = time.monotonic()
    for when, number in ((0.03, 3), (0.01, 1), (0.02, 2), (0.0, 3)):
        loop.call_at(now + when, called.append, number)
    while len(called) < 3:
        loop.turn()
    assert called == [3, 1, 2] and time.monotonic() >= now + 0.02


def test_a_descriptor_that_another_callback_unregisters_is_not_served_any_more(
    loop: EventLoop,
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    served: list[int] = []

    def serve(mine: int) -> None:
        served.append(mine)
        loop.unregister(pipes[1 - mine][0])
        loop.unregister(pipes[mine][0])

    for number, (reader, writer) in enumerate(pipes):
        loop.register(reader, lambda number=number: serve(number))  # type: ignore[misc]
        os.write(writer, b"!")
    loop.turn()
    loop.turn(0.0)
    assert len(served) == 1
    for end in (end for ends in pipes for end in ends):
        os.close(end)


def test_another_thread_ends_the_wait(loop: EventLoop) -> None:
    timer = threading.Timer(0.02, loop.wake)
    timer.start()
    loop.turn()
    timer.join()
    before = time.monotonic()
    loop.turn(before + 0.02)  # the word was read
    assert time.monotonic() >= before + 0.02
