"""Mutual authentication of a new connection by the job's secret, before anything else is read.

    initiator                                     acceptor
    hello    (64 bytes, with a fresh nonce)  ->
                                             <-   challenge (32 fresh bytes + HMAC "acceptor")
    proof    (32 bytes, HMAC "initiator")    ->
                                             <-   verdict   (1 byte)

Both HMACs (SHA-256, keyed with the secret) cover the whole hello and the acceptor's nonce. So:

1. Nobody without the secret gets further than 64 bytes, and nobody learns the secret.
2. A replayed hello fails, because the acceptor's nonce is new; a reflected one fails, because the
   two proofs carry different labels; one for another job, role or rank fails, because the hello
   says which.
3. Nothing here gives secrecy or integrity to the bytes that follow (see README, threat model).

Sans-IO: bytes in, bytes out; who owns the socket enforces the deadline.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import secrets
import struct
from typing import Final

from transport.errors import AuthenticationError

HELLO: Final = struct.Struct("<4sBBxxii16s32s")
HELLO_MAGIC: Final = b"bpph"
VERSION: Final = 1
NONCE_NBYTES: Final = 32
PROOF_NBYTES: Final = 32
ANY_RANK: Final = -1  # "assign me one", or "whoever serves the rendezvous"
SECRET_NBYTES: Final = 32


class Role(enum.IntEnum):
    """What a connection is for; a proof for one role is no proof for the other."""

    CONTROL = 1  # rank to rendezvous
    DATA = 2  # rank to rank


class Verdict(enum.IntEnum):
    """The acceptor's last byte."""

    ACCEPTED = 1
    YIELD = 2  # both sides called each other at once and the acceptor's own call goes ahead
    TAKEN = 3  # somebody already holds this rank


@dataclasses.dataclass(frozen=True)
class Hello:
    """What the initiator claims: to be `rank` and to want `peer`."""

    role: Role
    rank: int
    peer: int


def new_secret() -> bytes:
    """Return a fresh job secret of 256 random bits."""
    return secrets.token_bytes(SECRET_NBYTES)


def _job_id(secret: bytes) -> bytes:
    """Return a public name of the job, so that a stray rank of another job is told apart early."""
    return hmac.digest(secret, b"barepp job", hashlib.sha256)[:16]


def _proof(secret: bytes, label: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, label + hello + nonce, hashlib.sha256)


class Initiator:
    """The calling side. Send `hello`, then answer what `receive` is given until `verdict` is set.

    `needed` is the number of bytes to read next.
    """

    def __init__(self, secret: bytes, hello: Hello) -> None:
        self._secret = secret
        nonce = secrets.token_bytes(NONCE_NBYTES)
        self.hello = HELLO.pack(
            HELLO_MAGIC, VERSION, hello.role, hello.rank, hello.peer, _job_id(secret), nonce
        )
        self.needed = NONCE_NBYTES + PROOF_NBYTES
        self.verdict: Verdict | None = None
        self._proved = False

    def receive(self, data: bytes) -> bytes:
        """Take exactly `needed` bytes; return what to send.

        Raises:
            AuthenticationError: the acceptor does not hold the secret.
        """
        assert len(data) == self.needed
        if self._proved:
            try:
                self.verdict = Verdict(data[0])
            except ValueError:
                raise AuthenticationError(f"verdict {data[0]} does not exist") from None
            self.needed = 0
            return b""
        nonce, proof = data[:NONCE_NBYTES], data[NONCE_NBYTES:]
        if not hmac.compare_digest(proof, _proof(self._secret, b"acceptor", self.hello, nonce)):
            raise AuthenticationError("the listener could not prove that it holds the secret")
        self._proved = True
        self.needed = 1
        return _proof(self._secret, b"initiator", self.hello, nonce)


class Acceptor:
    """The listening side. Feed `receive` until `accepted` is set, then send one verdict byte."""

    def __init__(self, secret: bytes, role: Role, peer: int) -> None:
        self._secret = secret
        self._role = role
        self._peer = peer
        self._nonce = secrets.token_bytes(NONCE_NBYTES)
        self._raw = b""
        self._claim: Hello | None = None
        self.needed = HELLO.size
        self.accepted: Hello | None = None

    def receive(self, data: bytes) -> bytes:
        """Take exactly `needed` bytes; return what to send.

        Raises:
            AuthenticationError: no hello of this job and for this listener, or a wrong proof.
        """
        assert len(data) == self.needed
        if self._claim is None:
            self._claim = self._checked(data)
            self._raw = data
            self.needed = PROOF_NBYTES
            return self._nonce + _proof(self._secret, b"acceptor", data, self._nonce)
        due = _proof(self._secret, b"initiator", self._raw, self._nonce)
        if not hmac.compare_digest(data, due):
            raise AuthenticationError("a caller could not prove that it holds this job's secret")
        self.accepted = self._claim
        self.needed = 0
        return b""

    def _checked(self, data: bytes) -> Hello:
        magic, version, role, rank, peer, job, _ = HELLO.unpack(data)
        if magic != HELLO_MAGIC:
            raise AuthenticationError("a caller did not speak this protocol")
        if version != VERSION:
            raise AuthenticationError(f"a caller speaks version {version}, this is {VERSION}")
        if not hmac.compare_digest(job, _job_id(self._secret)):
            raise AuthenticationError("a caller belongs to another job, or has no secret")
        if role != self._role or peer != self._peer:
            raise AuthenticationError(
                f"a caller wanted role {role} at rank {peer}: the wrong listener"
            )
        return Hello(Role(role), rank, peer)
