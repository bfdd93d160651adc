"""Step 3 of the course: a tensor crosses from one process to another. How long does that take?

    python -m barepp.launch --world 2 demos/ping_pong.py

ends with

    latency 151.5 µs, bandwidth 3.77 GB/s

First ranks 0 and 1 send one message to and fro with send and recv, which block: a message takes
half the time of a round trip. Small messages show the latency. Then rank 0 starts eight isends in a
row, for which rank 1 has posted eight irecvs: while one message is copied, the next is already on
its way. Large messages show the bandwidth. Ranks above 1 do nothing. (The numbers above are from
two busy cores of a virtual machine.)

You can now say: a send returns as soon as its tensor may be written again, an isend at once;
neither waits until the other rank receives.
"""

import statistics
import time

import barepp

import torch

SIZES = {8: "8 B", 1024: "1 KiB", 65536: "64 KiB", 1 << 20: "1 MiB", 1 << 24: "16 MiB"}
UNDER_WAY = 8


def repeats(nbytes: int) -> int:
    """Return how often to measure: a median needs a few, patience allows fewer large ones."""
    return 200 if nbytes <= 65536 else 40 if nbytes <= 1 << 20 else 7


def ping_pong(world: barepp.World, nbytes: int) -> float:
    """Return the median time in seconds of one message, one way; both ranks block."""
    ball = torch.zeros(nbytes, dtype=torch.uint8)
    times_s = []
    for _ in range(repeats(nbytes) + 1):
        began = time.perf_counter()
        if world.rank == 0:
            world.send(ball, dst=1)
            world.recv(src=1, into=ball)
        else:
            world.recv(src=0, into=ball)
            world.send(ball, dst=0)
        times_s.append((time.perf_counter() - began) / 2)
    return statistics.median(times_s[1:])  # the first one opens the connection


def stream(world: barepp.World, nbytes: int) -> float:
    """Return the median time in seconds of one message when eight are under way at once."""
    balls = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(UNDER_WAY)]
    token = torch.zeros(0)
    times_s = []
    for _ in range(repeats(nbytes) + 1):
        if world.rank == 0:
            world.recv(src=1, into=token)  # "all my irecvs are posted"
            began = time.perf_counter()
            # isend returns at once; the ball may be written again only after its wait().
            works = [world.isend(ball, dst=1, tag=i) for i, ball in enumerate(balls)]
        else:
            # A tag tells the messages apart, so they may be waited for in any order.
            works = [world.irecv(src=0, tag=i, into=ball) for i, ball in enumerate(balls)]
            world.send(token, dst=0)
            began = time.perf_counter()
        for work in works:
            work.wait()
        # Sent is not arrived: rank 0's sends may be complete while bytes lie in the kernel.
        if world.rank == 0:
            world.recv(src=1, into=token)
        else:
            world.send(token, dst=0)
        times_s.append((time.perf_counter() - began) / UNDER_WAY)
    return statistics.median(times_s[1:])


def row(name: str, nbytes: int, blocking_s: float, under_way_s: float) -> str:
    """Return a line of the table."""
    return (
        f"{name:>7} {blocking_s * 1e6:9.1f} µs {nbytes / blocking_s / 1e6:8.2f} MB/s "
        f"{under_way_s * 1e6:11.1f} µs {nbytes / under_way_s / 1e6:8.2f} MB/s"
    )


def main(world: barepp.World) -> None:
    """Play, and tell what was learnt."""
    if world.world_size < 2:
        print("ping-pong needs two players: python -m barepp.launch --world 2 demos/ping_pong.py")
        return
    if world.rank > 1:
        return  # leaving the world waits for the players
    if world.rank == 0:
        print("          send, recv: one at a time  isend, irecv: 8 under way")
    blocking_s, under_way_s = {}, {}
    for nbytes, name in SIZES.items():
        blocking_s[nbytes] = ping_pong(world, nbytes)
        under_way_s[nbytes] = stream(world, nbytes)
        if world.rank == 0:
            print(row(name, nbytes, blocking_s[nbytes], under_way_s[nbytes]))
    if world.rank == 0:
        fastest = max(nbytes / seconds for nbytes, seconds in under_way_s.items())
        print(f"latency {blocking_s[min(SIZES)] * 1e6:.1f} µs, bandwidth {fastest / 1e9:.2f} GB/s")


if __name__ == "__main__":
    with barepp.init() as world:
        main(world)
