"""Shows a schedule before it runs: its grid, bubble and memory, from costs that you state.

    python -m barepp.plan --schedule 1f1b --stages 4 --microbatches 8 [--json]

A cost is one number for all stages, or one for each, as in 1,2,1,1. No process is started and torch
is not imported.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from barepp.cli import Parser, reader_is_gone
from barepp.errors import UsageError
from barepp.plan.chart_image import CHARACTERS, check_path, plot
from barepp.plan.chart_layout import panel
from barepp.plan.colours import wants_colours
from barepp.plan.explain import explain
from barepp.plan.simulate import Cost, Costs, simulate
from barepp.plan.text_chart import draw
from barepp.plan.theory import bubble_in_theory
from barepp.plan.timeline import Timeline
from barepp.program.actions import order_text
from barepp.program.dry_run import Number
from barepp.schedules import Schedule, make_schedule, schedule_names

_MOST_STAGES = 1024  # as many as a world may have ranks; some schedules take their square in time
_MOST_COST = 10**15  # of one action; and its inverse is the least, but for 0
_MOST_CHARACTERS = 40  # of one number: enough for any that is meant
# More actions than this are not drawn: nobody could read the grid.
_MOST_DRAWN = 50_000


def _number(text: str) -> int | Fraction:
    # Not float: 0.1 is then exactly a tenth, ten of them are 1, and the grid has clean ticks.
    exponent = re.search(r"[eE][+-]?(\d+)\s*$", text.replace("_", ""))  # 1_000 is a number too
    # (A Fraction writes all digits out: 1e999999999 would take for ever.)
    written_out = len(text) <= _MOST_CHARACTERS and (exponent is None or int(exponent[1]) <= 99)
    try:
        number = Fraction(text) if written_out else None
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 1 or 0.5") from None
    if number is None or not (number == 0 or 1 <= abs(number) * _MOST_COST <= _MOST_COST**2):
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is beyond what a plan adds up: a cost is 0, or from 1e-15 to 1e15, in "
            f"at most {_MOST_CHARACTERS} characters"
        )
    return int(number) if number.denominator == 1 else number


def _cost(text: str) -> Cost:
    numbers = [_number(word) for word in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


def _whole_numbers(text: str) -> int | list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _parser() -> Parser:
    parser = Parser(prog="python -m barepp.plan", description=(__doc__ or "").splitlines()[0])
    names = ", ".join(schedule_names())
    parser.add_argument(
        "--schedule",
        required=True,
        metavar="NAME",
        help=f"one of {names}, or your own: path/to/file.py:function",
    )
    parser.add_argument("--stages", required=True, type=int, help="slices of the model, in all")
    parser.add_argument("--microbatches", required=True, type=int)
    parser.add_argument(
        "--ranks", type=int, help="processes (default: one for each stage, in zb_v for every two)"
    )
    cost_help = "of one stage and microbatch (default 1); or one cost for each stage: 1,2,1,1"
    parser.add_argument("--forward-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument("--backward-input-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument("--backward-weight-cost", type=_cost, default=1, help=cost_help)
    parser.add_argument(
        "--transfer-cost", type=_number, default=0, help="between two ranks (default 0)"
    )
    parser.add_argument(
        "--activation-bytes",
        type=_whole_numbers,
        metavar="BYTES",
        help="what a forward leaves on its stage until the backward, one number or one for each "
        "stage: the plan then says how many bytes each rank keeps at most",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the plan as a picture too, .svg or .png"
    )
    parser.add_argument(
        "--explain",
        type=int,
        metavar="RANK",
        help="print what this rank receives, computes and sends, line by line",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    return parser


def print_json(schedule: Schedule, timeline: Timeline, peak_bytes: list[int] | None) -> None:
    """Print the plan as one JSON object."""
    head = {
        "schedule": schedule.name,
        "stages": schedule.num_stages,
        "ranks": schedule.num_ranks,
        "microbatches": schedule.num_microbatches,
    }
    tail = {
        "makespan": _plain(timeline.makespan),
        "bubble": timeline.bubble,
        "peak_in_flight": timeline.peak_in_flight,
    }
    if peak_bytes is not None:
        tail["peak_bytes"] = peak_bytes
    print(json.dumps({**head, "order": order_text(schedule.order), **tail}))


def report(
    schedule: Schedule,
    timeline: Timeline,
    costs: Costs,
    peak_bytes: list[int] | None,
    width: int,
    *,
    colours: bool = False,
) -> str:
    """Return what is printed for a person: the grid, then the numbers with their formulas."""
    ranks, makespan = schedule.num_ranks, _plain(timeline.makespan)
    actions = sum(map(len, schedule.order))
    lines = [
        headline(schedule),
        "",
        draw(timeline, width, colours=colours)
        if actions <= _MOST_DRAWN
        else f"({actions} actions are too many to draw)",
        "",
        f"makespan        {makespan}",
        f"bubble          {timeline.bubble:.1%} = 1 - busy / (ranks * makespan)"
        f" = 1 - {_plain(timeline.busy)} / ({ranks} * {makespan})",
    ]
    theory = bubble_in_theory(schedule, costs)
    if theory is not None:
        unsaid = " if transfers took no time" if costs.transfer else ""
        fraction = f"{theory.formula} = {theory.idle} / {theory.whole}{unsaid}"
        lines.append(f"  in theory     {theory.idle / theory.whole:.1%} = {fraction}")
    peaks = _listed(timeline.peak_in_flight)
    lines.append(f"peak in-flight  {peaks} (rank 0 first: forwards whose backward has not run)")
    if peak_bytes is not None:
        lines.append(f"peak bytes      {_listed(peak_bytes)} (rank 0 first: kept for backwards)")
    return "\n".join(lines)


def headline(schedule: Schedule) -> str:
    """Return "1f1b: 4 stages on 4 ranks, 8 microbatches"."""
    stages, ranks = _count(schedule.num_stages, "stage"), _count(schedule.num_ranks, "rank")
    return (
        f"{schedule.name}: {stages} on {ranks}, {_count(schedule.num_microbatches, 'microbatch')}"
    )


def _count(number: int, thing: str) -> str:
    """Return "1 stage", "2 stages", "2 microbatches"."""
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number} {thing}{plural if number != 1 else ''}"


def _listed(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return ", ".join(words if len(words) <= 24 else [*words[:12], "...", *words[-4:]])


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
        if args.plot is not None:
            check_path(args.plot)
        if args.stages > _MOST_STAGES:
            raise UsageError(f"{args.stages} stages are too many: a plan may have {_MOST_STAGES}")
        schedule = make_schedule(args.schedule, args.stages, args.microbatches, args.ranks)
        timeline = simulate(schedule.order, schedule.num_stages, costs)
        explained = "" if args.explain is None else explain(schedule, args.explain)
        peak_bytes = None
        if args.activation_bytes is not None:
            peak_bytes = timeline.peak_bytes(args.activation_bytes, schedule.num_stages)
        if args.plot is not None:
            said = f"planned: makespan {_plain(timeline.makespan)}, bubble {timeline.bubble:.1%}"
            drawn = panel(timeline, said, "time, in units of the costs", characters=CHARACTERS)
            plot([drawn], headline(schedule), args.plot)
    except UsageError as error:
        parser.error(str(error))
    try:
        if explained:
            print(explained)
        elif args.json:
            print_json(schedule, timeline, peak_bytes)
        else:
            # Where the output is not a terminal, 120 columns: the lines go to a file or a document.
            width = shutil.get_terminal_size((120, 24)).columns
            colours = wants_colours(sys.stdout)
            print(report(schedule, timeline, costs, peak_bytes, width, colours=colours))
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_is_gone()
    return 0


if __name__ == "__main__":
    sys.exit(main())
