"""The faults that are measured, the limits that they are given, and which words tell them right.

A text tells a fault right when it names the rank and what happened to it. barepp is held to one
sentence, rank and cause together, with the words that `barepp.testing` expects. torchrun is given
the benefit of the doubt: the rank, and anywhere in the same text a word for what happened.
"""

from __future__ import annotations

import re
from typing import Final

from barepp.program.actions import Action
from barepp.worker.faults.kinds import Fault, fault_action

BAREPP: Final = "barepp"
TORCH: Final = "torchrun"

WORLD_SIZE: Final = 4
MICROBATCHES: Final = 8
VICTIM: Final = 2
AT: Final = Action.parse("2F3")
STEP: Final = 20
SURVIVORS: Final = (0, 1, 3)
NOTES: Final = "notes"  # the named pipe in which the ranks note what happens to them
GLOO_S: Final = 10.0  # the process group's timeout, which is 1800 s by default


# Each with flags for barepp's launcher, so that a run ends in seconds.
FAULTS: Final[dict[str, tuple[str, ...]]] = {
    "SIGKILL": (),
    "SIGTERM": (),
    "SIGSEGV": (),
    "SIGABRT": (),
    "exit:0": (),
    "exit:7": (),
    "raise:ValueError": (),
    "SIGSTOP": ("--heartbeat", "2"),
    "hang": ("--timeout", "3"),
}


def injected(fault: str) -> Fault:
    """Return what is injected: rank 2 fails in the midst of 2F3 of step 20."""
    return Fault(VICTIM, AT, "during", fault, STEP)


def is_right(fault: str, launcher: str, text: str) -> bool:
    """Whether a text names the rank and what happened to it."""
    if launcher == BAREPP:
        words = re.escape(fault_action(fault).expected.words)
        return re.search(rf"rank {VICTIM} failed[^\n]*: [^\n]*{words}", text) is not None
    return all(re.search(words, text) for words in (rf"(?i)\brank\W*{VICTIM}\b", _theirs(fault)))


def report_is_right(fault: str, launcher: str, output: str) -> bool:
    """Whether the launcher's report is right; of torchrun's, what it calls the root cause."""
    if launcher == TORCH:
        _, found, rest = output.rpartition("Root Cause (first observed failure):")
        output = rest if found else ""
    return is_right(fault, launcher, output)


def _theirs(fault: str) -> str:
    """Return a pattern for what happened, in torch's words."""
    name, _, detail = fault.partition(":")
    if name == "exit":
        return rf"exitcode\s*: {detail}"
    if fault in ("SIGSTOP", "hang"):
        return r"(?i)timed? ?out|stopped|no progress"
    return detail or name
