"""Where a rank listens: an abstract Unix name for ranks of its host, TCP for all others.

Two ranks share a host when they share the kernel's boot id and the network namespace, because an
abstract Unix name (unix(7)) lives in the latter. It has no file, so nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import ipaddress
import os
import secrets
import select
import socket
import termios
from pathlib import Path
from typing import Final

from transport.errors import ProtocolError, RendezvousError

# Of streams within a host. What has left the processor's cache by the time it is read back costs
# more than it saves. (The kernel cuts them down to net.core.wmem_max and rmem_max.)
BUFFER_NBYTES: Final = 1024 * 1024
BUFFER_OF_LARGE_NBYTES: Final = 256 * 1024
TCP_BUFFER_OF_LARGE_NBYTES: Final = 384 * 1024  # a part of it waits to be acknowledged
LARGE_NBYTES: Final = 16 * 1024 * 1024
BACKLOG: Final = 1024
MAX_GPUS: Final = 4096  # of a rank
_OWN_NAME: Final = secrets.token_hex(16)


@dataclasses.dataclass(frozen=True)
class Address:
    """How to reach one rank. `host` compares equal on one host; `unix` may be empty.

    The name in `tcp` is "" on a host that does not know by which name others reach it. `num_gpus`
    is how many GPUs the rank finds, so that all can agree on whether to use them.
    """

    host: str
    unix: str
    tcp: tuple[str, int]
    num_gpus: int = 0

    def to_record(self) -> list[object]:
        """Return the address as msgpack takes it."""
        return [self.host, self.unix, *self.tcp, self.num_gpus]

    def at(self, name: str) -> Address:
        """Return the address with `name` for a host that has not said its own."""
        return self if self.tcp[0] else dataclasses.replace(self, tcp=(name, self.tcp[1]))

    @classmethod
    def from_record(cls, record: object) -> Address:
        """Read an address that came over the network.

        Raises:
            ProtocolError: it is not one.
        """
        match record:
            case [str(host), str(unix), str(name), int(port), int(num_gpus)] if (
                0 <= port < 65536 and 0 <= num_gpus <= MAX_GPUS
            ):
                return cls(host, unix, (name, port), num_gpus)
        raise ProtocolError(f"not an address: {record!r:.200}")


def host_key() -> str:
    """Return a name that two processes share exactly when an abstract Unix name connects them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:  # a sandbox that hides /proc: this process shares its name with nobody
        return _OWN_NAME


def serve(host: str, port: int = 0) -> socket.socket:
    """Listen over TCP; "" is on every interface, IPv4 and IPv6, and 0 a free port.

    Raises:
        OSError: the name is unknown, not this host's, or the port is taken.
    """
    if not host and socket.has_dualstack_ipv6():
        address, family = ("", port), socket.AF_INET6
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=True)
    family = _family(host or "0.0.0.0", port)
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def serve_at(host: str, port: int) -> socket.socket:
    """Listen where others will call `host`: at that address; a name is served on every interface.

    A name may well lead to loopback on its own host (Debian's 127.0.1.1), but not elsewhere.

    Raises:
        RendezvousError: it cannot be, and why.
    """
    try:
        return serve(host if is_loopback(host) or is_literal(host) else "", port)
    except OSError as error:
        why = str(error.strerror or error).partition(" (")[0]  # without the address, once more
        text = f"the rendezvous cannot be served at {host}:{port}: {why}"
        hints = {
            errno.EADDRINUSE: "; another port may be free",
            errno.EADDRNOTAVAIL: "; it is not an address of this host",
        }
        raise RendezvousError(text + hints.get(error.errno or 0, "")) from error


def address_beside(host: str, *, here: bool) -> str:
    """Return where a rank is to listen when the rendezvous is at `host`, on its own host if `here`.

    "" when only its connection to the rendezvous will tell.
    """
    return host if is_loopback(host) or (here and is_literal(host)) else ""


def local_host(sock: socket.socket) -> str:
    """Return the address of this host by which a connected TCP socket reaches the other one."""
    return str(sock.getsockname()[0]).removeprefix("::ffff:")  # (IPv4, on a socket for both)


def is_loopback(host: str) -> bool:
    """Whether a name or an address, "" being every interface, reaches this host alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_literal(host: str) -> bool:
    """Whether it is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def listen(*, unix: bool, bind: str = "127.0.0.1") -> tuple[list[socket.socket], Address]:
    """Open this rank's listening sockets, TCP on a free port of `bind` and Unix when asked.

    With "" it listens on every interface, and leaves it to the rendezvous to say at which address.
    """
    tcp = serve(bind)
    sockets = [tcp]
    name = ""
    if unix:
        name = f"barepp-{secrets.token_hex(16)}"
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sockets.append(local)
        local.bind("\0" + name)
        local.listen(BACKLOG)
    host, port = tcp.getsockname()[:2]
    return sockets, Address(host_key(), name, (host if bind else "", port))


def dial(address: Address, *, unix: bool) -> socket.socket:
    """Start to connect, without waiting, over the fastest family that reaches the address.

    Raises:
        BlockingIOError: the listener's queue is full: try again a little later.
        OSError: nobody listens there.
    """
    if unix and address.unix and address.host == host_key():
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str, int] = "\0" + address.unix
    else:
        sock = socket.socket(_family(*address.tcp), socket.SOCK_STREAM)
        target = address.tcp
    sock.setblocking(False)
    try:
        sock.connect(target)
    except BlockingIOError:
        if sock.family == socket.AF_UNIX:  # connect(2): EAGAIN, not EINPROGRESS, for Unix streams
            sock.close()
            raise
    except OSError:
        sock.close()
        raise
    return sock


def tune(sock: socket.socket) -> None:
    """Set a connected data socket's options: no delay for small frames, buffers within a host.

    Between hosts TCP's stay as they are: the kernel adapts them as long as nobody sets them.
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if within_host(sock):  # (a Unix stream has no other buffer than its sender's)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
    tune_for(sock, 0)


def tune_for(sock: socket.socket, nbytes: int) -> None:
    """Set how much the kernel takes at once of a message of `nbytes`, within a host."""
    if within_host(sock):
        unix = sock.family == socket.AF_UNIX
        large = BUFFER_OF_LARGE_NBYTES if unix else TCP_BUFFER_OF_LARGE_NBYTES
        buffer_nbytes = BUFFER_NBYTES if nbytes < LARGE_NBYTES else large
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_nbytes)


def acknowledged(sock: socket.socket) -> bool:
    """Whether all that was sent is with the peer's kernel, so that it outlives this side.

    A TCP socket that is closed with bytes left to read resets the connection at once, and what it
    still had to send is lost. tcp(7): SIOCOUTQ is what the other side has not acknowledged. A Unix
    stream hands over at once, there is nothing in between.
    """
    if sock.family == socket.AF_UNIX or not any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))):
        return True
    poller = select.poll()
    poller.register(sock, 0)
    return bool(poller.poll(0))  # a hang-up or an error: nobody is left to acknowledge


def _family(host: str, port: int) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except UnicodeError as error:  # a part of the name is empty, or too long
        raise socket.gaierror(socket.EAI_NONAME, "no host can have this name") from error


def within_host(sock: socket.socket) -> bool:
    """Whether both ends of a connected socket are on this host."""
    # A host that talks to itself has one address at both ends.
    return sock.family == socket.AF_UNIX or sock.getsockname()[0] == sock.getpeername()[0]
