"""The figures of one case of `training`, from everybody's turns; and the table for a person."""

from __future__ import annotations

import os
import statistics
from typing import Any, Final

from barepp.actions import Order
from barepp.bench.case import Case
from barepp.bench.figures import flat, medians, ratio, spread, table
from barepp.bench.teams import step_times
from barepp.schedules import make_schedule
from barepp.simulate import Costs, simulate

ALONE: Final = "alone"  # the team of one process, and its only way to train
ONE_PROCESS: Final = "one process"

Answers = list[dict[str, Any]]  # of one turn, by rank
Turns = dict[tuple[str, str], list[Answers]]  # (team, schedule): round by round


def figures(
    case: Case, world_size: int, turns: Turns, forward_s: list[float], backward_s: list[float]
) -> dict[str, Any]:
    """Put the figures of one case together; the last two are what an action of each stage costs."""
    times = {entry: [step_times(answers) for answers in rounds] for entry, rounds in turns.items()}
    alone = times[ALONE, ONE_PROCESS]
    alone_cpu_ms = [_cpu_ms(answers) for answers in turns[ALONE, ONE_PROCESS]]
    rows = []
    for (team, schedule), rounds in turns.items():
        mine = times[team, schedule]
        row: dict[str, Any] = {
            "team": team,
            "schedule": schedule,
            "step_ms": spread([1e3 * value for value in flat(mine)]).to_record(),
            "times_alone": ratio(mine, alone).to_record(),
            "cpu_ms": spread([_cpu_ms(answers) for answers in rounds]).to_record(),
        }
        if team != ALONE:
            order = make_schedule(schedule, world_size, case.microbatches, world_size).order
            row |= _ideal(row["step_ms"]["median"], order, forward_s, backward_s)
            added_ms = row["cpu_ms"]["median"] - statistics.median(alone_cpu_ms)
            row["added_us_per_action"] = 1e3 * added_ms / sum(map(len, order))
        if team == "barepp":
            row |= _inside(rounds, order)
            if ("torch", schedule) in times:
                row["times_torch"] = ratio(mine, times["torch", schedule]).to_record()
        rows.append(row)
    return {
        "case": case.to_record(),
        "ranks": world_size,
        "rounds": len(alone),
        "costs_ms": {
            "forward": [1e3 * cost for cost in forward_s],
            "backward": [1e3 * cost for cost in backward_s],
        },
        "rows": rows,
    }


def _cpu_ms(answers: Answers) -> float:
    used_s: float = sum(answer["cpu_s"] for answer in answers)
    return 1e3 * used_s / len(answers[0]["ends"])


def _ideal(
    step_ms: float, order: Order, forward_s: list[float], backward_s: list[float]
) -> dict[str, Any]:
    halves = [cost / 2 for cost in backward_s]  # a full backward takes both
    costs = Costs(forward=forward_s, backward_input=halves, backward_weight=halves)
    timeline = simulate(order, len(forward_s), costs)
    shared_s = float(timeline.busy) / len(os.sched_getaffinity(0))
    ideal_ms = 1e3 * max(float(timeline.makespan), shared_s)
    return {
        "ideal_ms": ideal_ms,
        "times_ideal": step_ms / ideal_ms,
        "makespan_ms": 1e3 * float(timeline.makespan),
        "bubble_ideal": timeline.bubble,
    }


def _inside(rounds: list[Answers], order: Order) -> dict[str, Any]:
    """Return where barepp's step time goes, for each rank: medians over the rounds."""
    summaries = [answers[0] for answers in rounds]
    inside: dict[str, Any] = {"bubble": statistics.median(s["bubble"] for s in summaries)}
    for part in ("computing_ms", "waiting_ms", "moving_ms"):
        inside[part] = medians([summary[part] for summary in summaries])
    inside["own_us_per_action"] = [
        1e3 * moving / len(actions)
        for moving, actions in zip(inside["moving_ms"], order, strict=True)
    ]
    return inside


def report(measured: dict[str, Any]) -> list[str]:
    """Return the table for a person."""
    case, ranks = Case(**measured["case"]), measured["ranks"]
    lines = [_line(row) for row in measured["rows"]]
    return ["", f"{case}, {ranks} ranks", *table(lines)]


def _line(row: dict[str, Any]) -> dict[str, str]:
    step = row["step_ms"]
    line = {
        "": row["schedule"] if row["team"] == ALONE else f"{row['schedule']} {row['team']}",
        "step ms": f"{step['median']:.2f}",
        "[quartiles]": f"[{step['low']:.2f} {step['high']:.2f}]",
        "x torch": f"{row['times_torch']['median']:.2f}" if "times_torch" in row else "",
        "x alone": f"{row['times_alone']['median']:.2f}",
        "ideal ms": f"{row['ideal_ms']:.2f}" if "ideal_ms" in row else "",
        "x ideal": f"{row['times_ideal']:.2f}" if "times_ideal" in row else "",
        "CPU ms": f"{row['cpu_ms']['median']:.2f}",
        "+us/act": f"{row['added_us_per_action']:.0f}" if "added_us_per_action" in row else "",
    }
    if "bubble" in row:
        parts = (row["computing_ms"], row["waiting_ms"], row["moving_ms"])
        line |= {
            "bubble": f"{row['bubble']:.0%}",
            "comp": f"{statistics.mean(parts[0]):.2f}",
            "wait": f"{statistics.mean(parts[1]):.2f}",
            "move": f"{statistics.mean(parts[2]):.2f}",
            "us/act": f"{statistics.mean(row['own_us_per_action']):.0f}",
        }
    return line
