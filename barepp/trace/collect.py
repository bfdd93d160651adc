"""Every rank's spans on one clock in one file: collective, written by rank 0."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from barepp.errors import UsageError
from barepp.trace.chrome_format import (
    ActionSpan,
    CopySpan,
    NoteSpan,
    RankTrace,
    StepSpan,
    Trace,
    to_events,
)
from barepp.trace.clock_sync import Reading, compare_clocks, on_rank_0s_clock
from barepp.trace.device_recorder import DeviceRecorder
from barepp.trace.optimizer_hooks import watch_optimizers
from barepp.trace.recorder import Recorder
from barepp.trace.summary import peak_memory_nbytes
from transport.cuda.device import Cuda
from transport.device import Copy
from transport.message.tensors import copied_bytes

if TYPE_CHECKING:
    from barepp.worker.world import World

_SPAN_TAG: Final = -10  # negative tags are ours: a user's can never meet them


def start_trace(world: World, recorder: Recorder, parameters: Iterable[torch.Tensor]) -> None:
    """Let the recorder keep the spans of the last 1000 steps from now on; collective.

    Steps of torch's optimizers on these parameters are recorded too; anything else between steps
    is by name: `with recorder.span("my data"):`. Blocks until the ranks' clocks are compared: 32
    round trips for each rank of another host; and on a GPU until that has nothing to do.
    """
    recorder.device_readings += recorder.compare_device()
    if isinstance(recorder, DeviceRecorder) and isinstance(world.transport.gpu, Cuda):
        world.transport.gpu.on_copy = told_weakly(recorder.add_copy)
    recorder.readings.append(compare_clocks(world.transport))
    if not recorder.tracing:
        watch_optimizers(recorder, parameters)
    recorder.tracing = True


def told_weakly(add: Callable[[Copy], None]) -> Callable[[Copy], None]:
    """Return a function that tells a recorder, and does not keep it alive: the GPU outlives it."""
    method = weakref.WeakMethod(add)

    def tell(copy: Copy) -> None:
        told = method()
        if told is not None:
            told(copy)

    return tell


def write_trace(world: World, recorder: Recorder, path: str | Path) -> None:
    """Write what all ranks have recorded as Chrome trace events, on rank 0; collective.

    The file opens in Perfetto (ui.perfetto.dev) or chrome://tracing, one row a rank, and
    `python -m barepp.timeline` draws it. Blocks until this rank's part is sent, on rank 0 until the
    file is written. The ranks' clocks are compared once more, so that drift is known.

    Raises:
        UsageError: this rank has recorded no step; call `Pipeline.trace` before the steps.
        OSError: rank 0 cannot write the file.
    """
    recorder.device_readings += recorder.compare_device()
    if recorder.schedule is None or not recorder.traced:
        raise UsageError("no step was traced: call Pipeline.trace() before the steps of interest")
    recorder.readings.append(compare_clocks(world.transport))
    mine = _packed(world, recorder)
    if world.rank != 0:
        world.transport.send(mine, 0, _SPAN_TAG)
        return
    ranks, errors = [], []
    for rank in range(world.world_size):
        message = mine if rank == 0 else world.transport.recv(rank, _SPAN_TAG)
        readings = [of_all[rank] for of_all in recorder.readings]
        recorded, device_error = _unpacked(message, readings)
        ranks.append(recorded)
        errors.append(max(reading.error for reading in readings) + device_error)
    trace = Trace(recorder.schedule, ranks, errors)
    Path(path).write_text(json.dumps(to_events(trace), separators=(",", ":")))


def recorded(recorder: Recorder, peak_memory_nbytes: int = 0) -> RankTrace:
    """Return what a rank has recorded so far, on the recorder's clock."""
    trace = RankTrace([], [], [], peak_memory_nbytes)
    for step in recorder.traced:
        trace.steps.append(StepSpan(step.number, step.start, step.end))
        trace.notes += [NoteSpan(step.number, *note) for note in step.notes]
        for (action, source, to), arrived, (asked, started, ended, gave) in zip(
            step.program, step.arrivals, step.times, strict=True
        ):
            came = (asked, arrived or asked) if source is not None else (started, started)
            span = (*came, started, ended, gave if to is not None else ended)
            trace.actions.append(ActionSpan(step.number, action, source, to, *span))
    trace.notes += [NoteSpan(None, *note) for note in recorder.outside]
    trace.copies += [CopySpan(*copy) for copy in recorder.copies]
    return trace


def _packed(world: World, recorder: Recorder) -> torch.Tensor:
    """Return what this rank has recorded as JSON in UTF-8; times on its host's clock."""
    trace, readings = recorded(recorder, peak_memory_nbytes(world.device)), recorder.device_readings
    if readings:
        trace = trace.shifted(lambda time_ns: on_rank_0s_clock(time_ns, readings))
    error_ns = max((reading.error for reading in readings), default=0)
    text = json.dumps({**trace.to_record(), "device_error_ns": error_ns})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _unpacked(message: torch.Tensor, readings: list[Reading]) -> tuple[RankTrace, int]:
    """Undo `_packed`, and put the times on rank 0's clock; also say how wrong the device's are."""
    record: dict[str, Any] = json.loads(copied_bytes(message))
    trace = RankTrace.from_record(record)
    if any(reading.ahead for reading in readings):
        trace = trace.shifted(lambda time_ns: on_rank_0s_clock(time_ns, readings))
    return trace, int(record["device_error_ns"])
