"""`python -m barepp.stacks`: where every rank of a running job is, and which rank waits for which.

The job goes on meanwhile. monitor/stacks.py takes the stacks. Exit code: 0; 2 when there
is no job to ask, or more than one and none is chosen; 130 after Ctrl-C, which ends no job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from barepp.cli import reader_is_gone
from barepp.errors import BareppError
from barepp.monitor.client import add_job_argument, line_to
from barepp.monitor.stacks import where_all_are


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m barepp.stacks",
        description="Print every rank's Python stack and which rank waits for which, of a running "
        "job of yours, which goes on meanwhile. SIGQUIT to a launcher (Ctrl-\\ in its terminal) "
        "lets it print the same.",
    )
    add_job_argument(parser)
    parsed = parser.parse_args(arguments)
    try:
        with line_to(parsed.job) as line:
            print(where_all_are(*line.stacks()), end="", flush=True)
    except BareppError as error:
        print(f"barepp.stacks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a launcher that is stopped is waited for
        return 130
    except BrokenPipeError:
        return reader_is_gone()
    return 0


if __name__ == "__main__":
    sys.exit(main())
