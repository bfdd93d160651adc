"""Shows a schedule before it runs: its grid, bubble and memory, from costs that you state.

    python -m barepp.plan --schedule 1f1b --stages 4 --microbatches 8 [--json]

No process is started and torch is not imported.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

from barepp.actions import order_text
from barepp.dry_run import Number
from barepp.errors import UsageError
from barepp.schedules import Schedule, make_schedule, schedule_names
from barepp.simulate import Costs, simulate
from barepp.timeline import Timeline, draw


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence, without the page of usage before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _cost(text: str) -> int | Fraction:
    # Not float: 0.1 is then exactly a tenth, ten of them are 1, and the grid has clean ticks.
    try:
        cost = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1 or 0.5") from None
    return int(cost) if cost.denominator == 1 else cost


def _parser() -> _Parser:
    parser = _Parser(prog="python -m barepp.plan", description=(__doc__ or "").splitlines()[0])
    names = ", ".join(schedule_names())
    parser.add_argument("--schedule", required=True, metavar="NAME", help=f"one of {names}")
    parser.add_argument("--stages", required=True, type=int, help="slices of the model, in all")
    parser.add_argument("--microbatches", required=True, type=int)
    parser.add_argument("--ranks", type=int, help="processes (default: one for each stage)")
    cost_help = "of one stage and microbatch (default 1)"
    parser.add_argument("--forward-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument("--backward-input-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument("--backward-weight-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument(
        "--transfer-cost", type=_cost, default=0, help="between two ranks (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    return parser


def plan(schedule: Schedule, timeline: Timeline) -> dict[str, object]:
    """Return what `--json` prints."""
    return {
        "schedule": schedule.name,
        "stages": schedule.num_stages,
        "ranks": schedule.num_ranks,
        "microbatches": schedule.num_microbatches,
        "order": order_text(schedule.order),
        "makespan": _plain(timeline.makespan),
        "bubble": timeline.bubble,
        "peak_in_flight": timeline.peak_in_flight,
    }


def report(schedule: Schedule, timeline: Timeline, transfer: Number, width: int) -> str:
    """Return what is printed for a person: the grid, then the numbers with their formulas."""
    ranks, makespan = schedule.num_ranks, _plain(timeline.makespan)
    p, m = schedule.num_stages, schedule.num_microbatches
    busy = _plain(timeline.busy)
    lines = [
        f"{schedule.name}: {p} stages on {ranks} ranks, {m} microbatches",
        "",
        draw(timeline, width),
        "",
        f"makespan        {makespan}",
        f"bubble          {timeline.bubble:.1%} = 1 - busy / (ranks * makespan)"
        f" = 1 - {busy} / ({ranks} * {makespan})",
    ]
    if schedule.name in ("gpipe", "1f1b"):
        unsaid = " if transfers took no time" if transfer else ""
        theory = f"(p - 1) / (m + p - 1) = {p - 1} / {m + p - 1}{unsaid}"
        lines.append(f"  in theory     {(p - 1) / (m + p - 1):.1%} = {theory}")
    peaks = ", ".join(str(peak) for peak in timeline.peak_in_flight)
    lines.append(f"peak in-flight  {peaks} (rank 0 first: forwards whose backward has not run)")
    return "\n".join(lines)


def _plain(number: Number) -> int | float:
    return int(number) if number == int(number) else float(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    costs = Costs(
        args.forward_cost, args.backward_input_cost, args.backward_weight_cost, args.transfer_cost
    )
    try:
        schedule = make_schedule(args.schedule, args.stages, args.microbatches, args.ranks)
        timeline = simulate(schedule.order, schedule.num_stages, costs)
    except UsageError as error:
        parser.error(str(error))
    try:
        if args.json:
            print(json.dumps(plan(schedule, timeline)))
        else:
            # Where the output is not a terminal, 120 columns: the lines go to a file or a document.
            width = shutil.get_terminal_size((120, 24)).columns
            print(report(schedule, timeline, args.transfer_cost, width))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`). The interpreter flushes stdout once more at its
        # end; give it a place to flush to, or it would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, what the shell reports for a program that the signal ends
    return 0


if __name__ == "__main__":
    sys.exit(main())
