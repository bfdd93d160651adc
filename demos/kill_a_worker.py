"""Step 17 of the course: a rank dies at a chosen action. Who is told what, and when?

    python demos/kill_a_worker.py

ends with

    SIGKILL on rank 2 during 2F3 of step 5
    rank 0 raised JobFailed 26.9 ms after the fault while …
    rank 1 raised JobFailed 37.1 ms after the fault while …
    rank 3 raised JobFailed 26.1 ms after the fault while …
    all had ended 157.2 ms after the fault; the exit code is 137, and nothing is left

on two cores that others kept busy. The job is demos/one_f_one_b.py as it stands, on four ranks; the
fault comes from outside. Choose another one:

    python demos/kill_a_worker.py --rank 1 --at 1B0 --when after --fault raise
    python demos/kill_a_worker.py --fault SIGSTOP --heartbeat 2

`--at` is an action as `python -m barepp.plan --schedule 1f1b --stages 4 --microbatches 8` draws it;
barepp/worker/faults/kinds.py lists what can happen to a rank. A test of your own script is as
short:

    outcome = barepp.testing.run_with_fault("train.py", world=4, rank=2, at="2F3")
    outcome.check(told_within_s=1.0)

`check` wants what should be true after any failure: the cause names the rank and what happened to
it, every other rank was told that same cause, in time, and nothing is left behind.
tests/testing/test_fault_matrix.py does so for each action of each schedule.

You can now say: a failure has one cause: every other rank is told it, raises it, and ends; nothing
is left behind.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import barepp
from barepp.testing import FaultOutcome, run_with_fault

SCRIPT = Path(__file__).parent / "one_f_one_b.py"
WORLD_SIZE = 4


def story(outcome: FaultOutcome) -> str:
    """Return what happened, a line for each rank."""
    assert outcome.ended_after_s is not None
    lines = [str(outcome.fault), *map(str, outcome.survivors.values())]
    lines.append(
        f"all had ended {outcome.ended_after_s * 1e3:.1f} ms after the fault; the exit code is "
        f"{outcome.exit_code}, and {', '.join(outcome.leftovers) or 'nothing is left'}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the demo; return its exit code."""
    flags = read_flags(arguments)
    try:
        outcome = run_with_fault(
            SCRIPT,
            world=WORLD_SIZE,
            args=["--steps", flags.step + 1],
            **vars(flags),
        )
    except barepp.BareppError as error:
        print(f"kill_a_worker.py: {error}", file=sys.stderr)
        return 2
    if outcome.report:
        print(outcome.report)
    outcome.check()
    print(story(outcome))
    return 0


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Return which rank fails, and how."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=2, help="who fails (2)")
    parser.add_argument("--at", default="2F3", metavar="ACTION", help="at which action (2F3)")
    parser.add_argument("--when", default="during", help="before, during or after it (during)")
    parser.add_argument("--fault", default="SIGKILL", help="what happens to it (SIGKILL)")
    parser.add_argument("--step", type=int, default=5, help="in which step, from 0 (5)")
    parser.add_argument("--transport", default="auto", help="how tensors travel (auto)")
    parser.add_argument(
        "--heartbeat", type=float, default=10.0, metavar="S", help="see the launcher"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="see the launcher"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
