"""Two hosts on one machine: a network namespace each, and a wire between them that can fail.

    with Hosts() as hosts:
        starter.start(script, {...}, net=hosts.nets[0])
        hosts.wire(delay_s=0.02)

Each namespace has a TUN device (the kernel's Documentation/networking/tuntap.rst). What it sends is
read here and written to the other one: later, or not at all. Nobody is told when a packet is
dropped, as when a cable is pulled behind the next switch. Nothing of this has a name, and it is all
gone with the process that holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time

CLONE_NEWNET = 0x40000000  # unshare(2), setns(2)
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
IPV4 = ("10.77.0.1", "10.77.0.2")
IPV6 = ("fd77::1", "fd77::2")


def enter(net: str) -> None:
    """Move this thread, and no other, into a network namespace, given by a path (setns(2))."""
    with open(net) as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"namespace {net}")


class Hosts:
    """Two hosts, `nets[0]` and `nets[1]`, at `IPV4` and `IPV6`; a healthy wire between them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.why_not = "the holder of the namespaces ended" if not line else json.loads(line)
        self.nets = [f"/proc/{self._process.pid}/fd/{fd}" for fd in (10, 11)]

    def wire(self, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """Let packets come later, in either direction, and lose this part of them: 1.0 is a cut."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([delay_s, loss]).encode() + b"\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline()

    def link(self, number: int, *, up: bool) -> None:
        """Take a host's end of the wire down, its addresses included, or up again."""
        down = ["addr flush dev wire", "link set wire down"]
        for command in commands(number) if up else down:
            subprocess.run(
                ["ip", *command.split()], check=True, preexec_fn=lambda: enter(self.nets[number])
            )

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let both hosts vanish."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Hold the namespaces and be the wire, until killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    why_not, devices = "", []
    if shutil.which("ip") is None:
        why_not = "there is no ip command (iproute2)"
    try:
        for number in (0, 1) if not why_not else ():
            devices.append(host(number))
    except (OSError, subprocess.CalledProcessError) as error:
        why_not = f"this user cannot make network namespaces: {error}"
    print(json.dumps(why_not), flush=True)
    if not why_not:
        forward(devices)


def host(number: int) -> int:
    """Make a namespace, kept as descriptor 10 or 11, and return its end of the wire."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    os.dup2(os.open("/proc/self/ns/net", os.O_RDONLY), 10 + number)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"wire", IFF_TUN | IFF_NO_PI))
    for command in ("link set lo up", *commands(number)):
        subprocess.run(["ip", *command.split()], check=True)
    return device


def commands(number: int) -> list[str]:
    """Return what gives a host its end of the wire; what it has already stays as it is."""
    return [
        f"addr replace {IPV4[number]}/24 dev wire",
        f"addr replace {IPV6[number]}/64 dev wire nodad",
        "link set wire up",
    ]


def forward(devices: list[int]) -> None:
    poll = select.poll()
    for fd in (0, *devices):
        poll.register(fd, select.POLLIN)
    delay_s, loss = 0.0, 0.0
    chance = random.Random(0)
    numbers = itertools.count()  # packets that are due at once stay in order
    under_way: list[tuple[float, int, int, bytes]] = []
    while True:
        left = under_way[0][0] - time.monotonic() if under_way else None
        ready = poll.poll(None if left is None else max(0.0, left * 1e3))
        for fd, _ in ready:
            if fd == 0:
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                delay_s, loss = json.loads(line)
                print("done", flush=True)
                continue
            packet = os.read(fd, 65536)
            if chance.random() >= loss:
                other = devices[1 - devices.index(fd)]
                due = time.monotonic() + delay_s
                heapq.heappush(under_way, (due, next(numbers), other, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, other, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # that end of the wire is down
                os.write(other, packet)


if __name__ == "__main__":
    main()
