"""Tests of failures for your own script: let a rank fail at a chosen action, check what follows.

    def test_a_death_in_training():
        outcome = run_with_fault("train.py", world=4, rank=2, at="2F3", fault="SIGKILL")
        outcome.check(told_within_s=1.0)
        assert outcome.exit_code == 137

The script is the one that you run otherwise, unchanged; it uses `barepp.Pipeline`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from barepp.errors import UsageError
from barepp.launch.job import Job
from barepp.launch.output import Output
from barepp.launch.processes.rank_process import Outcome, Rank
from barepp.launch.report import report
from barepp.program.actions import Action
from barepp.testing.leaks import LeakCheck
from barepp.worker.devices import chosen_device
from barepp.worker.faults.kinds import Expected, Fault, fault_action
from barepp.worker.spec import Call, FaultPlan, Options, Script, reaches_elsewhere
from transport.errors import Failure, JobFailed
from transport.private_names import import_for_optimizers

THREADS: Final = "inproc"  # the transport whose ranks are threads


@dataclasses.dataclass(frozen=True)
class Survivor:
    """What became of a rank that did not fail itself.

    Attributes:
        told: the cause that the `JobFailed` carried which left its script; None without one.
        doing: what it was doing then.
        after_s: how long after the fault that was; None without one.
        exit_code: what its process ended with; None for a thread.
        killed: whether it was ended after the grace, because it did not end by itself.
    """

    rank: int
    told: Failure | None
    doing: str
    after_s: float | None
    exit_code: int | None
    killed: bool

    def __str__(self) -> str:
        doing = f" while {self.doing}" if self.doing else ""
        if self.told is not None and self.after_s is not None:
            after = f"{self.after_s * 1e3:.1f} ms after the fault"
            return f"rank {self.rank} raised JobFailed {after}{doing}"
        if self.killed:
            return f"rank {self.rank} did not end by itself{doing} and was killed"
        if self.exit_code == 0:
            return f"rank {self.rank} ended well"
        code = "" if self.exit_code is None else f" with exit code {self.exit_code}"
        return f"rank {self.rank} ended{code} without a JobFailed"


@dataclasses.dataclass(frozen=True)
class FaultOutcome:
    """What came of a fault.

    Attributes:
        fault: what was injected.
        happened: whether it came to that; not when the script never reached the step, for example.
        exit_code: what `python -m barepp.launch` would have ended with.
        cause: the first failure, as every rank was told it; None when the job ended well.
        survivors: all ranks but the one that was made to fail, by number.
        ended_after_s: seconds from the fault to the end of the last rank; None without one.
        seconds: what the whole run took, start included.
        leftovers: processes, threads, descriptors and shared memory that it left behind.
        report: what the launcher would have printed of the failure.
        output: what the ranks printed.
    """

    fault: Fault
    happened: bool
    exit_code: int
    cause: Failure | None
    survivors: dict[int, Survivor]
    ended_after_s: float | None
    seconds: float
    leftovers: list[str]
    report: str
    output: str

    def check(self, told_within_s: float = math.inf, ended_within_s: float = math.inf) -> None:
        """Check that the job came to the end that a job should come to.

        The cause names the rank and what was done to it, and the exit code says so too; every
        survivor raised `JobFailed` with that very cause and knew what it was about itself, in
        time, or was ended after the grace; the job is over in time, and nothing of it is left. For
        a mere delay: the job ended as if nothing had happened.

        Raises:
            AssertionError: something of that is not so. The message says all that is not, and
                shows what the ranks and the launcher printed.
        """
        wrong = [*self._wrong(fault_action(self.fault.what).expected, told_within_s)]
        if (self.ended_after_s or 0.0) > ended_within_s:
            wrong.append(f"the job went on for {self.ended_after_s:.3f} s after it")
        if wrong:
            shown = [text.rstrip() for text in (self.report, self.output) if text]
            raise AssertionError("\n".join([f"{self.fault}:", *wrong, *shown]))

    def _wrong(self, expected: Expected, told_within_s: float) -> Iterator[str]:
        if not self.happened:
            yield f"it never happened: the job ended with code {self.exit_code} without it"
            return
        yield from (f"left behind: {found}" for found in self.leftovers)
        if self.exit_code != expected.exit_code:
            yield f"the exit code is {self.exit_code} instead of {expected.exit_code}"
        cause = self.cause
        if not expected.cause and cause is not None:
            yield f"the job failed: {cause.headline()}"
        elif expected.cause and cause is None:
            yield "the job did not fail"
        elif cause is not None:
            if (cause.rank, cause.cause) != (self.fault.rank, expected.cause):
                yield f"the cause is said to be: {cause.headline()} ({cause.cause})"
            elif expected.words not in cause.message:
                yield f"the cause's message lacks {expected.words!r}: {cause.message}"
            for survivor in self.survivors.values():
                yield from self._wrong_with(survivor, told_within_s)

    def _wrong_with(self, survivor: Survivor, told_within_s: float) -> Iterator[str]:
        if survivor.told is None:
            if not survivor.killed:
                yield str(survivor)
        elif survivor.told != self.cause:
            yield f"rank {survivor.rank} was told another cause: {survivor.told.headline()}"
        elif not survivor.doing:
            yield f"rank {survivor.rank} did not know what it was about"
        elif survivor.after_s is None or survivor.after_s > told_within_s:
            yield f"too late: {survivor}"


def run_with_fault(
    target: str | Path | Callable[..., Any],
    *,
    world: int,
    rank: int,
    at: str,
    when: str = "during",
    fault: str = "SIGKILL",
    step: int = 0,
    args: Sequence[Any] = (),
    transport: str = "auto",
    device: str | None = None,
    grace: float = 0.5,
    heartbeat: float = 10.0,
    timeout: float = 300.0,
    join_timeout: float = 60.0,
    fork: bool = False,
) -> FaultOutcome:
    """Run a script on `world` ranks, let one of them fail, and return what came of it.

    Args:
        target: a script, which gets `args` on its command line; or a function, which is called as
            `barepp.run` would, with the world and `args`.
        world, transport, device, grace, heartbeat, timeout, join_timeout: the launcher's flags,
            in seconds. To test "SIGSTOP" or "hang", a shorter heartbeat or timeout saves time.
        rank: the rank that fails.
        at: the action at which it fails, as `python -m barepp.plan` prints it: "2F3" is stage 2,
            forward, microbatch 3.
        when: "before" the action computes, "during" that, or "after" its result was sent.
        fault: what happens; `barepp.worker.faults.kinds` lists what can. Over "inproc" the ranks
            are threads of one process, so that only "raise" and "delay" can reach one alone.
        step: the training step in which it fails, from 0.
        fork: fork the ranks from this process instead of from a fresh fork server. That takes a
            tenth of a second instead of some three, and is safe as long as no other thread of this
            process holds a lock that the ranks need.

    Raises:
        UsageError: what is asked for cannot be, found out before anything starts; or the rank has
            no such action, found out in that step.
    """
    planned = Fault(rank, Action.parse(at), when, fault, step)
    limits = grace, join_timeout, heartbeat, timeout
    options = Options(world, transport, *limits, device=chosen_device(device, transport))
    task = _checked_task(target, args, planned, options)
    with tempfile.TemporaryDirectory(prefix="barepp-testing-") as folder:
        options = dataclasses.replace(options, fault_plan=FaultPlan(planned, folder))
        leaks, began = LeakCheck(), time.monotonic()
        ended, output = _run(task, options, fork=fork)
        over = time.monotonic()
        leftovers = leaks.leftovers([found.pid for found in ended.ranks])
        notes = [_notes(Path(folder) / f"rank{number}.jsonl") for number in range(world)]
    if "absent" in notes[rank]:
        raise UsageError(notes[rank]["absent"]["why"])
    at_s = notes[rank]["injected"]["monotonic"] if "injected" in notes[rank] else None
    processes, failure = {found.rank: found for found in ended.ranks}, ended.failure
    return FaultOutcome(
        fault=planned,
        happened=at_s is not None,
        exit_code=ended.exit_code,
        # As it was told: without control characters, and bounded.
        cause=None if failure is None else Failure.from_record(failure.to_record()),
        survivors={
            other: _survivor(other, note.get("told"), processes.get(other), at_s)
            for other, note in enumerate(notes)
            if other != rank
        },
        ended_after_s=None if at_s is None else over - at_s,
        seconds=over - began,
        leftovers=leftovers,
        report="" if failure is None else report(failure, ended.ranks),
        output=output,
    )


def _checked_task(
    target: str | Path | Callable[..., Any], args: Sequence[Any], planned: Fault, options: Options
) -> Script | Call:
    """Return what the ranks run; UsageError for what cannot be."""
    world, threads = options.world_size, options.transport == THREADS
    if type(world) is not int or world < 1:
        raise UsageError(f"a world has at least one rank, not {world!r}")
    if not 0 <= planned.rank < world:
        raise UsageError(f"rank {planned.rank} cannot fail: there are ranks 0 to {world - 1}")
    if threads and fault_action(planned.what).needs_process:
        text = f"over {THREADS} the ranks are threads of one process, and {planned.what} would"
        raise UsageError(f"{text} reach all of them; raise and delay:1 reach one")
    if callable(target):
        return Call(target, tuple(args))
    if not Path(target).is_file():
        raise UsageError(f"there is no script {target}")
    if threads:
        raise UsageError(f"the ranks of a script are processes; over {THREADS} give a function")
    return Script(str(target), tuple(map(str, args)))


def _run(task: Script | Call, options: Options, *, fork: bool) -> tuple[Outcome, str]:
    """Run the task on processes or threads; return how it ended, and what was printed."""
    if options.transport == THREADS:
        from barepp.launch.threads import run_threads  # needs torch, which nothing else here does

        assert isinstance(task, Call)
        try:
            run_threads(task, options)
        except JobFailed as error:
            return Outcome(error.failure, []), ""
        return Outcome(None, []), ""
    shown = bytearray()
    fork = fork or (isinstance(task, Call) and not reaches_elsewhere(task))
    if fork:
        import_for_optimizers()  # these once here instead of once in every rank
        for name in ("barepp.train.pipeline", "barepp.worker.main"):
            importlib.import_module(name)
    with Output(None, write=lambda target, data: shown.extend(data)) as output:
        ended = Job(task, options, output, fork=fork).run()
    if ended.signal is not None:
        signal.raise_signal(ended.signal)  # it was meant for the program: Ctrl-C, for example
    return ended, shown.decode(errors="replace")


_Note = dict[str, Any]  # what a rank has written down


def _notes(path: Path) -> dict[str, _Note]:
    """Return what a rank has written down, by event."""
    text = path.read_text() if path.exists() else ""
    *lines, _cut_off = text.split("\n")  # one that was killed may have been writing
    return {note["event"]: note for note in map(json.loads, lines)}


def _survivor(
    rank: int, note: _Note | None, process: Rank | None, fault_at: float | None
) -> Survivor:
    return Survivor(
        rank,
        told=Failure.from_record(note["failure"]) if note else None,
        doing=note["doing"] if note else process.doing if process else "",
        after_s=note["monotonic"] - fault_at if note and fault_at is not None else None,
        exit_code=process.exit_code if process else None,
        killed=process.killed if process else False,
    )
