"""The faults that are measured: what is done to whom, and the words by which a person knows it.

A fault is told right when the words name the rank and what happened to it. Ours are held to one
sentence, rank and cause together; torchrun's are given the benefit of the doubt: the rank in its
root cause, and anywhere in the same text a word for what happened.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

WORLD_SIZE: Final = 4
VICTIM: Final = 2
SLEEPER: Final = 0  # who is busy elsewhere in the fault "busy"
STEP: Final = 20  # of the training loop, at which the fault comes
MICROBATCHES: Final = 8
MICROBATCH: Final = 3  # whose forward the fault comes in
RECORDS: Final = "records"  # the named pipe on which the ranks tell what they see
ASLEEP: Final = "asleep"  # the named pipe at which sleeper and victim meet

HEARTBEAT_S: Final = 2.0
PROGRESS_S: Final = 3.0
JOIN_S: Final = 2.0
BEAT_S: Final = 0.5  # until a rank's next beat tells that something has moved for the last time
PROOF_S: Final = 1.0  # three equal beats of every rank, twice a second: the proof of a deadlock
GLOO_S: Final = 10.0  # the process group's timeout, which is 1800 s by default


class Where(enum.Enum):
    """Where the fault comes."""

    LAYER = "in a layer's forward"
    LOOP = "between two steps"
    BEFORE = "before the rank joins"
    LAUNCHER = "at the launcher"
    NOWHERE = "nowhere"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: as on the command line.
        shown: as in the table.
        words: a pattern for what barepp says of it, rank and cause.
        theirs: a pattern for what happened, in torch's words.
        code: the launcher's exit code, as a shell shows it.
        flags: limits that the launcher is given, so that a run ends in seconds.
        report: a pattern for what barepp's report has to say besides.
        patience_s: how long it may take until barepp knows that this is a failure at all.
    """

    name: str
    shown: str
    words: str
    theirs: str
    code: int
    where: Where = Where.LAYER
    flags: tuple[str, ...] = ()
    report: str = ""
    patience_s: float = 0.0

    @property
    def told(self) -> tuple[int, ...]:
        """The ranks that have to be told."""
        if self.where in (Where.LAUNCHER, Where.NOWHERE):
            return tuple(range(WORLD_SIZE))
        spared = {VICTIM, SLEEPER} if self.name == "busy" else {VICTIM}
        return tuple(rank for rank in range(WORLD_SIZE) if rank not in spared)


def _failed(words: str) -> str:
    """Return the pattern of "rank 2 failed, while computing 2F3: it was ..." in one line."""
    return rf"rank {VICTIM} failed[^\n]*: [^\n]*{words}"


def _by_signal(name: str, number: int) -> Fault:
    words = f"killed by {name}"
    return Fault(name[3:].lower(), name, _failed(words), name, 128 + number)


_SILENT = r"(?i)timed? ?out|stopped|no progress|missing|joined"

NO_FAULT: Final = Fault("none", "none", "", "", 0, Where.NOWHERE)

FAULTS: Final = {
    fault.name: fault
    for fault in (
        _by_signal("SIGKILL", 9),
        _by_signal("SIGTERM", 15),
        _by_signal("SIGSEGV", 11),
        _by_signal("SIGABRT", 6),
        Fault("exit0", "os._exit(0)", _failed("exit code 0 before"), r"exitcode\s*: 0", 1),
        Fault("exit7", "os._exit(7)", _failed("exit code 7"), r"exitcode\s*: 7", 7),
        Fault("sysexit3", "sys.exit(3)", _failed(r"sys\.exit\(3\)"), r"exitcode\s*: 3", 3),
        Fault("exception", "an exception in forward", _failed("ValueError"), "ValueError", 1),
        Fault(
            "return",
            "a return before the others",
            rf"a deadlock(?s:.*)rank {VICTIM} waits for all ranks: leaving the world",
            r"exitcode\s*: 0",
            124,
            Where.LOOP,
            patience_s=PROOF_S,
        ),
        Fault(
            "stop",
            "SIGSTOP",
            _failed("no sign of life[^\n]*is stopped"),
            _SILENT,
            124,
            flags=("--heartbeat", f"{HEARTBEAT_S:g}"),
            patience_s=HEARTBEAT_S,
        ),
        Fault(
            "loop",
            "an endless loop in Python",
            _failed("no progress"),
            _SILENT,
            124,
            flags=("--timeout", f"{PROGRESS_S:g}"),
            patience_s=PROGRESS_S + BEAT_S,
        ),
        Fault(
            "sleep",
            "an endless call into C",
            _failed("no progress"),
            _SILENT,
            124,
            flags=("--timeout", f"{PROGRESS_S:g}"),
            patience_s=PROGRESS_S + BEAT_S,
        ),
        Fault(
            "deadlock",
            "a recv that nobody sends",
            rf"a deadlock(?s:.*)rank {VICTIM} waits for rank {VICTIM + 1}: waiting for a message",
            _SILENT,
            124,
            Where.LOOP,
            patience_s=PROOF_S,
        ),
        Fault(
            "absent",
            "a rank that never arrives",
            rf"rank {VICTIM} failed: 3 of 4 ranks joined within [^\n]* missing: rank {VICTIM}\b",
            _SILENT,
            1,
            Where.BEFORE,
            ("--join-timeout", f"{JOIN_S:g}"),
            patience_s=JOIN_S,
        ),
        Fault(
            "busy",
            f"SIGKILL while rank {SLEEPER} is busy elsewhere",
            _failed("killed by SIGKILL"),
            "SIGKILL",
            137,
            report=rf"rank {SLEEPER} was told while computing {SLEEPER}F{MICROBATCH}, "
            "did not end by itself and was killed",
        ),
        Fault(
            "launcher",
            "SIGKILL of the launcher",
            "the launcher[^\n]* is gone",
            "(?i)launcher|agent",
            137,
            Where.LAUNCHER,
            patience_s=1.0,
        ),
        Fault(
            "interrupt",
            "Ctrl-C",
            "the launcher received SIGINT",
            "SIGINT|KeyboardInterrupt|signal: 2",
            130,
            Where.LAUNCHER,
        ),
    )
}
