"""A rank that torchrun or Slurm's srun has started: how it gets into its world, and how it ends.

Our own launcher prepares a process for its life as a rank. Here a script finds itself to be one in
the midst of its first `init()`, and the same is brought about by hooks:

1. An exception that ends the script is reported before anything is torn down. If it only repeats
   what this rank was told, one line is shown instead of a traceback.
2. A rank that was told of a failure and has not ended after the grace ends itself.
3. A script that ends in order without having left its world leaves it then.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from barepp.errors import UsageError
from barepp.worker.exits import fail, leave, report_threads
from barepp.worker.external.environment import LOOPBACK, Started, options_from
from barepp.worker.external.secret import NO_TLS, ask_for_secret, given_secret, secret_socket
from barepp.worker.heartbeat import IN_SCRIPT
from barepp.worker.process_state import current_world, disown, leave_world_left_open
from barepp.worker.spec import Membership, Options
from transport.errors import Failure, JobFailed, RendezvousError, printable
from transport.rendezvous.client import ControlClient
from transport.sockets.addresses import address_beside, serve, serve_at
from transport.sockets.handshake import new_secret

_RANK_0: Final = ("rank 0", 0)
_BESIDE_RANK_0: Final = ("the process beside rank 0", 0)


def adopt(started: Started, environ: Mapping[str, str]) -> tuple[Membership, ControlClient]:
    """Find the others: blocks until rank 0 serves the rendezvous and has let this rank in.

    Raises:
        UsageError: the secret is missing or not safe.
        RendezvousError: rank 0 cannot listen, does not answer, or is dead.
        AuthenticationError: another job answers.
    """
    options = options_from(started.world_size, environ)
    deadline = time.monotonic() + options.join_timeout_s
    given = given_secret(environ)
    if given is None and not started.one_host:
        raise UsageError(
            "ranks on several hosts need a secret that they share: set BAREPP_SECRET_FILE to a "
            "file that all of them can read and only you (mode 0600), or BAREPP_SECRET"
        )
    where, secret = (started.host, started.port), given
    if started.rank == 0:
        secret, where = _serve(started, options, given)
    elif secret is None:
        secret = ask_for_secret(_run(started), options.join_timeout_s)
    membership = Membership(
        started.rank,
        options,
        where,
        secret,
        spread=not started.one_host,
        address=environ.get("BAREPP_ADDRESS")
        or address_beside(started.host, here=started.rank == 0),
        local_rank=started.local_rank,
    )
    control = ControlClient(
        where,
        secret,
        started.rank,
        timeout=max(1.0, deadline - time.monotonic()),
        patient=True,
        server=_RANK_0 if started.rank else _BESIDE_RANK_0,
        silence_s=0.0 if started.one_host else options.heartbeat_s,
    )
    _Ending(started.rank, control, options.grace_s).arrange()
    return membership, control


def _serve(
    started: Started, options: Options, given: bytes | None
) -> tuple[bytes, tuple[str, int]]:
    """Start the process that serves the rendezvous, with copies of the listening sockets.

    Return the job's secret, and where rank 0 itself is to call: at loopback, so that rank 0 is
    still heard when the network is gone.
    """
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(_listening(started))]
        if not started.one_host:
            print(NO_TLS, file=sys.stderr)
            doors.append(stack.enter_context(serve(LOOPBACK)))
        secret, asked = given or new_secret(), None
        if given is None:
            asked = stack.enter_context(secret_socket(_run(started)))
        passed = [sock.fileno() for sock in doors]
        orders = {
            "sockets": passed,
            "secret": secret.hex(),
            "far": not started.one_host,  # whether ranks are on other hosts
            "asked": None if asked is None else asked.fileno(),  # there it gives them the secret
            "options": dataclasses.asdict(options),
            "parent": os.getpid(),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "barepp.launch.hosts.rendezvous_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[*passed, asked.fileno()] if asked is not None else passed,
            # -m looks here first: for this very barepp, and for nothing of the script's own folder.
            cwd=Path(__file__).parents[3],
        )
        assert process.stdin is not None
        with process.stdin:  # not its command line: others can read that
            process.stdin.write(json.dumps(orders).encode())
        process.returncode = 0  # it ends after us; so `Popen` does not complain that it still runs
        return secret, doors[-1].getsockname()[:2]


def _run(started: Started) -> str:
    """Return what tells this run from all others of this user on this host."""
    return f"{started.run}, port {started.port}"


def _listening(started: Started) -> socket.socket:
    try:
        return serve_at(started.host, started.port)
    except RendezvousError as error:
        raise RendezvousError(f"{error} (BAREPP_PORT, set for all ranks, is the port)") from error


class _Ending:
    """How this process ends; see the rules at the top."""

    def __init__(self, rank: int, control: ControlClient, grace_s: float) -> None:
        self._rank = rank
        self._control = control
        self._grace_s = grace_s
        self._myself = os.getpid()
        self._main = threading.main_thread().ident or 0
        self._usual = sys.excepthook
        self._stack = ""  # where the script was when it was told that the job hangs

    def arrange(self) -> None:
        """Set the hooks, for the life of the process."""
        sys.excepthook = self._on_exception
        report_threads(self._rank, self._control, show=True)
        atexit.register(self._on_exit)
        os.register_at_fork(after_in_child=disown)
        self._control.on_failure(self._on_failure)

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._myself:
            self._usual(kind, error, trace)
            return
        if isinstance(error, JobFailed):
            self._tell(error)
        else:
            self._usual(kind, error, trace)
        fail(self._rank, self._control, error)

    def _on_exit(self) -> None:
        if os.getpid() != self._myself:
            return
        try:
            leave_world_left_open()
        except BaseException as error:
            self._on_exception(type(error), error, error.__traceback__)
        self._control.close()

    def _on_failure(self, failure: Failure) -> None:
        if failure.cause == "hang":
            frame = sys._current_frames().get(self._main)
            self._stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        timer = threading.Timer(self._grace_s, self._end)
        timer.name, timer.daemon = "barepp-grace", True
        timer.start()

    def _end(self) -> None:
        if current_world() is None:  # it has left in order, and may do as it pleases
            return  # (asked only now: it may have been in the midst of its init() when it was told)
        failure = self._control.failure
        assert failure is not None
        doing = f"{IN_SCRIPT}, and did not end within {self._grace_s:g} s"
        self._tell(JobFailed(failure, doing))
        self._control.say_doing(IN_SCRIPT)
        leave(1)

    def _tell(self, error: JobFailed) -> None:
        """Say in a line what this rank was told; rank 0 says it all."""
        doing = f" while {error.doing}" if error.doing else ""
        lines = [f"barepp: rank {self._rank} was told{doing}: {error.failure.headline()}"]
        if self._rank == 0 and error.failure.traceback:
            lines += ["    " + line for line in error.failure.traceback.rstrip().splitlines()]
        if self._stack:
            lines.append(f"barepp: the Python stack of rank {self._rank}:")
            lines += ["    " + line for line in self._stack.rstrip().splitlines()]
        with contextlib.suppress(Exception):  # the script may have closed it
            print(printable("\n".join(lines)), file=sys.stderr, flush=True)
