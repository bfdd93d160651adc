"""A job that hangs is found, proven, explained and ended; a healthy one that is slow is not."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jobs import LIMIT_S, launch, loaded_machine, nothing_left, run_job
from transport_worlds import eventually

import barepp
from barepp.launch.hang_detector import HangDetector, Said
from barepp.monitor.stacks import process_state
from barepp.worker.heartbeat import AT_BARRIER, Heartbeat, beat_of
from transport.errors import WaitTimeout
from transport.message.work import Traffic

# -- the watch itself: no process, no clock --------------------------------------------------------


def waiting(at: float, *peers: int, sent=None, received=None) -> Heartbeat:
    return Heartbeat(at, "waiting", peers, True, sent or {}, received or {})


def busy(at: float) -> Heartbeat:
    return Heartbeat(at, "computing 2F3", None, False, {}, {})


def watch_of(ranks: int, heartbeat_s: float = 10.0, timeout_s: float = 300.0) -> HangDetector:
    return HangDetector(range(ranks), heartbeat_s, timeout_s)


def tell_all(watch: HangDetector, beats: dict[int, Heartbeat], times: int = 3) -> None:
    for turn in range(times):
        for rank, beat in beats.items():
            at = turn * 0.5
            moved = dataclasses.replace(beat, made_at=at)
            watch.beat(rank, moved, at)


def test_a_circle_of_waiting_ranks_is_a_deadlock():
    watch = watch_of(3)
    tell_all(watch, {rank: waiting(0, (rank + 1) % 3) for rank in range(3)})
    failure = watch.check(1.0)
    assert failure is not None and failure.cause == "hang" and failure.rank == -1
    for rank in range(3):
        assert f"rank {rank} waits for rank {(rank + 1) % 3}" in failure.message


@pytest.mark.parametrize("times", [1, 2])
def test_fewer_than_three_equal_beats_prove_nothing(times):
    watch = watch_of(2)
    tell_all(watch, {0: waiting(0, 1), 1: waiting(0, 0)}, times)
    if times == 2:  # the spans of the two touch in one moment at best; here they do not
        watch.beat(1, waiting(0.1, 0, received={0: 1}), 0.6)
    assert watch.check(0.7) is None


def test_spans_that_do_not_overlap_prove_nothing():
    watch = watch_of(2)
    for at in (0.0, 0.5, 1.0):
        watch.beat(0, waiting(at, 1), at)
    for at in (1.1, 1.6, 2.1):  # rank 0 has not been heard of since 1.0: it may have gone on
        watch.beat(1, waiting(at, 0), at)
    assert watch.check(2.2) is None
    watch.beat(0, waiting(1.7, 1), 2.2)
    assert watch.check(2.3) is not None


def test_a_message_on_its_way_is_no_deadlock():
    watch = watch_of(2)
    tell_all(watch, {0: waiting(0, 1, sent={1: 5}), 1: waiting(0, 0, received={0: 4})})
    assert watch.check(1.0) is None
    tell_all(watch, {0: waiting(0, 1, sent={1: 5}), 1: waiting(0, 0, received={0: 5})})
    assert watch.check(1.0) is not None


def test_one_busy_rank_is_enough_to_go_on():
    watch = watch_of(3)
    tell_all(watch, {0: waiting(0, 1), 1: waiting(0, 0), 2: busy(0)})
    assert watch.check(1.0) is None


def test_a_rank_that_has_not_joined_is_enough_to_go_on():
    watch = watch_of(3)
    tell_all(watch, {0: waiting(0, 1), 1: waiting(0, 0)})
    watch.beat(2, None, 1.0)
    assert watch.check(1.0) is None


def test_what_a_rank_said_before_another_one_ended_proves_nothing():
    watch = watch_of(2)
    tell_all(watch, {0: waiting(0, 1), 1: waiting(0, 0, received={0: 4})})
    watch.beat(0, waiting(1.5, 1, sent={1: 5}), 1.5)
    watch.ended(0, 1.9)
    assert watch.check(2.0) is None


def test_what_a_rank_said_last_is_told_with_its_age():
    watch = watch_of(3)
    watch.beat(0, busy(1.0), 1.0)
    watch.beat(0, dataclasses.replace(busy(1.5), doing=""), 1.5)
    watch.beat(1, busy(1.5), 1.5)
    assert watch.ended(0, 1.74) == "in the script's own code, 0.2 s before"
    assert watch.ended(1, 2.0) == "computing 2F3, 0.5 s before"
    assert watch.ended(2, 2.0) == watch.ended(1, 2.0) == ""


def test_what_a_rank_says_is_told_with_the_time_when_it_said_so_first():
    watch = watch_of(2)
    assert watch.said(0) is None
    watch.beat(1, None, 0.7)
    assert watch.said(1) == Said(None, 0.7, 0.7)
    for at in (1.0, 1.5, 2.0):
        watch.beat(0, busy(at), at + 0.1)
    assert watch.said(0) == Said(busy(2.0), 1.0, 2.1)
    for at in (2.5, 3.0):  # the same words, but it has come further
        watch.beat(0, dataclasses.replace(busy(at), microbatches=0.5), at)
    said = watch.said(0)
    assert said is not None and (said.since, said.heard_at) == (2.5, 3.0)
    line = "  rank 0 is busy: computing 2F3"
    assert watch.graph() == watch.graph(now=5.0) == line
    assert watch.graph(now=7.0) == f"{line} (as it said 4.0 s ago)"
    watch.ended(0, 4.0)
    assert watch.said(0) is None


def test_a_barrier_that_all_have_reached_is_no_deadlock_but_one_that_a_rank_misses_is():
    watch = watch_of(2)
    tell_all(watch, {0: waiting(0, AT_BARRIER), 1: waiting(0, AT_BARRIER)})
    assert watch.check(1.0) is None
    watch = watch_of(2)
    tell_all(watch, {0: waiting(0, AT_BARRIER), 1: waiting(0, 0)})
    failure = watch.check(1.0)
    assert failure is not None and "rank 0 waits for all ranks" in failure.message


def test_silence_is_found_at_the_limit_and_names_the_rank_that_fell_silent_first():
    watch = HangDetector(range(3), 10.0, 300.0, lambda rank: f"is stopped, rank {rank}")
    for rank, at in ((0, 5.0), (1, 2.0), (2, 3.0)):
        watch.beat(rank, None, at)
    assert watch.next_deadline() == 12.0
    assert watch.check(11.9) is None
    failure = watch.check(13.5)
    assert failure is not None and failure.rank == 1
    assert "10 s" in failure.message and "is stopped, rank 1" in failure.message


def test_what_a_silent_rank_said_last_is_no_position_of_it():
    watch = watch_of(2, heartbeat_s=2.0)
    watch.beat(0, waiting(5.0, 1), 5.0)
    watch.beat(1, busy(1.0), 1.0)
    failure = watch.check(5.0)
    assert failure is not None and (failure.rank, failure.doing) == (1, "")
    assert failure.message.splitlines() == [
        "no sign of life for 2 s (last heard: computing 2F3)",
        "  rank 0 waits for rank 1: waiting",
    ]


def test_no_progress_names_the_busy_rank_and_counts_from_the_last_move():
    watch = watch_of(2, timeout_s=30.0)
    for at in (0.0, 0.5, 1.0):
        watch.beat(0, waiting(at, 1), at)
        watch.beat(1, busy(at), at)
    watch.beat(0, waiting(20.0, 1, received={1: 1}), 20.0)
    watch.beat(1, busy(20.0), 20.0)
    assert watch.check(28.0) is None
    for at in (27.0, 36.0, 45.0):
        watch.beat(0, waiting(at, 1, received={1: 1}), at)
        watch.beat(1, busy(at), at)
    assert watch.check(49.0) is None
    failure = watch.check(50.0)
    assert failure is not None and failure.rank == 1 and failure.doing == "computing 2F3"


def test_ranks_that_are_all_busy_wait_for_nobody_and_never_hang():
    watch = watch_of(2, timeout_s=1.0)
    for at in range(0, 100, 5):
        watch.beat(0, busy(at), at)
        watch.beat(1, busy(at), at)
        assert watch.check(at + 1.0) is None


def test_zero_switches_a_limit_off():
    watch = watch_of(2, heartbeat_s=0.0, timeout_s=0.0)
    watch.beat(0, waiting(0, 1), 0.0)
    watch.beat(1, busy(0), 0.0)
    assert watch.next_deadline() is None
    assert watch.check(1e9) is None


def test_a_beat_survives_its_record_and_nonsense_does_not():
    beat = Heartbeat(1.5, "computing", (1, 2), True, {1: 5}, {2: 7}, 100, 200, 3, 24.5)
    record = {**beat.to_record(), "waits_for": [1, 2], "sent": [[1, 5]], "received": [[2, 7]]}
    assert Heartbeat.from_record(record) == beat
    rng = random.Random(0)
    for _ in range(500):
        key = rng.choice(list(record))
        wrong = rng.choice([None, 1, "x", [1], [[1]], [["a", 1]], {}, [[1, 2, 3]], -1.0, True])
        changed = {**record, key: wrong}
        found = Heartbeat.from_record(changed)
        assert found is None or isinstance(found, Heartbeat)
    assert Heartbeat.from_record(None) is None
    assert Heartbeat.from_record({}) is None


def test_a_thread_of_the_script_that_does_not_wait_makes_the_rank_busy():
    me = threading.get_ident()
    others = {t.ident or 0: 3 for t in threading.enumerate()}
    assert beat_of("", lambda: others, Traffic()).waits_for == (3,)
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    assert beat_of("", lambda: {me: 3, **others}, Traffic()).waits_for is None
    event.set()
    thread.join()


def test_the_process_state_is_told_in_words():
    assert process_state(0) == ""


# -- real jobs -------------------------------------------------------------------------------------

WAIT_IN_A_CIRCLE = """
    import barepp
    with barepp.init() as world:
        world.recv((world.rank + 1) % world.world_size)
"""


def test_a_deadlock_is_reported_within_two_seconds_with_graph_and_stacks(tmp_path):
    job = run_job(tmp_path, WAIT_IN_A_CIRCLE, 3)
    assert job.code == 124
    assert job.failed["cause"] == "hang"
    assert job.seconds < 2 + 2  # two for the proof, two to start on a loaded machine
    for rank in range(3):
        assert f"rank {rank} waits for rank {(rank + 1) % 3}" in job.report
        assert f"the Python stack of rank {rank}:" in job.report
    assert job.report.count('script.py", line 4') == 3
    assert "Traceback" not in job.report


def test_a_rank_that_leaves_while_another_waits_for_it_is_a_deadlock(tmp_path):
    script = """
        import barepp
        with barepp.init() as world:
            if world.rank == 0:
                world.recv(1)
    """
    job = run_job(tmp_path, script, 3)
    assert job.code == 124
    assert "rank 0 waits for rank 1" in job.report
    assert "rank 1 waits for all ranks: leaving the world" in job.report


def test_a_wait_with_a_limit_is_left_to_itself(tmp_path):
    script = """
        import barepp
        from transport.errors import WaitTimeout
        with barepp.init() as world:
            try:
                world.recv(1 - world.rank, timeout=3)
            except WaitTimeout:
                print("went on")
    """
    job = run_job(tmp_path, script)
    assert job.code == 0 and job.said(0) == ["went on"]


def test_a_stopped_rank_is_found_within_the_heartbeat_limit(tmp_path):
    script = """
        import barepp, os, signal
        with barepp.init() as world:
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.barrier()
    """
    job = run_job(tmp_path, script, heartbeat_s=2.0)
    assert job.code == 124
    assert job.failed["rank"] == 1 and "is stopped" in job.failed["message"]
    assert job.seconds < 2 + 1 + 2
    assert "rank 0 waits for all ranks" in job.report


LOOP_FOR_EVER = """
    import barepp
    with barepp.init() as world:
        while world.rank == 1:
            pass
        world.recv(1)
"""


def test_a_rank_in_an_endless_loop_is_found_by_the_progress_limit(tmp_path):
    job = run_job(tmp_path, LOOP_FOR_EVER, timeout_s=2.0)
    assert job.code == 124 and job.failed["rank"] == 1
    assert "no progress" in job.failed["message"]
    assert "rank 1 did not end by itself" in job.report or "script.py" in job.report


def test_a_rank_that_keeps_pythons_lock_shows_its_stack_all_the_same(tmp_path):
    script = """
        import barepp, re
        with barepp.init() as world:
            if world.rank == 1:
                re.match("(a+)+$", "a" * 60 + "b")
            world.barrier()
    """
    job = run_job(tmp_path, script, heartbeat_s=2.0)
    assert job.code == 124 and job.failed["rank"] == 1
    assert "has not let go of Python's lock" in job.failed["message"]
    assert 'script.py", line 5' in job.report


def test_a_rank_that_has_kept_the_lock_for_a_second_shows_its_stack_too(tmp_path):
    """Nobody calls it silent yet."""
    script = """
        import barepp, re
        with barepp.init() as world:
            if world.rank == 1:
                re.match("(a+)+$", "a" * 60 + "b")
            world.recv(1 - world.rank)
    """
    job = run_job(tmp_path, script, timeout_s=1.0)
    assert job.code == 124 and "no progress" in job.failed["message"]
    assert 'script.py", line 5' in job.report


def test_the_grace_begins_when_the_stacks_have_been_taken(tmp_path, monkeypatch):
    def slowly(pipes):
        threading.Event().wait(2.5)
        return dict.fromkeys(pipes, "here")

    monkeypatch.setattr("barepp.launch.job.take_stacks", slowly)
    job = run_job(tmp_path, WAIT_IN_A_CIRCLE, grace_s=2.0)
    assert job.code == 124 and "    here" in job.report
    assert "was killed" not in job.report


def test_a_rank_in_an_endless_c_call_is_found_by_the_progress_limit(tmp_path):
    """The call holds no lock of Python's: the rank still gives signs of life."""
    script = """
        import barepp, hashlib
        with barepp.init() as world:
            if world.rank == 1:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
            world.recv(1 - world.rank)
    """
    job = run_job(tmp_path, script, timeout_s=2.0)
    assert job.code == 124 and job.failed["rank"] == 1
    assert "no progress" in job.failed["message"]
    assert 'script.py", line 5' in job.report
    assert "rank 1 is busy: in the script's own code" in job.report


def test_an_idle_thread_does_not_switch_the_progress_limit_off(tmp_path):
    script = """
        import barepp, queue, threading
        threading.Thread(target=queue.Queue().get, daemon=True).start()
        with barepp.init() as world:
            world.recv(1 - world.rank)
    """
    job = run_job(tmp_path, script, timeout_s=2.0)
    assert job.code == 124 and "no progress" in job.failed["message"]


def test_a_wait_outside_of_the_main_thread_counts_too(tmp_path):
    script = """
        import barepp, threading
        with barepp.init() as world:
            thread = threading.Thread(target=world.recv, args=(1 - world.rank,))
            thread.start()
            thread.join()
    """
    job = run_job(tmp_path, script, timeout_s=2.0)
    assert job.code == 124 and "is blocked" in job.report


HEALTHY = """
    import barepp, os, signal, subprocess, torch, time
    with barepp.init() as world:
        world.barrier()
        if world.rank == 1:
            {}
        world.barrier()
        torch.manual_seed(0)
        pipe = barepp.Pipeline(world, barepp.mlp(3, 8), torch.nn.functional.cross_entropy)
        pipe.step(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))
        print(pipe.parameters_sha256())
"""


@pytest.mark.xdist_group("timed")
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param("pass", id="none"),
        pytest.param("time.sleep(6)", id="straggler"),
        pytest.param("sum(i for i in range(10**7)); sorted(range(3 * 10**6, 0, -1))", id="lock"),
        pytest.param(
            "subprocess.Popen(['sh', '-c', f'sleep 3; kill -CONT {os.getpid()}']); "
            "os.kill(os.getpid(), signal.SIGSTOP)",
            id="stopped for 3 s",
        ),
    ],
)
def test_the_defaults_do_not_kill_the_healthy(tmp_path, trouble):
    with loaded_machine():
        job = run_job(tmp_path, HEALTHY.format(trouble))
    assert job.code == 0, job.report
    assert job.said(0) == job.said(1) != []


def test_the_flags_reach_the_watch(tmp_path):
    job = launch(tmp_path, LOOP_FOR_EVER, "--world", "2", "--timeout", "2", "--heartbeat", "30")
    assert job.code == 124
    assert "no progress on any rank for 2 s" in job.report


# -- ranks that are threads -----------------------------------------------------------------------


def on_threads(function, ranks: int = 2, **limits: float):
    with nothing_left():
        return barepp.run(function, ranks, transport="inproc", **limits)


def wait_in_a_circle(world):
    world.recv((world.rank + 1) % world.world_size)


def miss_a_barrier(world):
    world.barrier() if world.rank else world.recv(1)


def leave_too_early(world):
    if world.rank == 0:
        world.recv(1)


@pytest.mark.parametrize("function", [wait_in_a_circle, miss_a_barrier, leave_too_early])
def test_threads_in_a_deadlock_are_told_within_two_seconds(function):
    began = time.monotonic()
    with pytest.raises(barepp.JobFailed, match="a deadlock: every rank waits") as caught:
        on_threads(function)
    assert time.monotonic() - began < 2 + 2
    failure = caught.value.failure
    assert (failure.cause, failure.rank) == ("hang", -1)
    assert "  rank 0 waits for rank 1: waiting for a message from rank 1" in failure.message


def test_a_thread_that_is_busy_while_another_waits_is_found_by_the_progress_limit():
    ready = threading.Event()

    def busy_or_waiting(world):
        ready.wait(LIMIT_S) if world.rank else world.recv(1)

    with pytest.raises(barepp.JobFailed, match="no progress on any rank for 1 s") as caught:
        barepp.run(busy_or_waiting, 2, transport="inproc", timeout=1.0, grace=0.1)
    assert caught.value.failure.rank == 1
    ready.set()
    eventually(lambda: not any(t.name == "barepp-rank-1" for t in threading.enumerate()))


def test_threads_that_can_go_on_are_left_alone():
    """One is slow, one waits with a limit, and one has a helper that sends after a while."""

    def slow(world):
        if world.rank:
            time.sleep(2.5)
            world.send(torch.ones(1), 0)
        else:
            world.recv(1)

    def with_limit(world):
        with pytest.raises(WaitTimeout):
            world.recv(1 - world.rank, timeout=2.5)

    def helped(world):
        if world.rank:
            helper = threading.Timer(2.5, world.send, (torch.ones(1), 0))
            helper.start()
            world.recv(0)
            helper.join()
        else:
            world.recv(1)
            world.send(torch.ones(1), 1)

    with nothing_left(), ThreadPoolExecutor() as pool:
        works = [
            pool.submit(barepp.run, function, 2, transport="inproc")
            for function in (slow, with_limit, helped)
        ]
        for work in works:
            work.result(LIMIT_S)
