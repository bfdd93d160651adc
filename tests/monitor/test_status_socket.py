"""The launcher's door: whoever may not come in, talks nonsense or never reads disturbs nobody."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest
from jobs import nothing_left
from transport_worlds import eventually

from barepp.errors import JobEnded, NobodyAnswers
from barepp.monitor.client import Line, SocketName, line_to, socket_names
from barepp.monitor.status_socket import MAX_CALLERS, Caller, StatusSocket, socket_prefix
from transport.rendezvous.loop import EventLoop
from transport.wire.format import FrameKind, encode

NOBODY = 65534
JOB = {
    "record": "job",
    "pid": os.getpid(),
    "task": "script.py",
    "transport": "shm",
    "world_size": 0,
    "age_s": 1.0,
}


def own_doors() -> list[SocketName]:
    """Other jobs may be running on this machine."""
    return [name for name in socket_names() if name.pid == os.getpid()]


class House:
    """A door that is served by a loop of its own; it answers "status" and "long"."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.loop = EventLoop()
        self.door = StatusSocket(self.loop, self._answer)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _answer(self, question: str, caller: Caller) -> None:
        self.questions.append(question)
        if question == "status":
            caller.answer([JOB])
        elif question == "long":
            caller.answer({"record": "part", "text": "x" * 60_000} for _ in range(100))

    def _serve(self) -> None:
        while not self._ended.is_set():
            self.loop.turn()

    def close(self) -> None:
        self._ended.set()
        self.loop.wake()
        self._thread.join()
        self.door.close()
        self.loop.close()


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    try:
        yield house
    finally:
        house.close()
    assert own_doors() == []


def call() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(f"\0{socket_prefix(os.getuid())}{own_doors()[0]}")
    return sock


def question(name: str, sequence: int = 0, **more: object) -> bytes:
    return encode(FrameKind.RECORD, sequence, {"record": name, **more})


def hung_up(sock: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(2**20):
            pass
    sock.close()
    return True


def test_questions_are_answered_one_after_the_other(house):
    with Line(own_doors()[0]) as line:
        for _ in range(3):
            job, ranks = line.status()
            assert job.task == "script.py" and ranks == []
        assert line.launcher_pid == os.getpid()
    assert house.questions == ["status"] * 3


NONSENSE = {
    "another protocol": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "zeros": bytes(100),
    "too long": question("status", more="x" * 2000),
    "no map": encode(FrameKind.RECORD, 0, ["status"]),
    "no name": encode(FrameKind.RECORD, 0, {"status": 1}),
    "no record": encode(FrameKind.MESSAGE, 0, {"record": "status"}),
    "out of sequence": question("status", 1),
    "two at once": question("status") + question("status", 1),
}


@pytest.mark.parametrize("words", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_hung_up_on_and_disturbs_nobody(house, words):
    with Line(own_doors()[0]) as line:
        line.status()
        sock = call()
        sock.sendall(words)
        assert hung_up(sock)
        line.status()
    assert house.questions == ["status"] * 2


def test_random_bytes_are_hung_up_on(house):
    rng = random.Random(0)
    good = question("status", note=["whatever", 1])
    for _ in range(100):
        sock = call()
        changed = bytearray(good)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(OSError):
            sock.sendall(changed + rng.randbytes(200))
        assert hung_up(sock)
    assert house.questions == []


def test_what_a_question_holds_besides_its_name_is_not_looked_at(house):
    with call() as sock:
        sock.sendall(question("status", command="rm", ranks=[1, 2], __class__="x"))
        assert sock.recv(2**16)
    assert house.questions == ["status"]


def test_who_never_reads_holds_up_nobody_and_may_not_ask_twice(house):
    lazy = call()
    lazy.sendall(question("long"))
    eventually(lambda: house.questions == ["long"])
    with Line(own_doors()[0]) as line:
        line.status()
    lazy.sendall(question("long", 1))
    assert hung_up(lazy)
    assert house.questions == ["long", "status"]


def test_a_slow_reader_gets_the_whole_answer(house):
    with Line(own_doors()[0]) as line:
        parts = line._ask("long")
    assert len(parts) == 100 and all(len(part["text"]) == 60_000 for part in parts)


def test_for_one_caller_too_many_the_quietest_has_to_go(house):
    callers = [call() for _ in range(MAX_CALLERS)]
    for sock in [callers[0], *callers[2:]]:
        sock.sendall(question("status"))
        assert sock.recv(2**16)
    last = call()
    last.sendall(question("status"))
    assert last.recv(2**16)
    assert hung_up(callers.pop(1))
    for sock in callers:
        sock.sendall(question("status", 1))
        assert sock.recv(2**16)
        sock.close()
    last.close()


def test_a_door_that_closes_ends_the_line():
    with nothing_left():
        house = House()
        with Line(own_doors()[0]) as line:
            line.status()
            house.close()
            with pytest.raises(JobEnded, match="has ended"):
                line.status()
    with pytest.raises(NobodyAnswers, match=f"no job {os.getpid()} of this user is running"):
        line_to(str(os.getpid()))


def test_of_several_jobs_one_has_to_be_chosen(house):
    other = House()
    try:
        with pytest.raises(NobodyAnswers) as caught:
            line_to(str(os.getpid()))
        head, *listed = str(caught.value).splitlines()
        assert head == "several jobs are running; choose one by its number:"
        assert [line.split("   ") for line in listed] == [
            [f"  {name}", "script.py, 0 ranks"] for name in own_doors()
        ]
        with line_to(str(own_doors()[1])) as line:
            assert line.status()[0].task == "script.py"
    finally:
        other.close()


# -- another user ----------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody(work) -> Iterator[bytes]:
    """Yield what `work` returns in a child that has become another user and waits for the end."""
    told_r, told_w = os.pipe()
    end_r, end_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.close(end_w)
            os.write(told_w, work())
            os.read(end_r, 1)
        finally:
            os._exit(0)
    os.close(told_w)
    try:
        yield os.read(told_r, 1000)
    finally:
        for fd in (told_r, end_r, end_w):
            os.close(fd)
        os.waitpid(pid, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_hung_up_on_before_anything_is_read(house):
    name = f"\0{socket_prefix(0)}{own_doors()[0]}"

    def knock() -> bytes:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(20)
        sock.connect(name)
        with contextlib.suppress(OSError):
            sock.sendall(question("status"))
        with contextlib.suppress(ConnectionResetError):
            return b"heard %r" % sock.recv(2**16)
        return b"heard b''"

    with as_nobody(knock) as told:
        assert told == b"heard b''"
    assert house.questions == []
    with Line(own_doors()[0]) as line:
        line.status()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_behind_our_name_is_not_believed(house):
    name = f"{os.getpid()}-pretended"

    def pretend() -> bytes:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(f"\0{socket_prefix(0)}{name}")
        sock.listen()
        sock.detach()
        return b"listens"

    with as_nobody(pretend) as told:
        assert told == b"listens"
        assert name in map(str, own_doors())
        with pytest.raises(NobodyAnswers, match=f"user {NOBODY}"):
            Line(SocketName(os.getpid(), "pretended"))
        with line_to(str(os.getpid())) as line:  # it is not counted either
            assert line.status()[0].task == "script.py"
