"""Ranks that share cores are scheduled as a batch; those that have one each are left alone."""

from __future__ import annotations

import os
import threading

import pytest

from barepp import run
from barepp.worker.process import compute_in_turns
from barepp.worker.world import World

pytestmark = pytest.mark.xdist_group("timed")
CORES = len(os.sched_getaffinity(0))


def policies(world: World) -> dict[str, int]:
    """Return the policy of the thread that computes and of the one that moves bytes meanwhile."""
    found = {}
    for thread in threading.enumerate():
        assert thread.native_id is not None
        found[thread.name.rstrip("0123456789")] = os.sched_getscheduler(thread.native_id)
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_that_share_cores_do_not_push_each_other_off(shared):
    if not shared and CORES < 2:
        pytest.skip("one core: ranks always share it")
    for found in run(policies, CORES + 1 if shared else 2):
        expected = os.SCHED_BATCH if shared else os.SCHED_OTHER
        assert found["MainThread"] == found["barepp-progress-"] == expected


def test_a_policy_that_was_chosen_stays():
    found = []

    def idle() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        compute_in_turns(CORES + 1)
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=idle)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE]


def test_where_the_system_forbids_it_all_stays_as_it_is(monkeypatch):
    def forbidden(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    compute_in_turns(CORES + 1)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
