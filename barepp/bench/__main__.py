"""`python -m barepp.bench [NAME] [--json PATH]`: the benchmarks' command line.

A benchmark is a module of this package with two functions, and a line in `BENCHMARKS`:

    add_arguments(parser)               its own flags
    run(arguments, show) -> results     measures; shows lines as it goes; returns what JSON can hold

`run` raises `UsageError` for what a person got wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from barepp.bench.figures import machine, sentence
from barepp.errors import BareppError, UsageError

BENCHMARKS: Final = {
    "training": "step time beside torch.distributed.pipelining, one process, and the ideal",
    "start": "from the command to the first barrier, beside torchrun",
    "faults": "who is told of a failure, after how many milliseconds, beside torchrun",
    "bubbles": "measured bubbles beside predicted ones, with stages that sleep",
    "growth": "the rendezvous of 64, 256 and 512 bare processes",
}
DEFAULT: Final = "training"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence, without the page of usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _overview() -> str:
    lines = [f"  {name:<10} {what}" for name, what in BENCHMARKS.items()]
    return "\n".join([f"benchmarks, named first ({DEFAULT} when none is):", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else DEFAULT
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        print(f"barepp.bench: there is no benchmark {name!r}; there are {known}", file=sys.stderr)
        return 2
    # Only the chosen one is imported: most need torch, and that takes seconds.
    benchmark = importlib.import_module(f"barepp.bench.{name}")
    parser = _Parser(
        prog=f"python -m barepp.bench {name}",
        description=benchmark.__doc__,
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    benchmark.add_arguments(parser)
    parsed = parser.parse_args(rest)
    try:
        _check_writable(parsed.json)
        here = machine()
        print(sentence(here), flush=True)
        results = benchmark.run(parsed, lambda line: print(line, flush=True))
    except BareppError as error:
        print(f"barepp.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    if parsed.json is not None:
        figures = {"benchmark": name, "machine": here, **results}
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _check_writable(path: Path | None) -> None:
    """Find out before minutes of measuring, not after."""
    if path is not None:
        try:
            path.open("a").close()
        except OSError as error:
            raise UsageError(f"--json {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleaning up
    sys.exit(main())
