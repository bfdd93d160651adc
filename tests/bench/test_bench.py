"""The benchmarks: their arithmetic, that they end cleanly, and one small run of each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
from jobs import LIMIT_S, MARK, ROOT, marked, nothing_left

from barepp.bench import __main__ as command_line
from barepp.bench import bubbles as bubbles_bench
from barepp.bench import start as start_bench
from barepp.bench import training
from barepp.bench.case import Case
from barepp.bench.figures import ratio, spread, table
from barepp.bench.teams.barepp_rank import BareppRank
from barepp.bench.teams.conductor import Answers, BenchError, Conductor, environment, step_times
from barepp.bench.teams.member import serve
from barepp.bench.teams.one_process import OneProcess
from barepp.train.stage.seeding import PROCESS_LOCK
from barepp.worker.world import World
from transport.inproc import InprocHub, InprocTransport

TINY = Case(layers=3, hidden=8, batch=6, microbatches=3)


# -- figures --------------------------------------------------------------------------------------


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3, "low": 2, "high": 4}
    assert spread([7.0]) == {"median": 7, "low": 7, "high": 7}


def test_a_ratio_pairs_the_rounds_so_that_a_slow_round_cancels_out() -> None:
    ours = [[1.0, 1.0], [50.0, 50.0], [1.0, 1.0]]
    theirs = [[2.0, 2.0], [100.0, 100.0], [2.0, 2.0]]
    assert ratio(ours, theirs) == {"median": 0.5, "low": 0.5, "high": 0.5}


def test_a_table_is_aligned_and_says_nothing_where_nothing_is() -> None:
    assert table([{"": "a", "x": "1"}, {"": "long", "y": "22"}]) == [
        "      x   y",
        "a     1",
        "long     22",
    ]


# -- steps and who computes what ------------------------------------------------------------------


def test_a_step_ends_with_its_last_rank_and_no_time_is_lost_or_counted_twice() -> None:
    first, second = [10, 30, 47, 60], [20, 25, 55, 58]
    times = step_times([{"ends": first}, {"ends": second}])
    assert times == [pytest.approx(ns / 1e9) for ns in (10, 25, 5)]
    assert math.fsum(times) == pytest.approx((60 - 20) / 1e9)


def test_whoever_computes_another_gradient_is_not_compared() -> None:
    same = {("alone", "one process"): [{"gradient_square": 2.0}]}
    agreeing = {("barepp", "1f1b"): [{"gradient_square": 1.5}, {"gradient_square": 0.5001}]}
    training.check_same_gradients({**same, **agreeing})
    for wrong in (1.9, float("nan")):
        other = {("torch", "1f1b"): [{"gradient_square": wrong}]}
        with pytest.raises(BenchError, match=r"torch 1f1b computed .* cannot be compared"):
            training.check_same_gradients({**same, **agreeing, **other})


def test_all_workers_train_the_same_case() -> None:
    """The reference, barepp's pipeline and the stages of the ideal: one gradient, to rounding."""
    alone = OneProcess()
    alone.build(TINY)
    expected = alone.train("one process", 2)["gradient_square"]
    assert expected > 0
    ours = BareppRank(World(InprocTransport(InprocHub(1), 0)))
    ours.build(TINY)
    assert ours.train("1f1b", 2)["gradient_square"] == pytest.approx(expected, rel=1e-5)
    costs = alone.costs(2, 3)
    assert [len(costs[name]) for name in ("forward", "backward")] == [3, 3]
    assert all(len(row) == 2 and min(row) > 0 for rows in costs.values() for row in rows)


# -- teams ----------------------------------------------------------------------------------------


def test_a_team_that_breaks_says_what_it_printed_and_leaves_nothing() -> None:
    with (
        nothing_left(),
        pytest.raises(BenchError, match=r"broken team broke(?s:.*)no_such_module"),
        Conductor() as conductor,
    ):
        folder = conductor.folder
        conductor.team("broken", 1).start("no_such_module")
        conductor.gather()
    assert not folder.exists()


def test_a_team_that_breaks_in_its_turn_says_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member ends without an answer while the other waits: both are gone afterwards."""
    (tmp_path / "member_of_a_test.py").write_text(
        "import sys\n"
        "from multiprocessing.connection import Client\n"
        "conductor = Client(sys.argv[2])\n"
        "conductor.send(int(sys.argv[1]))\n"
        "conductor.recv()\n"
        "if sys.argv[1] == '1':\n"
        "    sys.exit('the reason')\n"
        "conductor.recv()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = r"doomed team broke: rank 1 of it has ended(?s:.*)the reason"
    with nothing_left(), pytest.raises(BenchError, match=words), Conductor() as conductor:
        team = conductor.team("doomed", 2)
        for rank in ("0", "1"):
            team.start("member_of_a_test", rank)
        conductor.gather()
        team.call("train")


def test_nobody_computes_with_more_threads_than_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # barepp would heed it
    assert environment()["OMP_NUM_THREADS"] == "1"


def test_a_member_whose_conductor_is_gone_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "conductor")
    with Listener(path) as listening:
        member = threading.Thread(target=serve, args=(path, 1, OneProcess()))
        member.start()
        with listening.accept() as conductor:
            assert conductor.recv() == 1
            conductor.send(("build", (TINY,), {}))
            assert conductor.recv() is None
    member.join(30)
    assert not member.is_alive()


class InThisProcess:
    """A conductor whose team are ranks in threads of this process: a benchmark costs no start."""

    def start_barepp(self, world_size: int, *flags: str) -> InThisProcess:
        hub = InprocHub(world_size)
        # Threads share torch's generator: layers are built in turns, or their weights are mixed up.
        worlds = [World(each, random_lock=PROCESS_LOCK) for each in hub.transports()]
        self.ranks = [BareppRank(world) for world in worlds]
        return self

    def gather(self) -> None:
        pass

    def call(self, method: str, *arguments: Any, **options: str) -> Answers:
        with ThreadPoolExecutor(len(self.ranks)) as threads:
            calls = [
                threads.submit(getattr(rank, method), *arguments, **options) for rank in self.ranks
            ]
            return [call.result(LIMIT_S) for call in calls]

    def train(self, schedule: str, steps: int, **options: str) -> Answers:
        return self.call("train", schedule, steps + 1, **options)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def test_start_puts_its_figures_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers themselves are run below; here they answer at once."""
    monkeypatch.setattr(
        start_bench, "launch_barepp", lambda world: {"barrier_s": 1.0, "end_s": 1.5}
    )
    monkeypatch.setattr(start_bench, "launch_torch", lambda world: {"barrier_s": 4.0, "end_s": 5.0})
    parser = argparse.ArgumentParser()
    start_bench.add_arguments(parser)
    lines: list[str] = []
    results = start_bench.run(parser.parse_args(["--rounds", "3"]), lines.append)
    ours, theirs = results["rows"]
    assert ours["barrier_s_times_torch"]["median"] == 0.25
    assert ours["end_s_times_torch"]["median"] == 0.3
    assert theirs["barrier_s"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert "0.25" in lines[-2]


# -- the command line -----------------------------------------------------------------------------


def test_every_benchmark_of_the_list_is_a_module_that_says_what_it_does() -> None:
    for name in command_line.BENCHMARKS:
        with pytest.raises(SystemExit) as ended:
            command_line.main([name, "--help"])
        assert ended.value.code == 0


def test_flags_alone_are_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--sizes", "7"]) == 2
    assert "there is no size '7'; there are 128, 512, 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "there is no benchmark 'nonsense'"),
        (["training", "--ranks", "two"], "--ranks is numbers"),
        (["training", "--ranks", "1"], "--ranks start at 2"),
        (["training", "--schedules", "2f2b"], "2f2b"),
        (["training", "--schedules", "zb_v"], "two stages on each rank"),
        (["start", "--world", "0"], "--world and --rounds start at 1"),
        (["bubbles", "--ranks", "0"], "start at 1"),
        (["bubbles", "--forward-ms", "0"], "--forward-ms 0 --heavy 1: the first has to be above 0"),
        (["bubbles", "--schedules", "1f1b,2f2b"], "2f2b"),
        (["growth", "--sizes", "0"], "--sizes and --rounds start at 1"),
        (["growth", "--sizes", "many"], "--sizes is numbers"),
    ],
)
def test_what_a_person_got_wrong_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_benchmark_that_broke_is_no_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: argparse.Namespace, show: object) -> dict[str, Any]:
        raise BenchError("the barepp team broke")

    monkeypatch.setattr(start_bench, "run", broken)
    assert command_line.main(["start"]) == 1
    assert "the barepp team broke" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start_bench, "run", None)
    assert command_line.main(["start", "--json", str(tmp_path / "missing" / "x.json")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command line for real; return its JSON, having checked that nothing is left."""
    mark = uuid.uuid4().hex
    temporary = folder / "tmp"
    temporary.mkdir()
    path = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "barepp.bench", *arguments, "--json", str(path)],
        env={**os.environ, MARK: mark, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    left = marked(mark)
    for process in left:
        process.kill()
    assert done.returncode == 0, done.stderr
    assert not left
    assert [p.name for p in temporary.iterdir() if not p.name.startswith("torchinductor_")] == []
    figures: dict[str, Any] = json.loads(path.read_text())
    assert figures["machine"]["cores"] >= 1
    return figures


def test_a_benchmark_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "barepp.bench", "bubbles", "--ranks", "2"],
        env={**os.environ, MARK: mark, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while len(marked(mark)) < 2 and time.monotonic() < deadline:  # itself, and the launcher
            time.sleep(0.02)
        process.terminate()
        assert process.wait(LIMIT_S) == 143
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not marked(mark)
        assert not list(temporary.glob("barepp-*"))
    finally:
        for left in marked(mark):
            left.kill()
        process.wait()


def test_training_beside_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.pipelining")
    flags = ["--sizes", "128", "--ranks", "2", "--rounds", "2", "--steps", "2"]
    figures = bench(tmp_path, *flags, "--schedules", "1f1b")
    assert figures["benchmark"] == "training"
    [measured] = figures["results"]
    assert measured["case"] == dataclasses.asdict(Case())
    alone, ours, theirs = measured["rows"]
    assert [row["team"] for row in measured["rows"]] == ["alone", "barepp", "torch"]
    for row in measured["rows"]:
        assert 0 < row["step_ms"]["low"] <= row["step_ms"]["median"] <= row["step_ms"]["high"]
        assert row["cpu_ms"]["median"] > 0
    assert alone["times_alone"]["median"] == 1
    assert ours["times_torch"]["median"] > 0
    assert ours["ideal_ms"] == theirs["ideal_ms"] > 0
    assert 0 < ours["bubble"] < 1
    for part in ("computing_ms", "waiting_ms", "moving_ms", "own_us_per_action"):
        assert len(ours[part]) == 2 and min(ours[part]) > 0
    assert [len(measured["costs_ms"][kind]) for kind in ("forward", "backward")] == [2, 2]


def bubbles_of(*flags: str) -> tuple[dict[str, Any], list[str]]:
    parser = argparse.ArgumentParser()
    bubbles_bench.add_arguments(parser)
    lines: list[str] = []
    return bubbles_bench.run(parser.parse_args(flags), lines.append), lines


@pytest.mark.xdist_group("timed")
def test_bubbles_of_stages_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubbles_bench, "Conductor", InThisProcess)
    flags = ["--ranks", "2", "--microbatches", "4", "--forward-ms", "4", "--rounds", "1"]
    results, lines = bubbles_of(*flags, "--steps", "1")
    rows = results["rows"]
    assert [line.split()[0] for line in lines[1:7]] == [row["schedule"] for row in rows]
    # design.md has them: a forward, input gradients and weight gradients of 1 each.
    golden = {
        "naive": 24,
        "gpipe": 15,
        "1f1b": 15,
        "interleaved_1f1b": 13.5,
        "zb_h1": 13,
        "zb_v": 12.5,
    }
    assert [row["schedule"] for row in rows] == list(golden)
    for row in rows:
        makespan = golden[row["schedule"]]
        assert row["predicted_ms"] == pytest.approx(4 * makespan)
        assert row["bubble_predicted"] == pytest.approx(1 - 12 / makespan)
        assert row["step_ms"]["median"] > 0.99 * row["predicted_ms"]  # no sleep is shorter
        assert 0 < row["bubble"] < 1


def test_bubbles_with_a_heavy_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubbles_bench, "Conductor", InThisProcess)
    flags = ["--ranks", "1", "--microbatches", "2", "--forward-ms", "4", "--rounds", "1"]
    names = ["interleaved_1f1b", "zb_v"]
    heavy = ["--heavy", "5", "--schedules", ",".join(names)]
    results, lines = bubbles_of(*flags, "--steps", "1", *heavy)
    # A layer that does not sleep, two that do, one that does five times as long, and one more.
    for uniform, balanced in (results["rows"][:2], results["rows"][2:]):
        assert uniform["partition"] == [3, 2]
        assert sum(balanced["partition"]) == 5
        for row in (uniform, balanced):
            assert row["predicted_ms"] == pytest.approx(2 * 3 * 8)  # one rank: all layers, twice
            assert row["step_ms"]["median"] > 0.99 * row["predicted_ms"]
    assert [lines[-2].split(":")[0], lines[-1].split(":")[0]] == names == list(results["gains"])
    assert all(gain["predicted"] == pytest.approx(1) for gain in results["gains"].values())


def test_a_prediction_knows_which_layer_is_heavy() -> None:
    case = Case(layers=4, microbatches=1, sleep_s=0.001, heavy=5)
    assert case.sleeps_s() == [0, 0.001, 0.001, 0.005, 0.001]
    seconds = [getattr(build(), "seconds", 0) for build in case.builders()]
    assert seconds == case.sleeps_s()
    slow, _ = bubbles_bench.predict("gpipe", 2, dataclasses.replace(case, microbatches=9), [2, 3])
    fast, _ = bubbles_bench.predict("gpipe", 2, dataclasses.replace(case, microbatches=9), [3, 2])
    assert (slow, fast) == (pytest.approx(3 * (1 + 9 * 7)), pytest.approx(3 * (2 + 9 * 6)))


def bubbles(**rows: tuple[float, float, float, float]) -> dict[str, bool]:
    return bubbles_bench.bounds(
        [
            {
                "schedule": name,
                "predicted_ms": predicted_ms,
                "step_ms": {"median": step_ms},
                "bubble_predicted": predicted,
                "bubble": bubble,
            }
            for name, (predicted_ms, step_ms, predicted, bubble) in rows.items()
        ]
    )


def test_the_bounds_of_the_bubbles() -> None:
    fine = bubbles(
        a=(30, 33, 0.2, 0.219), b=(20, 21, 0.1, 0.081), c=(30.0000000001, 33.9, 0.2, 0.2)
    )
    assert list(fine.values()) == [True, True, True]
    assert [words.split(" (")[0] for words in fine][1:] == ["b < a in step time", "a = c"]
    for rows, holds in (
        ({"a": (30, 33, 0.2, 0.221), "b": (20, 21, 0.1, 0.1)}, [False, True]),
        ({"a": (30, 33, 0.2, 0.179), "b": (20, 21, 0.1, 0.1)}, [False, True]),
        ({"a": (30, 33, 0.2, 0.2), "b": (20, 34, 0.1, 0.1)}, [True, False]),
        ({"a": (30, 33, 0.2, 0.2), "b": (30, 34.1, 0.2, 0.2)}, [True, False]),
    ):
        assert list(bubbles(**rows).values()) == holds


def test_growth_of_the_rendezvous(tmp_path: Path) -> None:
    rows = bench(tmp_path, "growth", "--sizes", "1,8", "--rounds", "1")["rows"]
    assert [row["processes"] for row in rows] == [1, 8]
    for row in rows:
        parts = [row["attach_ms"], row["join_ms"], row["barrier_ms"]]
        assert min(parts) > 0
        assert row["us_each"] == pytest.approx(1e3 * sum(parts) / row["processes"])


def test_starts_are_timed_until_the_last_rank_is_through() -> None:
    with nothing_left(), ThreadPoolExecutor(2) as threads:
        ours = threads.submit(start_bench.launch_barepp, 2)
        theirs = threads.submit(start_bench.launch_torch, 1)
    for start in (ours.result(), theirs.result()):
        assert 0 < start["barrier_s"] <= start["end_s"]


def test_a_start_lasts_until_its_last_rank() -> None:
    script = """
import pathlib, sys, time
for rank in range(3):
    time_ns = time.monotonic_ns() + rank * 10**9
    pathlib.Path(sys.argv[1], str(rank)).write_text(str(time_ns))
"""
    assert 2 < start_bench.time_start(["cProfile"], script, 3)["barrier_s"] < 60


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(BenchError, match=r"ended with 1(?s:.*)ZeroDivisionError"):
        start_bench.time_start(["cProfile"], "1 / 0", 1)
    with pytest.raises(BenchError, match="ended with 0, and 0 of 1 ranks came to the barrier"):
        start_bench.time_start(["cProfile"], "", 1)
