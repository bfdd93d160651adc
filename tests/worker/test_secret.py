"""The job's secret where no launcher of ours hands it over: who may read it, and what is left."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transport_worlds import SOON_S, start

from barepp.errors import UsageError
from barepp.worker.external.secret import (
    _name,
    ask_for_secret,
    give_secret,
    given_secret,
    secret_socket,
)


def test_the_environment_gives_it_or_a_file(tmp_path: Path) -> None:
    assert given_secret({}) is None
    assert given_secret({"BAREPP_SECRET": "0123456789abcdef"}) == b"0123456789abcdef"
    assert given_secret({"BAREPP_SECRET": "0123456789abcdef\udcff"}) == b"0123456789abcdef\xff"
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef in a file\n")
    path.chmod(0o600)
    given = {"BAREPP_SECRET_FILE": str(path)}
    assert given_secret(given) == b"0123456789abcdef in a file"
    path.chmod(0o640)
    with pytest.raises(UsageError, match="has mode 0640: others may read it; chmod 600 it"):
        given_secret(given)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(UsageError, match=r"has 5 bytes, which can be guessed: it needs 16"):
        given_secret(given)
    path.unlink()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        given_secret(given)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match="belongs to user 12345"):
        given_secret({"BAREPP_SECRET_FILE": str(path)})


# -- the secret that rank 0 draws -----------------------------------------------------------------

SECRET = bytes(range(32))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name} {os.getpid()}"


def serve(listening: socket.socket) -> None:
    """Answer one process that asks, as the process beside rank 0 does."""
    select.select([listening], [], [], SOON_S)
    give_secret(listening, SECRET)


def test_the_others_wait_for_it_and_nothing_is_left(run: str) -> None:
    asking = [start(lambda: ask_for_secret(run, SOON_S)) for _ in range(3)]
    with secret_socket(run) as listening:
        for _ in asking:
            serve(listening)
        assert [each.result(SOON_S) for each in asking] == [SECRET] * 3
        with pytest.raises(UsageError, match="already in use; two jobs at once need different po"):
            secret_socket(run)
        give_secret(listening, SECRET)  # nobody asks: returns at once
    with pytest.raises(UsageError, match=r"has not given the secret of run .* within 0\.1 s"):
        ask_for_secret(run, 0.1)
    secret_socket(run).close()


def test_who_hangs_up_is_asked_again(run: str) -> None:
    asking = start(lambda: ask_for_secret(run, SOON_S))
    with secret_socket(run) as listening:
        select.select([listening], [], [], SOON_S)
        listening.accept()[0].close()
        serve(listening)
        assert asking.result(SOON_S) == SECRET


def test_who_says_nothing_is_waited_for_no_longer_than_asked(run: str) -> None:
    with secret_socket(run), pytest.raises(UsageError, match="has not given the secret"):
        ask_for_secret(run, 0.1)


def test_a_long_name_of_a_run_has_a_socket() -> None:
    with secret_socket("x" * 5000) as listening, secret_socket("x" * 5001):
        asking = start(lambda: ask_for_secret("x" * 5000, SOON_S))
        serve(listening)
        assert asking.result(SOON_S) == SECRET


AS_ANOTHER_USER = """
import os, select, socket, sys, time
address = "\\0" + sys.argv[2]
os.setuid(12345)
with socket.socket(socket.AF_UNIX) as sock:
    if sys.argv[1] == "ask":
        sock.connect(address)
        print("got", sock.recv(100), flush=True)
    else:
        sock.bind(address)
        sock.listen()
        print("listening", flush=True)
        asking, _ = sock.accept()
        print("got", asking.recv(100), flush=True)
        time.sleep(60)
"""


@pytest.fixture
def another_user(run: str) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with contextlib.ExitStack() as stack:

        def begin(what: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", AS_ANOTHER_USER, what, _name(run)[1:]]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def test_another_user_does_not_get_it(run: str, another_user) -> None:
    with secret_socket(run) as listening:
        stranger = another_user("ask")
        serve(listening)
        assert stranger.communicate(timeout=SOON_S)[0] == "got b''\n"
        asking = start(lambda: ask_for_secret(run, SOON_S))
        serve(listening)
        assert asking.result(SOON_S) == SECRET


def test_another_user_who_takes_the_name_is_not_believed(run: str, another_user) -> None:
    stranger = another_user("listen")
    assert stranger.stdout.readline() == "listening\n"
    with pytest.raises(UsageError, match="user 12345 has taken the name of run"):
        ask_for_secret(run, SOON_S)
    assert stranger.stdout.readline() == "got b''\n"  # nothing is told to it either
    with pytest.raises(UsageError, match="already in use"):
        secret_socket(run)
