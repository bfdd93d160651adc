"""Where bytes wait: in the kernel's buffers, then in the memory that their receiver names."""

from __future__ import annotations

import socket

import pytest
import torch
import transport_worlds as worlds
from transport_worlds import SOON_S, start

from transport.errors import WaitTimeout
from transport.message import mailbox, tensors
from transport.sockets import event_loop as progress
from transport.sockets.addresses import (
    BUFFER_NBYTES,
    BUFFER_OF_LARGE_NBYTES,
    LARGE_NBYTES,
    TCP_BUFFER_OF_LARGE_NBYTES,
    tune,
    tune_for,
)


def set_to(nbytes: int) -> int:
    """Return what the kernel makes of a buffer of `nbytes`."""
    one, other = socket.socketpair()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)
        return one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize("name", ["tcp", "unix", "shm"])  # over gloo none is on the stream
def test_a_large_message_narrows_the_buffer_and_the_next_small_one_widens_it(name: str) -> None:
    small, large = torch.ones(3), torch.ones(LARGE_NBYTES, dtype=torch.uint8)
    into = torch.zeros_like(large)
    for_large = TCP_BUFFER_OF_LARGE_NBYTES if name == "tcp" else BUFFER_OF_LARGE_NBYTES
    with worlds.world(name, 2) as (one, other):
        for message, nbytes in (
            (small, BUFFER_NBYTES),
            (large, for_large),
            (large, for_large),
            (small, BUFFER_NBYTES),
        ):
            receive = other.irecv(0, into=into if message is large else None)
            one.send(message, 1, timeout=SOON_S)
            assert torch.equal(receive.wait(SOON_S), message)
            sock = one._peers[1].socket
            if name != "shm" or message is small:  # (its first large one was lent)
                found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                assert found == set_to(nbytes)


@pytest.mark.parametrize("name", ["tcp", "unix"])
def test_a_burst_is_received_into_the_memory_that_is_named_for_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not ahead of that: what is read before its receiver names memory has to be copied there."""
    copied = []

    def overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
        copied.append(target)
        tensors.overwrite(target, source)

    monkeypatch.setattr(mailbox, "overwrite", overwrite)
    monkeypatch.setattr(progress, "RETURN_S", 0.5)  # (both ranks share an interpreter, and a core)
    number, nbytes = 32, 1024 * 1024
    into = torch.zeros(nbytes, dtype=torch.uint8)
    with worlds.world(name, 2) as (one, other):

        def send_all() -> None:
            for i in range(number):
                one.send(torch.full((nbytes,), i, dtype=torch.uint8), 1, timeout=SOON_S)

        with pytest.raises(WaitTimeout):
            other.recv(0, 1, timeout=0.01)  # so that the background thread has seen it wait
        receive = other.irecv(0, into=into)
        sending = start(send_all)
        for i in range(number):
            receive.wait(SOON_S)
            assert (into == i).all()
            if i + 1 < number:
                receive = other.irecv(0, into=into)
        sending.result(SOON_S)
    assert not copied


def test_between_hosts_the_kernel_keeps_its_own() -> None:
    """Two addresses of this machine stand for two hosts."""
    with socket.create_server(("127.0.0.2", 0)) as listening:
        caller = socket.create_connection(
            listening.getsockname(), source_address=("127.0.0.1", 0), timeout=SOON_S
        )
        with caller, listening.accept()[0]:
            options = (socket.SO_SNDBUF, socket.SO_RCVBUF)
            before = [caller.getsockopt(socket.SOL_SOCKET, option) for option in options]
            tune(caller)
            tune_for(caller, LARGE_NBYTES)
            assert before == [caller.getsockopt(socket.SOL_SOCKET, option) for option in options]
            assert caller.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
