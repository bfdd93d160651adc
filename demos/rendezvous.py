"""Step 4 of the course: how ranks find each other. A tap on the wire prints what they say.

    python demos/rendezvous.py

ends with

    rank 1 and rank 2 are gone; the rendezvous has closed

Three processes are started as torchrun would start them: with RANK and WORLD_SIZE, and BAREPP_PORT
for the port of the rendezvous. Rank 0 starts the rendezvous; ranks 1 and 2 are told the port of
this process instead, which hands on every byte, in both directions, and prints what it means:

    rank 1 dials ──> this tap ──> the rendezvous <── rank 0 dials

First comes a stranger, who does not know the secret: it gets no further than its first 64 bytes.
A rank and the rendezvous prove to each other that they know the secret of the job, without sending
it (transport/sockets/handshake.py has the layout, and what each proof covers). Then they exchange
records: maps in msgpack (transport/wire/records.py reads them). Of the two barriers the first is
the script's; the second is part of leaving the world: no rank leaves before all others can.

Tensors do not travel over this connection. The address book tells each rank where the others
listen; the rank that sends the first message dials the other one, with the same handshake.

You can now say: one process, which every rank can reach, admits only ranks that prove they know
the secret; when all have come, it tells each rank where the others listen.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import barepp
import transport

import torch

WORLD_SIZE = 3
HERE = "127.0.0.1"
# What comes first, in this order: who says it, its name, its size in bytes.
HANDSHAKE = [("rank", "hello", 64), ("server", "challenge", 64), ("rank", "proof", 32)]
HANDSHAKE += [("server", "verdict", 1)]
HELLO = struct.Struct("<4sBBxxii16s32s")  # magic, version, role, rank, peer, job, nonce
QUIET = ("beat", "echo")  # a sign of life twice a second: counted, not printed


def rank(number: int, port: int, secret: str) -> None:
    """Be one rank: join the world, send a tensor round, meet at a barrier, leave."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR=HERE, MASTER_PORT="1", BAREPP_PORT=str(port))
    os.environ["BAREPP_SECRET"] = secret
    with barepp.init() as world:
        world.barrier()
        behind, before = (number + 1) % WORLD_SIZE, (number - 1) % WORLD_SIZE
        world.send(torch.tensor([float(number)]), behind)
        assert world.recv(before).item() == before


class Side:
    """One direction of a tapped connection: hands bytes on, and yields what they mean."""

    def __init__(self, speaker: str, source: socket.socket, target: socket.socket) -> None:
        self.speaker, self.source, self.target = speaker, source, target
        self.handshake = [(name, size) for who, name, size in HANDSHAKE if who == speaker]
        self.unread = b""
        # What reads records reads them from a socket: this is a pair of them, for a copy.
        self.copy, self.reader = socket.socketpair()
        self.reader.setblocking(False)
        self.records = transport.RecordStream(self.reader)

    def hand_on(self) -> Iterator[tuple[str, str]]:
        """Hand on what has come; yield (name, meaning) of each message in it; "end" at the end."""
        data = self.source.recv(65536)
        if not data:
            self.target.shutdown(socket.SHUT_WR)
            self.copy.close()
            self.reader.close()
            yield "end", "closes the connection"
            return
        self.target.sendall(data)
        self.unread += data
        while self.handshake and len(self.unread) >= self.handshake[0][1]:
            name, size = self.handshake.pop(0)
            message, self.unread = self.unread[:size], self.unread[size:]
            yield name, meaning_of(name, message)
        if not self.handshake and self.unread:
            self.copy.sendall(self.unread)
            self.unread = b""
            for record in self.records.receive()[0]:
                name = record.pop("record")
                yield name, meaning_of_record(name, record)


def meaning_of(name: str, message: bytes) -> str:
    """Return the bytes of a handshake in words."""
    if name == "hello":
        _, version, _, number, _, job, nonce = HELLO.unpack(message)
        return (
            f"I speak version {version} and want to be rank {number} of job {job.hex()[:8]}…; "
            f"my nonce is {nonce.hex()[:8]}…"
        )
    if name == "challenge":
        return f"my nonce is {message.hex()[:8]}…; this HMAC shows that I know the secret"
    if name == "proof":
        return "and this HMAC, over hello and both nonces, shows that I know it too"
    return {1: "accepted"}.get(message[0], f"refused ({message[0]})")


def meaning_of_record(name: str, record: dict[str, object]) -> str:
    """Return the fields of a record in words."""
    if name == "world":
        assert isinstance(record["addresses"], list)
        book = [f"rank {n} at {place(each)}" for n, each in enumerate(record["addresses"])]
        return "the address book: " + "; ".join(book)
    if name == "join":
        assert isinstance(record["versions"], dict)
        versions = " ".join(f"{key} {value}" for key, value in record["versions"].items())
        record = {**record, "address": place(record["address"]), "versions": versions}
    return ", ".join(f"{key} {value}" for key, value in record.items())


def place(address: object) -> str:
    """Return where a rank listens: a Unix name for ranks of its host, TCP for the others."""
    assert isinstance(address, list)
    _, unix, host, port, _ = address
    return f"{unix[:14]}… or {host}:{port}"


def connect(port: int, until_ended: BaseProcess) -> socket.socket:
    """Connect to the rendezvous as soon as rank 0 serves it."""
    while True:
        try:
            return socket.create_connection((HERE, port))
        except ConnectionRefusedError:
            if wait([until_ended.sentinel], timeout=0.05):
                sys.exit("rank 0 has ended, so nobody serves the rendezvous")


def stranger(port: int, rank_0: BaseProcess) -> None:
    """Say something without knowing the secret."""
    with connect(port, rank_0) as sock:
        sock.sendall(bytes(64))
        answer = sock.recv(64)
    print(f"a stranger  -> rendezvous  64 zero bytes; the answer: {answer or 'it hangs up'}")


def tap(entry: socket.socket, port: int, rank_0: BaseProcess, opened: contextlib.ExitStack) -> None:
    """Hand on and print what ranks 1 and 2 and the rendezvous say, until both have gone."""
    sides: dict[socket.socket, Side] = {}
    names: dict[socket.socket, str] = {}  # of the rank at the end of a connection, once it is known
    quiet = ended = 0
    while ended < 2 * (WORLD_SIZE - 1):
        for ready in select.select([entry, *sides], [], [])[0]:
            if ready is entry:
                caller = opened.enter_context(entry.accept()[0])
                server = opened.enter_context(connect(port, rank_0))
                sides[caller] = Side("rank", caller, server)
                sides[server] = Side("server", server, caller)
                names[caller] = names[server] = "a rank"
                print(f"a rank      dials the rendezvous at {HERE}:{port}")
                continue
            side = sides[ready]
            for name, meaning in side.hand_on():
                if name == "hello":
                    number = meaning.split("rank ")[1].split()[0]
                    names[ready] = names[side.target] = f"rank {number}"
                if name in QUIET:
                    quiet += 1
                    continue
                if name == "end":
                    ended += 1
                    del sides[ready]
                ends = [f"{names[ready]:<11}", "rendezvous"]
                first, second = ends if side.speaker == "rank" else ends[::-1]
                print(f"{first:<11} -> {second:<11} {name:<10} {meaning}".rstrip())
    print(f"(and {quiet} signs of life, two a second, which are not shown)")


def main() -> None:
    """Start the ranks, and listen to them."""
    secret = secrets.token_hex(32)
    with socket.create_server((HERE, 0)) as entry, socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
        free.close()  # rank 0 will listen there
        context = get_context("fork")
        ranks = [
            context.Process(
                target=rank, args=(n, entry.getsockname()[1] if n else port, secret), daemon=True
            )
            for n in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        stranger(port, ranks[0])
        with contextlib.ExitStack() as opened:
            tap(entry, port, ranks[0], opened)
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            sys.exit(f"the ranks ended with codes {codes}")
    print("rank 1 and rank 2 are gone; the rendezvous has closed")


if __name__ == "__main__":
    main()
