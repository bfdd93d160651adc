"""`python -m barepp.timeline`: what really happened, from a trace, beside what was to be expected.

    python -m barepp.timeline trace.json [--step N] [--plot [out.svg|out.png]] [--arrows]

A demo's `--trace trace.json`, or `barepp.write_trace`, writes the file. Nothing else is needed, not
torch and not the machine that it comes from.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from barepp.cli import Parser, reader_is_gone
from barepp.errors import BareppError
from barepp.plan.__main__ import headline
from barepp.plan.chart_image import CHARACTERS, check_path, plot
from barepp.plan.chart_layout import panel
from barepp.plan.colours import MEANING, wants_colours
from barepp.plan.text_chart import draw_to_scale
from barepp.plan.timeline import Timeline
from barepp.trace.analysis import (
    Measured,
    copies,
    counted_steps,
    measured,
    outside_ms,
    predicted,
    rank_times,
    schedule_of,
    transfers,
    typical_step,
)
from barepp.trace.chrome_format import Trace
from barepp.trace.chrome_reader import read_trace
from barepp.trace.step_breakdown import own_time, table

_BESIDE: Final = Path()  # --plot without a path


def _parser() -> Parser:
    parser = Parser(prog="python -m barepp.timeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="a file that a demo's --trace has written")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=_BESIDE,
        metavar="PATH",
        help="draw plan and reality as a picture, .svg or .png (an .svg beside the trace)",
    )
    parser.add_argument("--arrows", action="store_true", help="the picture shows every message")
    parser.add_argument("--step", type=int, help="which step to draw (one of median length)")
    return parser


def report(trace: Trace, step: int, width: int, *, colours: bool) -> str:
    """Return what is printed for a person: one step drawn, then the sums over all that count."""
    real, schedule = measured(trace, step), schedule_of(trace, step)
    plan = predicted(trace, schedule)
    end = _common_end(plan, real)
    return "\n".join(
        [
            headline(schedule),
            "",
            _planned(plan),
            draw_to_scale(plan, width, end=end, colours=colours),
            "",
            _measured(real),
            draw_to_scale(real.timeline, width, end=end, colours=colours),
            "",
            _legend(trace),
            "",
            *_wrapped(_sums(trace, plan), width),
        ]
    )


def _common_end(plan: Timeline, real: Measured) -> float | None:
    """Return where both drawings end; None for two scales, where one would be unreadably short."""
    ends = float(plan.makespan), float(real.timeline.makespan)
    return max(ends) if max(ends) <= 2 * min(ends) else None


def _planned(plan: Timeline) -> str:
    ms = float(plan.makespan)
    return f"planned, from what each action took: {ms:.2f} ms, bubble {plan.bubble:.1%}"


def _measured(real: Measured) -> str:
    ms, bubble = float(real.timeline.makespan), real.timeline.bubble
    return f"measured, step {real.number}: {ms:.2f} ms, bubble {bubble:.1%}"


def _sums(trace: Trace, plan: Timeline) -> list[str]:
    ranks, count = rank_times(trace), len(counted_steps(trace))
    longest = max(rank.step_ms for rank in ranks)
    computing = sum(rank.computing_ms for rank in ranks)
    bubble = 1 - computing / (len(ranks) * longest) if longest else 0.0
    return [
        f"milliseconds a step, the mean of {count}:",
        *table(ranks),
        "",
        f"bubble          {plan.bubble:.1%} predicted from what each action took, "
        f"{bubble:.1%} measured: 1 - computing / (ranks * step)",
        own_time(ranks),
        *_messages(trace, count),
        *(f"between steps   {ms:.2f} ms {name}" for name, ms in outside_ms(trace).items()),
        *_clocks(trace),
    ]


def _wrapped(lines: Iterable[str], width: int) -> Iterator[str]:
    """Break what is too long for the terminal, and indent what follows; never the table."""
    for line in lines:
        if line.startswith((" ", "rank  ")):
            yield line
        else:
            yield textwrap.fill(line, max(width, 60), subsequent_indent=" " * 16)


def _legend(trace: Trace) -> str:
    kinds = {action.kind for row in trace.schedule.order for action in row}
    meanings = [f"{kind.value} {meaning}" for kind, meaning in MEANING.items() if kind in kinds]
    return "; ".join([*meanings, "the number is the microbatch", ". idle, or busy with messages"])


def _messages(trace: Trace, num_steps: int) -> list[str]:
    if any(rank.copies for rank in trace.ranks):
        return _copies(trace, num_steps)
    found = transfers(trace)
    if not found.messages:
        return []
    total = max(1, found.total_ns)
    return [
        f"messages        {found.messages / num_steps:.0f} a step, on their way for "
        f"{found.total_ns / found.messages / 1e3:.0f} µs in the mean, from isend to arrival: in "
        f"{found.hidden_ns / total:.0%} of that their receiver computed, in "
        f"{found.awaited_ns / total:.0%} it waited for them"
    ]


def _copies(trace: Trace, num_steps: int) -> list[str]:
    """Return what is known of messages on GPUs, where only a copy's own time says anything."""
    found = copies(trace)
    total = max(1, found.total_ns)
    return [
        f"copies          {found.copies / num_steps:.0f} a step on GPUs, of "
        f"{found.nbytes / max(1, found.copies) / 2**20:.2f} MiB and "
        f"{found.total_ns / max(1, found.copies) / 1e3:.0f} µs in the mean, "
        f"{found.nbytes / total:.1f} GB/s: in {found.hidden_ns / total:.0%} of that their rank "
        "computed"
    ]


def _clocks(trace: Trace) -> list[str]:
    worst = max(trace.clock_error_ns)
    return [f"clocks          aligned to within {worst / 1e3:.1f} µs"] if worst else []


def picture(trace: Trace, step: int, path: Path, *, arrows: bool) -> None:
    """Draw what was to be expected and what happened, one below the other, to a file."""
    real, schedule = measured(trace, step), schedule_of(trace, step)
    plan = predicted(trace, schedule)
    end = _common_end(plan, real)
    panels = [
        panel(plan, _planned(plan), "ms", end=end, characters=CHARACTERS),
        panel(
            real.timeline, _measured(real), "ms", end=end, characters=CHARACTERS,
            waits=real.waits, arrows=real.arrows if arrows else (),
        ),
    ]  # fmt: skip
    plot(panels, headline(schedule), path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    width = shutil.get_terminal_size((120, 24)).columns
    try:
        path = args.trace.with_suffix(".svg") if args.plot == _BESIDE else args.plot
        if path is not None:
            check_path(path)
        trace = read_trace(args.trace)
        step = typical_step(trace) if args.step is None else args.step
        text = report(trace, step, width, colours=wants_colours(sys.stdout))
        if path is not None:
            picture(trace, step, path, arrows=args.arrows)
            text += f"\npicture         {path}"
    except BareppError as error:
        parser.error(str(error))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        return reader_is_gone()
    return 0


if __name__ == "__main__":
    sys.exit(main())
