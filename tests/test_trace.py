"""What a rank records of itself stays small, however long it runs."""

from __future__ import annotations

from barepp.trace import KEPT_STEPS, Recorder, summarise
from barepp.world import World
from transport.inproc import InprocHub, InprocTransport


def test_a_long_run_keeps_its_last_steps_alone():
    recorder = Recorder()
    for number in range(3 * KEPT_STEPS):
        recorder.begin_step()
        recorder.add(number, 2 * number)
        recorder.end_step()
    assert len(recorder.steps) == KEPT_STEPS
    assert recorder.steps[-1].compute == 3 * KEPT_STEPS - 1
    world = World(InprocTransport(InprocHub(1), 0))
    summary = summarise(world, recorder, peak_in_flight=3)
    assert summary.peak_in_flight == [3]
    assert 2.4 * KEPT_STEPS < summary.computing_ms[0] * 1e6 < 2.6 * KEPT_STEPS


def test_the_first_step_warms_up_unless_it_is_the_only_one():
    world = World(InprocTransport(InprocHub(1), 0))
    recorder = Recorder()
    assert summarise(world, recorder, 0).step_ms == 0.0
    for computed, expected in ((5_000_000, 5.0), (1_000_000, 1.0), (3_000_000, 2.0)):
        recorder.begin_step()
        recorder.add(computed, 0)
        recorder.end_step()
        assert summarise(world, recorder, 0).computing_ms == [expected]
