"""`python -m barepp.top`: what every rank of a running job is about, drawn anew each second.

On a terminal the picture is redrawn in its place, elsewhere it is printed again and again. --once
looks for one interval, because rates need two looks, and prints one picture. Ctrl-C ends it, and
not the job. Exit code: 0, also when the job has ended; 2 when there is no job to watch, or more
than one and none is chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence

from barepp.cli import reader_is_gone
from barepp.errors import BareppError, JobEnded
from barepp.monitor.client import add_job_argument, line_to
from barepp.monitor.rates import RankRates, looks
from barepp.monitor.status import JobStatus
from barepp.monitor.table import as_object, interval, picture
from barepp.monitor.terminal import Screen, size_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        with line_to(parsed.job) as line:
            seen = looks(line, parsed.interval, threading.Event())
            if parsed.once:
                next(seen)  # rates need two
            for job, readings in seen:
                parsed.show(job, readings)
                if parsed.once:
                    break
    except JobEnded as error:
        print(f"barepp.top: {error}", file=sys.stderr)
    except BareppError as error:
        print(f"barepp.top: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print()  # the terminal has written ^C there
    except BrokenPipeError:
        return reader_is_gone()
    return 0


def _show_as_json(job: JobStatus, readings: Sequence[RankRates]) -> None:
    print(json.dumps(as_object(job, readings)), flush=True)


class _Shown:
    """Shows one picture after the other on stdout."""

    def __init__(self) -> None:
        self._screen = Screen()

    def __call__(self, job: JobStatus, readings: Sequence[RankRates]) -> None:
        size = size_of(sys.stdout.fileno()) if sys.stdout.isatty() else None
        if size is None:
            print("\n".join(picture(job, readings)), end="\n\n", flush=True)
        else:
            lines = picture(job, readings, size.columns, size.lines)
            print(self._screen.draw(lines, size.columns), end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m barepp.top",
        description="Show what every rank of a running job of yours is about: its state, and for "
        "how long nothing about it has changed; training steps done, microbatches a second, CPU "
        "time and memory of its process, and the bytes of tensors that it receives and sends.",
    )
    add_job_argument(parser)
    parser.add_argument(
        "--interval", type=interval, default=1.0, metavar="S", help="seconds between pictures (1)"
    )
    parser.add_argument("--once", action="store_true", help="show one picture and end")
    parser.add_argument(
        "--json",
        dest="show",
        action="store_const",
        const=_show_as_json,
        default=_Shown(),
        help="one JSON object a line for each picture",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
