"""Ranks whose every connection leads through a misbehaving network; for tests only."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import Finished, run_job
from proxy import Network
from transport_worlds import SOCKETS
from troubles import RENDEZVOUS, Trouble

import barepp.launch.job
from transport.errors import TransportClosed
from transport.rendezvous.server import RendezvousServer
from transport.sockets.addresses import Address
from transport.sockets.handshake import new_secret


@contextlib.contextmanager
def world(
    network: Network, world_size: int, troubles: Sequence[Trouble] = (), **options: Any
) -> Iterator[list[Any]]:
    """Make TCP transports that know of one another only the network's fronts."""
    fronts = network.arrange(world_size, troubles)
    cls, secret = SOCKETS["tcp"], new_secret()
    listening = [cls.listen() for _ in range(world_size)]
    book = {}
    for rank, (_, address) in enumerate(listening):
        network.aim(rank, address.tcp)
        book[rank] = dataclasses.replace(address, tcp=fronts[rank])
    transports = [
        cls(rank, world_size, book, listening[rank][0], secret, **options)
        for rank in range(world_size)
    ]
    try:
        yield transports
    finally:
        for transport in transports:
            transport.abort(TransportClosed("the test is over"))


def behind(network: Network, fronts: dict[int, tuple[str, int]]) -> type[RendezvousServer]:
    """Return a rendezvous that sends ranks to one another, and to itself, through the network.

    The address that a rank announces is where the network connects on to; what the others are
    told is the front. So a complete job needs no change, and its ranks notice nothing.
    """

    class Behind(RendezvousServer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            network.aim(RENDEZVOUS, self.address)
            self.address = fronts[RENDEZVOUS]

        def _handle(self, member: Any, record: dict[str, Any]) -> None:
            if record["record"] == "join":
                address = Address.from_record(record["address"])
                network.aim(member.rank, address.tcp)
                front = dataclasses.replace(address, tcp=fronts[member.rank])
                record = {**record, "address": front.to_record()}
            super()._handle(member, record)

    return Behind


def job(
    network: Network,
    folder: Path,
    text: str,
    world_size: int,
    troubles: Sequence[Trouble] = (),
    **options: Any,
) -> Finished:
    """Run a script as `run_job` does, over TCP, with the network in between."""
    fronts = network.arrange(world_size, troubles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(barepp.launch.job, "RendezvousServer", behind(network, fronts))
        return run_job(folder, text, world_size, transport="tcp", **options)
