"""Brings broken bytes to everything that reads from a network, for as long as it is asked to.

    python tests/fuzz.py --seconds 600 [--seed 7] [--target decoder]

It prints the seed, then for each target how many cases were accepted and refused, the most memory
that one of them took, the longest that one lasted, and by how much the process has grown. A finding
ends it with the traceback and the command that shows the case again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import random
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

import fuzz_sockets  # noqa: E402
import fuzz_targets  # noqa: E402

Target = Callable[[random.Random], bool]
TARGETS: dict[str, Target] = {
    "decoder": fuzz_targets.decoder,
    "metadata": fuzz_targets.metadata,
    "handshake": fuzz_targets.handshake,
    "words": fuzz_targets.words,
    "records": fuzz_sockets.records,
    "listener": fuzz_sockets.listener,
    "rendezvous": fuzz_sockets.rendezvous,
    "transport": fuzz_sockets.transport,
    "lending": fuzz_sockets.lending,
    "notes": fuzz_sockets.notes,
}

# A frame has at most 64 KiB of metadata. The worst of it are empty lists, a byte each and 64 bytes
# as an object, and lists in lists that claim 4096 elements each, 1024 deep: together 36 MiB.
MEMORY_NBYTES = 40 * 1024 * 1024
TRACED = 64  # one case in so many is measured: that makes it slower, and tracemalloc itself grows
SLOW_S = 10.0  # no case may take so long, on a machine that is loaded


@dataclasses.dataclass
class Tally:
    """What one target's cases came to."""

    accepted: int = 0
    refused: int = 0
    peak_nbytes: int = 0
    slowest_s: float = 0.0
    grown_nbytes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.accepted:>9} accepted {self.refused:>9} refused "
            f"{self.peak_nbytes / 2**20:>6.1f} MiB at most {self.slowest_s * 1e3:>6.0f} ms at most "
            f"{self.grown_nbytes / 2**20:>+6.1f} MiB resident"
        )


class Finding(Exception):
    """A case that must not be; its text says how to see it again."""


def source(name: str, seed: int, case: int) -> random.Random:
    """Return the random source of one case."""
    return random.Random(f"{name} {seed} {case}")


def run_case(name: str, seed: int, case: int, tally: Tally, *, traced: bool = True) -> None:
    """Run one case and count it; `traced` says whether its memory is measured.

    Raises:
        Finding: it raised what it must not, took too much memory or too long.
    """
    began = time.monotonic()
    if traced:
        tracemalloc.start()
    try:
        accepted = TARGETS[name](source(name, seed, case))
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        seconds = time.monotonic() - began
        assert peak <= MEMORY_NBYTES, f"it took {peak} bytes, over the bound of {MEMORY_NBYTES}"
        assert seconds <= SLOW_S, f"it took {seconds:.1f} s"
    except Exception as error:
        again = f"python tests/fuzz.py --target {name} --seed {seed} --case {case}"
        raise Finding(f"{name}: {type(error).__name__}: {error}\nagain: {again}") from error
    finally:
        if traced:
            tracemalloc.stop()
    tally.accepted += accepted
    tally.refused += not accepted
    tally.peak_nbytes = max(tally.peak_nbytes, peak)
    tally.slowest_s = max(tally.slowest_s, seconds)


def fuzz(name: str, seed: int, seconds: float) -> Tally:
    """Run cases until the time is up."""
    tally = Tally()
    resident = psutil.Process().memory_info().rss
    until = time.monotonic() + seconds
    for case in itertools.count():
        if time.monotonic() >= until:
            break
        run_case(name, seed, case, tally, traced=case % TRACED == 0)
    gc.collect()  # an error that is kept, with its traceback, is a cycle
    tally.grown_nbytes = psutil.Process().memory_info().rss - resident
    return tally


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fuzz.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--case", type=int, help="this one alone")
    parsed = parser.parse_args(arguments)
    names = parsed.target or list(TARGETS)
    print(f"seed {parsed.seed}", flush=True)
    try:
        for name in names:
            if parsed.case is not None:
                tally = Tally()
                run_case(name, parsed.seed, parsed.case, tally)
            else:
                tally = fuzz(name, parsed.seed, parsed.seconds / len(names))
            print(f"{name:<12}{tally}", flush=True)
    except Finding as finding:
        traceback.print_exc()
        print(finding)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
