"""Times of a device: known later, right to the microsecond, and never waited for in a step."""

from __future__ import annotations

import gc
import json
import re
import weakref
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice, FakeEvent
from torch import nn
from traces import check_format

import barepp
from barepp.timeline import main as show
from barepp.trace.analysis import copies, measured, rank_times
from barepp.trace.chrome_reader import read_trace
from barepp.trace.clock_sync import on_rank_0s_clock
from barepp.trace.collect import told_weakly, write_trace
from barepp.trace.device_clock import HOST_CLOCK, DeviceClock, clock_of, took_s
from barepp.trace.device_recorder import MOST_DEFERRED, DeviceRecorder, recorder_for
from barepp.trace.optimizer_hooks import watch_optimizers
from barepp.trace.recorder import Recorder
from barepp.trace.step_breakdown import RankTimes
from barepp.trace.summary import summarise
from transport.device import Copy

MS = 1_000_000
US = 1_000


def test_the_cpus_clock_is_perf_counter_itself() -> None:
    """What an action costs on the CPU is what it always did: four readings, and no call of ours."""
    import time

    assert clock_of(None) is clock_of(torch.device("cpu")) is HOST_CLOCK
    assert HOST_CLOCK.mark is HOST_CLOCK.last is time.perf_counter_ns
    with barepp.init() as world:
        assert type(recorder_for(world)) is Recorder


def test_a_mark_is_when_the_device_came_there_and_not_when_the_host_asked() -> None:
    device = FakeDevice()
    clock = DeviceClock(device.event, device.host)
    marks = [clock.mark()]
    for took in (5, 3, 7):
        device.pass_host(10 * US)  # Python, far ahead of the device
        device.give(took * MS)
        marks.append(clock.mark())
    assert not clock.passed(marks[-1]) and device.waits == 0
    when = clock.settle(marks[-1])
    between = [b - a for a, b in pairwise(marks)]
    assert between == [1, 1, 1]
    spans = [when[b] - when[a] for a, b in pairwise(marks)]
    assert spans[1:] == [3 * MS, 7 * MS]
    assert spans[0] == 5 * MS + 10 * US  # the device had nothing to do until it was given this
    assert clock.last() == marks[-1] and clock.settle(marks[-1]) == {}


def test_digits_last_over_hours_and_events_are_used_again() -> None:
    """A float32 of milliseconds since the start would be 0.25 s coarse after an hour or so."""
    device = FakeDevice()
    clock = DeviceClock(device.event, device.host)
    first = clock.mark()
    start = clock.settle(first)[first]
    for _ in range(5000):
        device.give(1_000_003 * US)
        mark = clock.mark()
        end = clock.settle(mark)[mark]
    assert abs((end - start) - 5000 * 1_000_003 * US) < 1 * MS  # of 83 minutes
    assert device.events < 10


def test_the_devices_clock_beside_the_hosts_whatever_it_drifts() -> None:
    device = FakeDevice(drift=1 + 50e-6)
    clock = DeviceClock(device.event, device.host)
    device.give(3 * MS)
    readings = [clock.compare()]
    seen = []
    for _ in range(100):
        device.pass_host(20 * MS)
        device.give(100 * MS)
        mark = clock.mark()
        when = clock.settle(mark)[mark]
        seen.append((when, device.free_ns))
    readings.append(clock.compare())
    assert all(reading.error <= 1 for reading in readings)
    drifted = seen[-1][0] - seen[0][0] - (seen[-1][1] - seen[0][1])
    assert abs(drifted) > 400 * US  # in ten seconds
    for on_device, on_host in seen:
        assert abs(on_rank_0s_clock(on_device, readings) - on_host) < 20 * US


def test_what_some_work_takes_is_what_the_device_takes() -> None:
    device = FakeDevice()
    clock = DeviceClock(device.event, device.host)
    assert took_s(clock, lambda: device.give(4 * MS)) == pytest.approx(0.004)
    assert took_s(HOST_CLOCK, lambda: None) < 1.0


# -- a pipeline on such a device ------------------------------------------------------------------

FORWARD, BACKWARD, PYTHON = 4 * MS, 9 * MS, 50 * US


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device):
        ctx.device = device
        device.pass_host(PYTHON)
        device.give(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.device.pass_host(PYTHON)
        ctx.device.give(BACKWARD)
        return gradient.clone(), None


class Working(nn.Module):
    """A layer whose work is all on the fake device."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Work.apply(x * self.weight, self.device)


Sent = dict[tuple[int, int, int], list[int]]  # when each message was there to be copied


def let_streams_wait(world: barepp.World, device: FakeDevice, sent: Sent) -> None:
    """Let the device come to what follows a receive after the sender's came to its send."""
    isend, irecv, rank = world.transport.isend, world.transport.irecv, world.rank

    class Ready:
        def __init__(self, key: tuple[int, int, int]) -> None:
            self.key = key

        def wait(self) -> None:
            device.free_ns = max(device.free_ns, sent[self.key].pop(0))

    def sends(message, dst, tag=0):
        sent.setdefault((rank, dst, tag), []).append(max(device.free_ns, device.now_ns))
        return isend(message, dst, tag)

    def receives(src, tag=0, **more):
        work = irecv(src, tag, **more)
        work.ready = Ready((src, rank, tag))
        return work

    world.transport.isend, world.transport.irecv = sends, receives


def pipeline_on(world: barepp.World, device: FakeDevice) -> barepp.Pipeline:
    builders = [partial(Working, device)] * world.world_size
    pipe = barepp.Pipeline(world, builders, nn.MSELoss(), num_microbatches=4)
    pipe.recorder = DeviceRecorder(DeviceClock(device.event, device.host))
    return pipe


BATCH = torch.ones(8, 3), torch.zeros(8, 3)


def test_a_step_never_waits_for_the_device_and_its_times_are_the_devices() -> None:
    device = FakeDevice()
    with barepp.init() as world:
        pipe = pipeline_on(world, device)
        for _ in range(3):
            pipe.step(*BATCH)
        assert device.waits == 0
        assert len(pipe.recorder.steps) == 0  # the host is 3 steps ahead, and does not wait
        summary = summarise(world, pipe.recorder, pipe.peak_in_flight)
    assert len(pipe.recorder.steps) == 3
    [times] = summary.ranks
    assert times.computing_ms == pytest.approx(4 * (FORWARD + BACKWARD) / MS, abs=1e-3)
    assert summary.step_ms == pytest.approx(times.computing_ms, abs=0.1)
    assert summary.bubble == pytest.approx(0.0, abs=0.01)
    assert isinstance(times, RankTimes) and times.actions == 8


def test_steps_that_the_device_has_done_are_known_without_asking() -> None:
    device = FakeDevice()
    with barepp.init() as world:
        pipe = pipeline_on(world, device)
        for number in range(5):
            pipe.step(*BATCH)
            device.pass_host(1000 * MS)  # as `loss.item()` would let it
            assert len(pipe.recorder.steps) == number
    # Blocks for none of them: each was over. (`synchronize` returns at once.)
    assert device.now_ns > device.free_ns
    most = 2 * 8 + 10
    assert device.events < 3 * most


def test_a_long_evaluation_keeps_a_bounded_number_of_events() -> None:
    def work(world: barepp.World) -> int:
        device = FakeDevice()
        pipe = pipeline_on(world, device)
        for _ in range(2 * MOST_DEFERRED):
            pipe.forward(torch.ones(1, 3) if world.rank == 0 else None)
            device.pass_host(20 * MS)
        return device.events

    assert max(barepp.run(work, 2, transport="inproc")) < 3 * MOST_DEFERRED


def test_a_traced_run_is_a_file_with_the_copies_in_rows_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sent = tmp_path / "trace.json", {}

    def work(world: barepp.World) -> None:
        device = FakeDevice(offset_ns=0)
        pipe = pipeline_on(world, device)
        pipe.trace()
        let_streams_wait(world, device, sent)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        for _ in range(3):
            pipe.zero_grad()
            pipe.step(*BATCH)
            # Half of a copy lies within the last action, half after it.
            end, middle = FakeEvent(device), FakeEvent(device)
            middle.at_ns = device.free_ns - 1 * MS
            end.at_ns = device.free_ns + 1 * MS
            pipe.recorder.add_copy(Copy("receive", 3 << 20, middle, end))
            optimizer.step()
            device.pass_host(500 * MS)
        write_trace(world, pipe.recorder, path)

    barepp.run(work, 2, transport="inproc")
    check_format(json.loads(path.read_text()))
    trace = read_trace(path)
    for rank in trace.ranks:
        assert len(rank.actions) == 3 * 8 and len(rank.steps) == 3
        assert [note.name for note in rank.notes if note.step is None] == ["optimizer (SGD)"] * 3
        assert len(rank.copies) == 3 and {copy.nbytes for copy in rank.copies} == {3 << 20}
        for span in rank.actions:
            took = FORWARD if span.action.kind.value == "F" else BACKWARD
            # An idle device waits until Python has given it the work.
            assert -2 * US < span.end - span.start - took < PYTHON + 2 * US
            assert span.asked <= span.start == span.arrived and span.gave == span.end
    for times in rank_times(trace):
        assert times.computing_ms == pytest.approx(4 * (FORWARD + BACKWARD) / MS, abs=0.5)
    found = copies(trace)
    assert (found.copies, found.nbytes) == (4, 4 * (3 << 20))  # the first step does not count
    assert found.total_ns == pytest.approx(4 * 2 * MS, rel=0.01)
    assert 0.4 < found.hidden_ns / found.total_ns < 0.6
    assert measured(trace, 1).timeline.spans
    assert show([str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"copies 2 a step on GPUs, of 3\.00 MiB and 2000 µs in the mean", shown)
    assert "on their way for" not in shown  # nobody knows that on a GPU


def test_an_optimizer_of_other_weights_leaves_the_clock_alone() -> None:
    """Of ranks that are threads each sees all optimizers, and a clock is its own thread's alone."""
    device = FakeDevice()
    recorder = DeviceRecorder(DeviceClock(device.event, device.host))
    mine, others = nn.Linear(2, 2), nn.Linear(2, 2)
    watch_optimizers(recorder, mine.parameters())
    recorder.tracing = True
    torch.optim.SGD(others.parameters(), lr=0.1).step()
    assert device.events == 0
    torch.optim.SGD(mine.parameters(), lr=0.1).step()
    recorder.settle()
    assert [note.name for note in recorder.outside] == ["optimizer (SGD)"]


def test_what_is_not_over_is_waited_for_when_somebody_asks() -> None:
    device = FakeDevice()
    recorder = DeviceRecorder(DeviceClock(device.event, device.host))
    recorder.settle()  # nothing yet
    recorder.begin_step(0)
    device.give(7 * MS)
    recorder.end_step()
    assert not recorder.steps
    recorder.settle()
    assert [times.step for times in recorder.steps] == [7 * MS]
    assert device.waits == 1


def test_a_copy_that_was_not_over_is_not_forgotten_when_somebody_asks() -> None:
    device = FakeDevice()
    recorder = DeviceRecorder(DeviceClock(device.event, device.host))
    recorder.begin_step(0)
    device.give(7 * MS)
    began, ended = FakeEvent(device), FakeEvent(device)
    began.at_ns, ended.at_ns = device.free_ns - 4 * MS, device.free_ns - 1 * MS
    recorder.add_copy(Copy("send", 5, began, ended))
    recorder.end_step()
    assert not recorder.copies
    recorder.settle()
    [(_, _, start, end)] = recorder.copies
    assert end - start == 3 * MS
    recorder.add_copy(Copy("send", 5, began, ended))  # and nothing else to record
    recorder.settle()
    assert len(recorder.copies) == 2


def test_a_gpu_that_tells_of_copies_does_not_keep_the_recorder_alive() -> None:
    device = FakeDevice()
    recorder = DeviceRecorder(DeviceClock(device.event, device.host))
    tell = told_weakly(recorder.add_copy)
    recorder.begin_step(0)
    began, ended = FakeEvent(device), FakeEvent(device)
    began.record()
    device.give(1 * MS)
    ended.record()
    tell(Copy("send", 5, began, ended))
    recorder.end_step()
    recorder.settle()
    assert len(recorder.copies) == 1
    gone = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert gone() is None
    tell(Copy("send", 5, began, ended))  # to nobody
