"""The handshake, both sides without a socket: who gets in, and everyone who must not."""

from __future__ import annotations

import pytest

from transport.errors import AuthenticationError
from transport.sockets import handshake
from transport.sockets.handshake import (
    HELLO,
    NONCE_NBYTES,
    PROOF_NBYTES,
    Acceptor,
    Hello,
    Initiator,
    Role,
    Verdict,
    new_secret,
)

SECRET = new_secret()
HELLO_3_TO_1 = Hello(Role.DATA, 3, 1)


def acceptor(secret: bytes = SECRET, role: Role = Role.DATA, peer: int = 1) -> Acceptor:
    return Acceptor(secret, role, peer)


@pytest.mark.parametrize("verdict", Verdict)
def test_both_sides_agree(verdict: Verdict) -> None:
    caller, listener = Initiator(SECRET, HELLO_3_TO_1), acceptor()
    assert (len(caller.hello), listener.needed, caller.needed) == (64, 64, 64)
    challenge = listener.receive(caller.hello)
    assert len(challenge) == NONCE_NBYTES + PROOF_NBYTES == caller.needed
    assert listener.accepted is None
    proof = caller.receive(challenge)
    assert len(proof) == PROOF_NBYTES == listener.needed
    assert caller.verdict is None
    assert listener.receive(proof) == b""
    assert listener.accepted == HELLO_3_TO_1
    assert listener.needed == 0
    assert caller.needed == 1
    assert caller.receive(bytes([verdict])) == b""
    assert caller.verdict is verdict


def test_a_verdict_that_does_not_exist() -> None:
    caller, listener = Initiator(SECRET, HELLO_3_TO_1), acceptor()
    caller.receive(listener.receive(caller.hello))
    with pytest.raises(AuthenticationError, match="verdict 77"):
        caller.receive(b"\x4d")


def test_a_caller_with_another_secret_is_another_job() -> None:
    with pytest.raises(AuthenticationError, match="another job"):
        acceptor().receive(Initiator(new_secret(), HELLO_3_TO_1).hello)


def test_a_caller_that_knows_the_jobs_name_but_not_its_secret() -> None:
    thief = Initiator(new_secret(), HELLO_3_TO_1)
    genuine = Initiator(SECRET, HELLO_3_TO_1).hello
    thief.hello = genuine
    listener = acceptor()
    challenge = listener.receive(thief.hello)
    with pytest.raises(AuthenticationError, match="listener could not prove"):
        thief.receive(challenge)
    for guess in (bytes(32), challenge[NONCE_NBYTES:], challenge[:NONCE_NBYTES], thief.hello[32:]):
        listener = acceptor()
        listener.receive(thief.hello)
        with pytest.raises(AuthenticationError, match="caller could not prove"):
            listener.receive(guess)
        assert listener.accepted is None


def test_a_listener_without_the_secret_is_found_out() -> None:
    for fake in (bytes(64), b"\xff" * 64):
        with pytest.raises(AuthenticationError, match="listener could not prove"):
            Initiator(SECRET, HELLO_3_TO_1).receive(fake)


def test_a_replayed_conversation_fails() -> None:
    caller, listener = Initiator(SECRET, HELLO_3_TO_1), acceptor()
    challenge = listener.receive(caller.hello)
    proof = caller.receive(challenge)
    listener.receive(proof)
    again = acceptor()
    assert again.receive(caller.hello) != challenge
    with pytest.raises(AuthenticationError):
        again.receive(proof)
    with pytest.raises(AuthenticationError):  # and a recorded answer is none to a new call
        Initiator(SECRET, HELLO_3_TO_1).receive(challenge)


def test_reflection_fails() -> None:
    """A stranger answers a caller with what the caller's own rank says as a listener."""
    caller = Initiator(SECRET, Hello(Role.DATA, 1, 1))
    mirror = acceptor(peer=1)
    challenge = mirror.receive(caller.hello)
    proof = caller.receive(challenge)  # even where the roles fit, the proof's label differs
    with pytest.raises(AuthenticationError):
        Initiator(SECRET, Hello(Role.DATA, 1, 1)).receive(challenge[:NONCE_NBYTES] + proof)
    other = acceptor(peer=1)
    echo = other.receive(caller.hello)[NONCE_NBYTES:]  # the listener's proof, sent back as ours
    with pytest.raises(AuthenticationError):
        other.receive(echo)


def test_every_bit_of_the_hello_is_covered_by_both_proofs() -> None:
    """A man in the middle who changes role, rank, peer, job or nonce is noticed."""
    for bit in range(0, 8 * HELLO.size, 3):
        caller, listener = Initiator(SECRET, HELLO_3_TO_1), acceptor()
        changed = bytearray(caller.hello)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            challenge = listener.receive(bytes(changed))
        except AuthenticationError:
            continue
        with pytest.raises(AuthenticationError):
            caller.receive(challenge)


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (Hello(Role.CONTROL, 3, 1), "wrong listener"),
        (Hello(Role.DATA, 3, 2), "wrong listener"),
        (Hello(Role.DATA, 3, -1), "wrong listener"),
    ],
)
def test_the_wrong_door(hello: Hello, says: str) -> None:
    with pytest.raises(AuthenticationError, match=says):
        acceptor().receive(Initiator(SECRET, hello).hello)


def test_another_version_and_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuthenticationError, match="did not speak"):
        acceptor().receive(b"GET / HTTP/1.1\r\n".ljust(64))
    monkeypatch.setattr(handshake, "VERSION", 2)
    newer = Initiator(SECRET, HELLO_3_TO_1).hello
    monkeypatch.undo()
    with pytest.raises(AuthenticationError, match="version 2, this is 1"):
        acceptor().receive(newer)


def test_neither_side_ever_sends_the_secret_or_repeats_itself() -> None:
    said = []
    for _ in range(2):
        caller, listener = Initiator(SECRET, HELLO_3_TO_1), acceptor()
        challenge = listener.receive(caller.hello)
        said += [caller.hello, challenge, caller.receive(challenge)]
    assert len(set(said)) == 6
    assert not any(SECRET[i : i + 8] in text for text in said for i in range(24))
    assert len({new_secret() for _ in range(10)}) == 10
    assert len(SECRET) == 32
