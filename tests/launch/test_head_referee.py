"""Node 0's referee by itself: what it tells another node's launcher, and believes of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starter import eventually

from barepp.launch.hang_detector import HangDetector
from barepp.launch.hosts.head import Head
from barepp.launch.hosts.protocol import Link, Nodes
from barepp.launch.job_state import JobState, Member
from barepp.launch.referee import Hooks
from barepp.worker.spec import Options
from transport.errors import Failure
from transport.rendezvous.client import ControlClient
from transport.rendezvous.dial import dial
from transport.rendezvous.loop import EventLoop
from transport.sockets.handshake import new_secret


class Led:
    """Node 0's part for two ranks, one a node, in this process; node 1's launcher is `link`."""

    def __init__(self) -> None:
        self.secret = new_secret()
        made = Options(2)
        watch = HangDetector(range(2), made.heartbeat_s, made.timeout_s)
        self.loop = EventLoop()
        self.members = {rank: Member(rank) for rank in range(2)}
        job = JobState(made, self.loop, watch, members=self.members)
        self.head = Head(job, Nodes(0, 2, "127.0.0.1", 0, self.secret), Hooks())
        self.server = self.head.server
        self.heard: list[dict[str, Any]] = []
        self.link: Link | None = None

    def call(self, rank: int) -> Any:
        """Let rank 1 come, or node 1's launcher (-2), while the loop turns."""
        with ThreadPoolExecutor(1) as pool:
            if rank >= 0:
                come = pool.submit(ControlClient, self.server.address, self.secret, rank)
            else:
                limit = time.monotonic() + 60.0
                come = pool.submit(dial, self.server.address, self.secret, rank, limit)
            self.until(come.done)
            return come.result()

    def until(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            self.loop.turn(time.monotonic() + 0.01)
            self.heard += self.link.receive() if self.link is not None else []
            return condition()

        eventually(turned)


@pytest.fixture
def led() -> Iterator[Led]:
    made = Led()
    yield made
    if made.link is not None:
        made.link.close()
    made.head.conclude()
    made.server.close()
    made.loop.close()


def test_a_launcher_is_told_when_all_words_of_its_rank_have_been_heard(led: Led) -> None:
    led.link = Link(led.call(-2), 0.0)
    judged = {"record": "judged", "rank": 1}
    with contextlib.closing(led.call(1)):
        led.link.send({"record": "ended", "rank": 1, "status": 0, "killed": False})
        led.until(lambda: led.members[1].status == 0)
        assert led.members[1].exit_code is None and judged not in led.heard  # it may say more
    led.until(lambda: judged in led.heard)
    assert led.members[1].exit_code == 0


def test_what_a_launcher_says_after_its_goodbye_does_not_count(led: Led) -> None:
    led.link = Link(led.call(-2), 0.0)
    led.link.send({"record": "ended", "rank": 1, "status": 0, "killed": False})
    led.link.send({"record": "bye"})
    interrupted = Failure(-1, "signal", "node 1's launcher received SIGINT", signal=2)
    led.link.send({"record": "failed", "failure": interrupted.to_record()})
    for name in ("bye", "obey"):
        led.link.send({"record": name})
    led.until(lambda: led.link is not None and bool(led.link.ended))
    assert led.head.referee.failure is None
