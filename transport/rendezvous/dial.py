"""The way to the rendezvous: connect, prove that we hold the secret, claim a rank; blocking."""

from __future__ import annotations

import math
import socket
import time
from typing import Final

from transport.errors import AuthenticationError, RendezvousError
from transport.sockets.handshake import ANY_RANK, Hello, Initiator, Role, Verdict

DIAL_AGAIN_S: Final = 3.0  # how long to try again when the rendezvous hangs up on us
RETRY_S: Final = 0.02  # between two attempts


def dial(
    address: tuple[str, int], secret: bytes, rank: int, deadline: float, *, patient: bool = False
) -> socket.socket:
    """Connect to the rendezvous and claim `rank`; return the socket, non-blocking from here on.

    With `patient` a rendezvous that cannot be reached yet is waited for until the deadline, because
    whoever serves it may have been started after us; a name that does not exist is not.

    Being hung up on is no answer yet: when strangers crowd the port of the rendezvous the oldest
    caller has to give way, and that may be this one.
    """
    dial_until = math.inf
    while True:
        try:
            return _shake_hands(address, secret, rank, deadline)
        except _HungUpError as error:
            dial_until = min(deadline, dial_until, time.monotonic() + DIAL_AGAIN_S)
            if time.monotonic() >= dial_until:
                raise _unwelcome(address) from error
        except RendezvousError as error:
            if dial_until < math.inf and time.monotonic() >= deadline:
                raise _unwelcome(address) from error  # time was over in the midst of one more try
            known = not isinstance(error.__cause__, (socket.gaierror, UnicodeError))
            if not (patient and known) or time.monotonic() + RETRY_S >= deadline:
                raise
        time.sleep(RETRY_S)


def _unwelcome(address: tuple[str, int]) -> AuthenticationError:
    where = f"the rendezvous at {address[0]}:{address[1]}"
    return AuthenticationError(f"{where} keeps hanging up: does it serve another job?")


class _HungUpError(Exception):
    """The rendezvous ended the connection in the midst of the handshake."""


def _shake_hands(
    address: tuple[str, int], secret: bytes, rank: int, deadline: float
) -> socket.socket:
    initiator = Initiator(secret, Hello(Role.CONTROL, rank, ANY_RANK))
    where = f"the rendezvous at {address[0]}:{address[1]}"
    try:
        sock = socket.create_connection(address, _seconds_until(deadline))
    except OSError as error:
        raise RendezvousError(f"{where} cannot be reached: {error.strerror or error}") from error
    except UnicodeError as error:  # a part of the name is empty, or too long
        raise RendezvousError(f"{where} cannot be reached: no host can have this name") from error
    try:
        sock.sendall(initiator.hello)
        while initiator.verdict is None:
            data = b""
            while len(data) < initiator.needed:
                sock.settimeout(_seconds_until(deadline))
                more = sock.recv(initiator.needed - len(data))
                if not more:
                    raise _HungUpError
                data += more
            sock.sendall(initiator.receive(data))
        if initiator.verdict is not Verdict.ACCEPTED:
            raise RendezvousError(f"{where} refused rank {rank}")
        sock.setblocking(False)
    except (ConnectionResetError, BrokenPipeError) as error:
        sock.close()
        raise _HungUpError from error
    except OSError as error:
        sock.close()
        raise RendezvousError(f"{where} did not finish the handshake: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def _seconds_until(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())  # 0 would make the socket non-blocking
