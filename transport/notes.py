"""Notes that two ranks pass each other over a new connection, before its first frame.

A note is its length and the CRC-32 of what follows (4 bytes each, little-endian), then the msgpack
array [key, value]: who reads it may be a library that does not look twice.
"""

from __future__ import annotations

import socket
import struct
import zlib
from typing import Final

from transport.errors import ProtocolError
from transport.wire import pack, unpack

NOTE_LIMIT_NBYTES: Final = 64 * 1024
_HEAD: Final = struct.Struct("<II")


def tell(sock: socket.socket, key: str, value: bytes) -> None:
    """Send a note over a blocking socket."""
    note = pack([key, value])
    sock.sendall(_HEAD.pack(len(note.data), note.crc) + note.data)


def hear(sock: socket.socket) -> tuple[str, bytes]:
    """Block until a note has come, and read not a byte more: frames may follow.

    Raises:
        ProtocolError: it is no note, or bytes of it changed on the way.
        OSError: the other side has hung up, or the socket's time is over.
    """
    nbytes, crc = _HEAD.unpack(_exactly(sock, _HEAD.size))
    if nbytes > NOTE_LIMIT_NBYTES:
        raise ProtocolError(f"a note of {nbytes} bytes, at most {NOTE_LIMIT_NBYTES} agreed")
    note = _exactly(sock, nbytes)
    if zlib.crc32(note) != crc:
        raise ProtocolError("a note's checksum does not match: bytes changed on the way")
    match unpack(note):
        case [str(key), bytes(value)]:
            return key, value
        case other:
            raise ProtocolError(f"not a key and a value: {other!r:.200}")


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        if not part:
            raise ConnectionResetError("it has hung up")
        data += part
    return bytes(data)
