"""Where the job's secret comes from when the ranks were not started by our own launcher.

    BAREPP_SECRET          the secret itself, 16 characters or more
    BAREPP_SECRET_FILE     a file that holds it, which only its owner may read
    neither, one host      rank 0 draws one; the process beside it hands it to the other ranks

That process listens at a Unix socket with an abstract name (unix(7)). Everybody on the host can
see the name and connect to it, so the name is no secret, and both sides check who the other one is.

1. The kernel says which user is at the other end (SO_PEERCRED), and no process can forge that. The
   secret is given to no other user, and a rank believes no other user who has taken the name. That
   is as safe as a file of mode 0600: root and this user's own processes could read that as well.
2. Another user who takes the name first can only stop the job, with an error that says so, as one
   who takes its port can.
3. The name ends with the processes that hold it: nothing is left behind and nothing can be stale.
   Abstract names belong to a network namespace, as loopback does, where the ranks meet next.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import time
from collections.abc import Mapping
from typing import Final

from barepp.errors import UsageError
from barepp.monitor.status_socket import peer_of

NO_TLS: Final = (
    "barepp: ranks on several hosts prove to each other that they hold the job's secret, but what "
    "they send is not encrypted: use a network that you trust"
)
MIN_NBYTES: Final = 16  # 128 bits, if every one of them was drawn
MAX_NBYTES: Final = 4096
_RETRY_S: Final = 0.02  # between two looks for a name that is still to come: no event says so


def given_secret(environ: Mapping[str, str]) -> bytes | None:
    """Return the secret that the environment gives or points to; None without one.

    Raises:
        UsageError: it is too short, or its file cannot be read, or others can read that.
    """
    if "BAREPP_SECRET" in environ:
        return _checked(os.fsencode(environ["BAREPP_SECRET"]), "BAREPP_SECRET")
    if "BAREPP_SECRET_FILE" not in environ:
        return None
    path = environ["BAREPP_SECRET_FILE"]
    where = f"BAREPP_SECRET_FILE={path}"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise UsageError(f"{where} has mode {mode:04o}: others may read it; chmod 600 it")
            if status.st_uid not in (os.geteuid(), 0):
                raise UsageError(f"{where} belongs to user {status.st_uid}, and not to you")
            return _checked(file.read(MAX_NBYTES).strip(), where)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from error


def _checked(secret: bytes, where: str) -> bytes:
    if len(secret) < MIN_NBYTES:
        text = f"the secret of {where} has {len(secret)} bytes, which can be guessed"
        raise UsageError(
            f"{text}: it needs {MIN_NBYTES}; python -c 'import secrets; "
            "print(secrets.token_hex())' prints a good one"
        )
    return secret


def secret_socket(run: str) -> socket.socket:
    """Return the listening socket at which the ranks of `run` will ask for the secret.

    Raises:
        UsageError: the name is taken, by another run or by another user.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(_name(run))
    except OSError as error:
        listening.close()
        text = f"the socket for the secret of run {run} cannot be opened: {error.strerror}"
        raise UsageError(f"{text}; two jobs at once need different ports (BAREPP_PORT)") from error
    listening.setblocking(False)
    listening.listen(socket.SOMAXCONN)
    return listening


def give_secret(listening: socket.socket, secret: bytes) -> None:
    """Give the secret to the process that has connected, if it is of this user; never blocks."""
    with contextlib.suppress(OSError):  # it has gone
        asking, _ = listening.accept()
        with asking:
            if peer_of(asking)[1] == os.geteuid():
                asking.send(secret)  # (a new connection takes so few bytes at once)


def ask_for_secret(run: str, timeout: float) -> bytes:
    """Block until the process beside rank 0 has given the secret; `timeout` is in seconds.

    Raises:
        UsageError: it has not, or another user has taken its name.
    """
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(left)
            with contextlib.suppress(OSError):  # no process listens, or it has ended
                sock.connect(_name(run))
                uid = peer_of(sock)[1]
                if uid != os.geteuid():
                    raise UsageError(f"user {uid} has taken the name of run {run}'s secret")
                if secret := sock.recv(MAX_NBYTES):
                    return secret
        time.sleep(_RETRY_S)
    raise UsageError(
        f"rank 0 has not given the secret of run {run} within {timeout:g} s: has it started on "
        "this host? BAREPP_SECRET or BAREPP_SECRET_FILE, set for all ranks, does without it"
    )


def _name(run: str) -> str:
    """Return the abstract name, which has at most 107 bytes: so the run's is hashed."""
    return f"\0barepp-secret-{os.geteuid()}-{hashlib.sha256(run.encode()).hexdigest()[:32]}"
