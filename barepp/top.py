"""`python -m barepp.top`: what every rank of a running job does, in a table, each second anew.

On a terminal rich (the extra `ui`) redraws the table in its place; without rich the terminal is
cleared each time. Elsewhere the table is printed again and again. --once looks for one interval,
because rates need two looks, and prints one table. Ctrl-C ends this command and not the job.

Exit code: 0, also when the job has ended; 2 when there is no job to watch, or more than one and
none is chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence
from typing import Final

from barepp.cli import reader_is_gone
from barepp.errors import BareppError, JobEnded
from barepp.monitor.client import add_job_argument, line_to
from barepp.monitor.rates import RankRates, looks
from barepp.monitor.status import JobStatus
from barepp.monitor.table import as_object, interval, picture
from barepp.monitor.terminal import Screen, new_screen, size_of

_CLEAR: Final = "\x1b[H\x1b[J"  # ECMA-48: to the upper left corner, and erase to the end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parsed = _parser().parse_args(arguments)
    screen = new_screen() if sys.stdout.isatty() and not parsed.json else None
    try:
        with line_to(parsed.job) as line:
            seen = looks(line, parsed.interval, threading.Event())
            if parsed.once:
                next(seen)  # rates need two
            for job, readings in seen:
                if parsed.json:
                    print(json.dumps(as_object(job, readings)), flush=True)
                else:
                    _show(job, readings, screen)
                if parsed.once:
                    break
    except JobEnded as error:
        print(f"barepp.top: {error}", file=sys.stderr)
    except BareppError as error:
        print(f"barepp.top: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if screen is None and sys.stdout.isatty():
            print()  # the terminal has written ^C there
    except BrokenPipeError:
        return reader_is_gone()
    finally:
        if screen is not None:
            print(screen.leave(), end="", flush=True)
    return 0


def _show(job: JobStatus, readings: Sequence[RankRates], screen: Screen | None) -> None:
    size = size_of(sys.stdout.fileno()) if sys.stdout.isatty() else None
    lines = picture(job, readings, size)
    if size is None:
        print("\n".join(lines), end="\n\n", flush=True)
    elif screen is None:
        print(_CLEAR + "\n".join(lines), flush=True)
    else:
        print(screen.draw(lines, size), end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m barepp.top",
        description="Show what every rank of a running job of yours does: its state, and for "
        "how long nothing about it has changed; training steps done, microbatches a second, CPU "
        "time and memory of its process, and the bytes of tensors that it receives and sends.",
    )
    add_job_argument(parser)
    parser.add_argument(
        "--interval", type=interval, default=1.0, metavar="S", help="seconds between tables (1)"
    )
    parser.add_argument("--once", action="store_true", help="show one table and end")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
