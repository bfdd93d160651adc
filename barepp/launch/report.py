"""What a person reads when a job has failed: the cause once, first, then one line a rank."""

from __future__ import annotations

from collections.abc import Sequence

from barepp.launch.job_state import Member
from barepp.launch.output import Output
from barepp.launch.processes.rank_process import Outcome, Rank
from barepp.monitor.stacks import stack_lines
from barepp.worker.heartbeat import IN_SCRIPT
from transport.errors import Failure, printable, signal_name


def tell(outcome: Outcome, output: Output) -> None:
    """Show how a job failed, and write into each rank's log what the rank itself had reported."""
    for rank in outcome.ranks:
        if rank.reported is not None:
            text = f"{rank.reported.headline()}\n{rank.reported.traceback}"
            output.write_log(rank.rank, printable(text).rstrip() + "\n")
    if outcome.failure is not None:
        output.say(report(outcome.failure, [*outcome.ranks, *outcome.elsewhere]))


def report(failure: Failure, ranks: Sequence[Member]) -> str:
    """Return the report of a failed job, several lines."""
    what = failure.cause, failure.message
    told = [(rank.rank, rank.reported) for rank in ranks if rank.reported is not None]
    same = [rank for rank, reported in told if (reported.cause, reported.message) == what]
    who = rank_names(same if len(same) > 1 else [failure.rank]) if failure.rank >= 0 else "the job"
    doing = f" while {failure.doing}" if failure.doing and len(same) < 2 else ""
    lines = [f"barepp: {who} failed{doing}: {failure.message}"]
    if failure.traceback:
        lines += ["    " + line for line in failure.traceback.rstrip().splitlines()]
    if failure.cause == "hang":
        mine = [rank for rank in ranks if isinstance(rank, Rank)]  # other launchers show their own
        lines += stack_lines({rank.rank: rank.stacks for rank in mine})
    for rank in ranks:
        if rank.rank != failure.rank and rank.rank not in same:
            lines.append(f"barepp: rank {rank.rank} {_fate(rank)}")
    return printable("\n".join(lines)) + "\n"


def rank_names(ranks: Sequence[int]) -> str:
    """Return "rank 2", "ranks 0-3" or "ranks 0, 2"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))


def _fate(rank: Member) -> str:
    """Return how a rank ended that was not the first to fail."""
    doing = f" while {rank.doing}" if rank.doing else ""
    if rank.killed:
        # It has never come to a call of ours, which would have raised.
        doing = doing or (f" while {IN_SCRIPT}" if rank.joined else "")
        return f"was told{doing}, did not end by itself and was killed"
    if rank.reported is not None:
        told = f"was told{doing}, then " if doing else ""
        return f"{told}failed as well: {rank.reported.message.partition(chr(10))[0]}"
    if rank.exit_code is not None and rank.exit_code < 0:
        return f"was killed by {signal_name(-rank.exit_code)}{doing}"
    if rank.status is None:
        return f"is on another node, which does not say how it ended{doing}"
    if rank.exit_code == 0 and (rank.left or not rank.joined):
        return "had ended well"
    return f"was told{doing}, and ended" if doing else _fate_untold(rank)


def _fate_untold(rank: Member) -> str:
    """Return how a rank ended that did not say what it was about when it was told."""
    if rank.cut_off is None:
        return f"ended with exit code {rank.exit_code}, and nobody has heard why"
    doing = f" while {rank.cut_off}" if rank.cut_off else ""
    return f"lost its connection to the launcher{doing}, and ended"
