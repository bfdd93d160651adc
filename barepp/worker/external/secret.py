"""Where the job's secret comes from when no launcher of ours hands it to the ranks.

    BAREPP_SECRET          the secret itself, 16 characters or more
    BAREPP_SECRET_FILE     a file that holds it, which only its owner may read
    neither, one host      rank 0 draws one and leaves it in a file for the others

1. That file lies in a folder of this user's own, mode 0700: nobody else can put a file or a
   symbolic link there. What somebody else has put in the folder's place is refused.
2. It appears under its name whole (link(2)), mode 0600, and disappears once all have read it.
3. It says which process wrote it, and who had started that. What a dead process has left is
   removed, and not believed but by who has the same parent, a launcher: then rank 0 of this very
   job is dead, and nobody needs to wait for it. (The process beside it may still say how it died.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from barepp.errors import UsageError
from transport.sockets.handshake import new_secret

NO_TLS: Final = (
    "barepp: ranks on several hosts prove to each other that they hold the job's secret, but what "
    "they send is not encrypted: use a network that you trust"
)
MIN_NBYTES: Final = 16  # 128 bits, if every one of them was drawn
MAX_NBYTES: Final = 4096
_RETRY_S: Final = 0.02  # between two looks for a file that is still to come


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


@dataclasses.dataclass(frozen=True)
class Written:
    """What a file of ours says.

    Attributes:
        secret: the job's.
        alive: whether the process that wrote it lives.
        launch: which process had started that one; "" when it was no launcher.
    """

    secret: bytes
    alive: bool
    launch: str


class SharedSecret:
    """The file through which rank 0 gives its secret to the other ranks of this host.

    `name` tells this run from all others of the user on this host. With `launched` the parent of
    this process is a launcher, which has started all ranks of this host, and of this run alone.
    """

    def __init__(self, name: str, *, launched: bool = False) -> None:
        parent = os.getppid()
        self._launch = f"{parent} {_started(parent)}" if launched else ""
        self._folder = Path(tempfile.gettempdir()) / f"barepp-{os.geteuid()}"
        self.path = self._folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:150]}.secret"

    def publish(self) -> bytes:
        """Draw a secret and leave it for the others; remove what dead processes have left.

        Raises:
            UsageError: a living process has published one under this name.
        """
        while True:
            self._make_folder()
            try:
                return self._publish()
            except FileNotFoundError:  # another job's end has just removed the empty folder
                continue

    def _publish(self) -> bytes:
        self._remove_stale()
        secret, pid = new_secret(), os.getpid()
        who = {"pid": pid, "started": _started(pid), "launch": self._launch}
        content = json.dumps({**who, "secret": secret.hex()})
        draft = Path(f"{self.path}.{pid}")
        draft.unlink(missing_ok=True)  # of a dead process that had the same number
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(draft, flags, 0o600), "w") as file:
                file.write(content)
            os.link(draft, self.path, follow_symlinks=False)
        except FileExistsError:
            raise UsageError(
                f"{self.path} belongs to a job that is running: two at once need different "
                "ports (BAREPP_PORT)"
            ) from None
        finally:
            draft.unlink(missing_ok=True)
        return secret

    def _remove_stale(self) -> None:
        for left in self._folder.glob("*.secret"):
            found = _written(left)
            if found is None or not found.alive:
                left.unlink(missing_ok=True)
        for draft in self._folder.glob("*.secret.*"):  # one that lives may be writing it
            if not Path(f"/proc/{draft.suffix[1:]}").exists():
                draft.unlink(missing_ok=True)

    def read(self, timeout: float) -> Written:
        """Block until rank 0 has published the secret; `timeout` is in seconds.

        What it returns may be of a rank 0 that has died since; then it is of this very job.

        Raises:
            UsageError: it has not, or its folder is somebody else's.
        """
        deadline = time.monotonic() + timeout
        while True:
            found = _written(self.path)
            if found is not None and (found.alive or self._is_ours(found)):
                return found
            self._check_folder()
            if time.monotonic() >= deadline:
                text = f"rank 0 has not left the job's secret in {self.path} within {timeout:g} s"
                raise UsageError(
                    f"{text}: has it started on this host? BAREPP_SECRET or BAREPP_SECRET_FILE, "
                    "set for all ranks, does without the file"
                )
            time.sleep(_RETRY_S)

    def _is_ours(self, found: Written) -> bool:
        return self._launch != "" and found.launch == self._launch

    def remove(self) -> None:
        """Remove the file; nothing happens when it is gone already."""
        remove_secret(self.path)

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        self._check_folder()

    def _check_folder(self) -> None:
        """See that the folder, if it is there, is this user's own.

        Raises:
            UsageError: something else is in its place.
        """
        try:
            status = self._folder.lstat()  # a symbolic link is not followed
        except FileNotFoundError:
            return
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not ours or stat.S_IMODE(status.st_mode) & 0o077:
            raise UsageError(
                f"{self._folder} is not a folder of yours with mode 0700, so no secret is put "
                "there; remove it, or set BAREPP_SECRET_FILE"
            )


def remove_secret(path: Path) -> None:
    """Remove the file of a shared secret, and the folder when it was the last one there."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def _written(path: Path) -> Written | None:
    """Return what a file of ours says; None when it is none, or makes no sense."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
            status = os.fstat(file.fileno())  # of what was opened, whatever has the name by now
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                return None
            content = json.load(file)
        alive = content["started"] == _started(content["pid"]) != ""
        return Written(bytes.fromhex(content["secret"]), alive, str(content["launch"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; "" if there is none, or it has ended."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # proc_pid_stat(5); pid and (name) are the first two
    return "" if fields[0] in "ZX" else fields[19]  # fields 3 and 22
