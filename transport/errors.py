"""Everything that can go wrong between ranks, each as one named exception that says who broke it.

Who broke it decides the class:

1. this rank, by a wrong call           -> `InvalidArgument`, `MessageMismatch`, `TransportClosed`
   this rank, by a bug of the transport -> `InternalError`
   this rank, by its GPU                -> `DeviceError`
2. the other side of one connection     -> `PeerLeft` (orderly), `PeerLost` (not), `ProtocolError`
3. some rank of the job, maybe far away -> `JobFailed`, which carries the first cause as a `Failure`
4. nobody yet, time has run out         -> `WaitTimeout`
5. the way into the job                 -> `RendezvousError`, `AuthenticationError`
"""

from __future__ import annotations

import copy
import dataclasses
import signal as signals
from typing import Any, Final, TypeVar

RECORD_TEXT_LIMIT = 64 * 1024  # characters of a failure's message or traceback, each
_CUT_NOTE_LENGTH = 60  # "... 123456 characters left out ...", at most
CAUSES = ("exception", "signal", "exit", "hang", "lost", "rendezvous")
LATE = (
    "CUDA tells of errors late: the cause may be an earlier action of this step, or anything that "
    "the rank gave its GPU before; CUDA_LAUNCH_BLOCKING=1 in its environment shows which"
)


class TransportError(Exception):
    """Base of every error that the transport raises on purpose."""


class InvalidArgument(TransportError, ValueError):
    """A call that cannot work: no such rank, a tag out of range, a tensor that cannot be sent."""


class UnknownTransport(InvalidArgument):
    """A transport's name that is not registered, or one that cannot be used on this machine."""


class MessageMismatch(TransportError):
    """A message arrived whose dtype or shape is not what its receiver had stated."""


class TransportClosed(TransportError):
    """The call came after this rank itself had closed or aborted its transport."""


class InternalError(TransportError):
    """The transport broke, or was interrupted, in the midst of its work and cannot go on."""


class DeviceError(TransportError):
    """This rank's GPU refused something, or tells now of an error that it met earlier."""

    @classmethod
    def of(cls, error: Exception, rank: int, doing: str) -> DeviceError:
        """Return what to raise for torch's error: whose GPU it was, and what the rank was about."""
        what = str(error).strip().partition("\n")[0]
        late = f" ({LATE})" if is_late(what) else ""
        return cls(f"rank {rank}'s GPU failed, noticed while {doing}: {what}{late}")


def is_late(text: str) -> bool:
    """Whether CUDA may tell such an error late; memory that is not there it tells at once."""
    return "out of memory" not in text


class WaitTimeout(TransportError, TimeoutError):
    """A blocking call did not finish within the seconds that it was given."""


class PeerLeft(TransportError):
    """The peer said goodbye and ended in order, so what this rank waits for will never come."""


class PeerLost(TransportError):
    """The connection to a peer ended without a goodbye."""


class ProtocolError(TransportError):
    """The other side sent bytes that are not a valid frame; the connection is not used again."""


class AuthenticationError(TransportError):
    """The other side of a new connection does not hold this job's secret."""


class RendezvousError(TransportError):
    """The world could not be put together: who is missing, or what does not fit."""


_Error = TypeVar("_Error", bound=TransportError)


def fresh(error: _Error) -> _Error:
    """Return a copy of a stored error, to be raised.

    One object raised in two threads, or twice, would mix their tracebacks; and the traceback of a
    stored one would keep every local variable on its way alive, tensors included.
    """
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin


def printable(text: str, limit: int = RECORD_TEXT_LIMIT) -> str:
    """Return `text` with control characters escaped and its middle cut out beyond `limit`.

    A remote text goes to a terminal; an escape sequence in it could repaint what was said before.
    """
    text = _cut(text, limit)
    # Escaping makes it longer, up to tenfold: hence the second cut.
    return _cut("".join(c if c in "\n\t" or c.isprintable() else _escaped(c) for c in text), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = max(0, limit - _CUT_NOTE_LENGTH) // 2
    note = f"\n... {len(text) - 2 * half} characters left out ...\n"
    return f"{text[:half]}{note}{text[len(text) - half :]}"


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first thing that went wrong in a job, as the launcher saw it; the same on every rank.

    Attributes:
        rank: the rank that failed; -1 when it is nobody's in particular (the launcher's own end).
        cause: one of `CAUSES`.
        message: one sentence in which a person recognises what happened.
        signal: the signal's number when one killed the rank.
        exit_code: the rank's exit code where it has one.
        traceback: the failing rank's own traceback, already formatted; empty without one.
        doing: what the rank was doing, for example "computing 2F3"; empty when nobody knows.
    """

    rank: int
    cause: str
    message: str
    signal: int | None = None
    exit_code: int | None = None
    traceback: str = ""
    doing: str = ""

    def to_record(self) -> dict[str, Any]:
        """Return the failure as a bounded map that msgpack takes; None and empty are left out."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "")}
        return {k: printable(v) if isinstance(v, str) else v for k, v in fields.items()}

    @classmethod
    def from_record(cls, record: object) -> Failure:
        """Build a failure from a map that came over the network, trusting nothing in it.

        Raises:
            ProtocolError: the map lacks a field or holds one of another type.
        """
        if not isinstance(record, dict):
            raise ProtocolError(f"a failure record is a map, this is {type(record).__name__}")
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value, kind = record.get(field.name), str if field.type == "str" else int
            if value is None:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ProtocolError(f"field {field.name!r} of a failure record is {value!r}")
            fields[field.name] = printable(value) if isinstance(value, str) else value
        if not {"rank", "cause", "message"} <= fields.keys() or fields["cause"] not in CAUSES:
            raise ProtocolError(f"a failure record without rank, cause or message: {fields!r}")
        return cls(**fields)

    def headline(self) -> str:
        """Return the cause in one line: who, what, and what it was doing."""
        who = f"rank {self.rank}" if self.rank >= 0 else "the job"
        doing = f", while {self.doing}" if self.doing else ""
        return f"{who} failed{doing}: {self.message}"


def signal_name(number: int) -> str:
    """Return "SIGKILL" for 9, and "signal 77" for a number without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


class JobFailed(TransportError):
    """Some rank failed; this one was told the first cause and cannot go on without it.

    `failure` is the cause, the same on every rank; `doing` is what this rank was about when it
    was told, for example "waiting for a message from rank 2 (tag 7)".
    """

    def __init__(self, failure: Failure, doing: str = "") -> None:
        super().__init__(failure, doing)
        self.failure = failure
        self.doing = doing

    def __str__(self) -> str:
        text = self.failure.headline()
        if self.doing:
            text += f"\nThis rank was {self.doing}."
        if self.failure.traceback:
            text += f"\nTraceback of rank {self.failure.rank}:\n{self.failure.traceback.rstrip()}"
        return text


# What torch's messages of CUDA errors contain ("CUDA error: device-side assert triggered"), and its
# types for them, the first since torch 2.8.
_SIGNS: Final = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_", "CUDA out of memory")
_TYPES: Final = ("AcceleratorError", "OutOfMemoryError")


def is_from_cuda(error: BaseException) -> bool:
    """Whether an exception is what torch makes of a CUDA error."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in _TYPES or any(sign in str(error) for sign in _SIGNS)
