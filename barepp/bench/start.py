"""Time from the command to the first barrier: barepp's launcher beside torchrun with gloo.

    python -m barepp.bench start [--world 4] [--rounds 5] [--json PATH]

Both commands are started in turns, as a person would start them. The clock runs from before the
command to the moment at which the last rank has left its first barrier; "to the end" runs until the
command has returned. The scripts do nothing else.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from barepp.bench.figures import ratio, spread, table
from barepp.bench.teams.conductor import TAIL, BenchError, environment
from barepp.errors import UsageError

LIMIT_S: Final = 300.0

# Each rank writes the time at which it left the barrier to a file of its own. The clock is the
# machine's (CLOCK_MONOTONIC), so this process's reading can be subtracted.
BAREPP_SCRIPT: Final = """
import pathlib, sys, time
import barepp
with barepp.init() as world:
    world.barrier()
    pathlib.Path(sys.argv[1], str(world.rank)).write_text(str(time.monotonic_ns()))
"""
TORCH_SCRIPT: Final = """
import pathlib, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
pathlib.Path(sys.argv[1], str(dist.get_rank())).write_text(str(time.monotonic_ns()))
dist.destroy_process_group()
"""


Start = dict[str, float]  # seconds from before the command: "barrier_s" and "end_s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--world", type=int, default=4, metavar="N", help="ranks (4)")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each (5)")
    parser.add_argument("--against", choices=["torch", "none"], default="torch")


def run(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """Start both in turns."""
    world_size, rounds = arguments.world, arguments.rounds
    if world_size < 1 or rounds < 1:
        raise UsageError("--world and --rounds start at 1")
    launchers = {"barepp.launch": launch_barepp}
    if arguments.against == "torch":
        launchers["torchrun"] = launch_torch
    show(f"\n{world_size} ranks, {rounds} starts of each, in turns")
    for launch in launchers.values():
        launch(world_size)  # the first start fills the caches of the file system
    turns = [{who: launch(world_size) for who, launch in launchers.items()} for _ in range(rounds)]
    rows = [_row(who, turns) for who in launchers]
    for line in table([_line(row) for row in rows]):
        show(line)
    return {"world_size": world_size, "rounds": rounds, "rows": rows}


def launch_barepp(world_size: int) -> Start:
    """Start ranks with `python -m barepp.launch`."""
    return time_start(["barepp.launch", "--world", str(world_size)], BAREPP_SCRIPT, world_size)


def launch_torch(world_size: int) -> Start:
    """Start ranks with torchrun, on one host."""
    flags = ["--standalone", "--nproc-per-node", str(world_size)]
    return time_start(["torch.distributed.run", *flags], TORCH_SCRIPT, world_size)


def time_start(module: Sequence[str], script: str, world_size: int) -> Start:
    """Run `python -m MODULE SCRIPT` to its end, and read what its ranks wrote."""
    with tempfile.TemporaryDirectory(prefix="barepp-bench-") as name:
        folder = Path(name)
        (folder / "script.py").write_text(script)
        told = folder / "told"
        told.mkdir()
        began_ns = time.monotonic_ns()
        process = subprocess.Popen(
            [sys.executable, "-m", *module, str(folder / "script.py"), str(told)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=LIMIT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchError(f"{module[0]} has not ended after {LIMIT_S:g} s") from None
            raise
        end_ns = time.monotonic_ns()
        times_ns = [int(path.read_text()) for path in told.iterdir()]
        if process.returncode != 0 or len(times_ns) != world_size:
            raise BenchError(
                f"{module[0]} ended with {process.returncode}, and {len(times_ns)} of {world_size} "
                f"ranks came to the barrier:\n{said.decode(errors='replace')[-TAIL:]}".rstrip()
            )
        return {"barrier_s": (max(times_ns) - began_ns) / 1e9, "end_s": (end_ns - began_ns) / 1e9}


def _row(who: str, turns: Sequence[dict[str, Start]]) -> dict[str, Any]:
    row: dict[str, Any] = {"command": who}
    for what in ("barrier_s", "end_s"):
        row[what] = spread([turn[who][what] for turn in turns])
        if who != "torchrun" and "torchrun" in turns[0]:
            mine, theirs = ([[turn[each][what]] for turn in turns] for each in (who, "torchrun"))
            row[f"{what}_times_torch"] = ratio(mine, theirs)
    return row


def _line(row: dict[str, Any]) -> dict[str, str]:
    line = {"": row["command"]}
    for what, title in (("barrier_s", "to the barrier, s"), ("end_s", "to the end, s")):
        line[title] = f"{row[what]['median']:.2f} [{row[what]['low']:.2f} {row[what]['high']:.2f}]"
        over = row.get(f"{what}_times_torch")
        line["x torchrun" + " " * (what == "end_s")] = f"{over['median']:.2f}" if over else ""
    return line
