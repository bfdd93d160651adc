"""A GPU without hardware: its streams are threads that do everything late, its memory is ours.

What a program gets wrong about the order of streams shows as wrong numbers:

1. A stream does one thing after the other, each copy after a pause that a seed decides. It reads
   and writes when its turn comes, not when it is asked for.
2. As on a GPU, a copy keeps no tensor of the device alive. Memory that is freed is overwritten, in
   the order of the stream that it was made for; only `used` makes that wait for another stream.
3. Memory and events can be shared: a handle names a descriptor of this process, which another
   process opens (proc(5): /proc/PID/fd).
4. "The device's memory" is a range of addresses of this process: `holds` looks a tensor's up.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import queue
import random
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from transport.device import CPU
from transport.message.specs import TensorSpec
from transport.message.tensors import bytes_type, tensor_over

MEMORY_NBYTES = 16 * 2**30  # of addresses; the kernel gives pages to what is touched
MAX_EVENTS = 4096  # that are shared, of one GPU
POLL_S = 0.0001  # nothing announces what another process has done
POISON = 0xA5
STREAMS = ("compute", "sends", "receives", "returns")
ALIGNMENT = 512


class FakeStream:
    """Does what it is given, in order and late."""

    def __init__(self, name: str, seed: int, late_s: float) -> None:
        self.late_s = late_s
        self.stopping = False
        self._gates: list[threading.Event] = []
        self._rng = random.Random(f"{seed} {name}")
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"fake-{name}", daemon=True)
        self._thread.start()

    def give(self, job: Callable[[], None], *, late: bool = False) -> None:
        self._jobs.put(functools.partial(self._late, job) if late else job)

    def hold(self) -> Callable[[], None]:
        """Do nothing further until what is returned is called."""
        gate = threading.Event()
        self._gates.append(gate)
        self.give(lambda: gate.wait() and None)
        return gate.set

    def stop(self) -> None:
        self.stopping = True
        for gate in self._gates:
            gate.set()
        self._jobs.put(None)
        self._thread.join()

    def _late(self, job: Callable[[], None]) -> None:
        if self.late_s and not self.stopping:
            time.sleep(self._rng.random() * self.late_s)
        job()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job


class FakeEvent:
    """Two counters, which may be shared: how often it was recorded, and how far the device came."""

    def __init__(self, counters: Any, handle: bytes = b"") -> None:
        self._counters = counters
        self.handle = handle

    def record(self, stream: FakeStream) -> None:
        self._counters[0] += 1
        turn = self._counters[0]

        def arrive() -> None:
            self._counters[1] = turn

        stream.give(arrive)

    def wait(self, stream: FakeStream) -> None:
        turn = self._counters[0]
        stream.give(lambda: self._until(turn, stream))

    def query(self) -> bool:
        return bool(self._counters[1] >= self._counters[0])

    def synchronize(self) -> None:
        self._until(self._counters[0], None)

    def _until(self, turn: int, stream: FakeStream | None) -> None:
        while self._counters[1] < turn and not (stream is not None and stream.stopping):
            time.sleep(POLL_S)


class FakeMemory:
    """Memory of a GPU that several processes use."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.map = mmap.mmap(fd, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.nbytes = nbytes
        self.handle = b""

        self.closed = False

    def close(self) -> None:
        """Only say so: the map goes with the last tensor over it."""
        assert not self.closed
        self.closed = True


class FakeGpu:
    """What `transport.device.Gpu` asks for, and what a test needs to put numbers there and back."""

    device = CPU

    def __init__(self, seed: int = 0, late_s: float = 0.0005, *, sealed: bool = False) -> None:
        self.sealed = sealed  # nobody's handles can be opened
        self.broken = ""  # what every call raises from now on, as after an error of the device
        self.copies: list[str] = []  # on which stream each copy was
        self._streams = [FakeStream(name, seed, late_s) for name in STREAMS]
        self.compute, self.sends, self.receives, self.returns = self._streams
        self._mine = threading.local()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        self._map = mmap.mmap(-1, MEMORY_NBYTES, flags=flags)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._next = 0  # from here on nothing was ever used
        self._free: dict[tuple[FakeStream, int], list[int]] = defaultdict(list)
        self._readers: dict[int, list[FakeStream]] = {}  # other streams, by offset
        self._ranges = [(self._base, self._base + MEMORY_NBYTES)]
        self._fds: list[int] = []
        self._kept: list[FakeMemory] = []  # late copies may still write there
        self._events: FakeMemory | None = None  # the counters of those that are shared
        self._events_fd = -1
        self._events_made = 0

    def close(self) -> None:
        self.broken = "CUDA error: driver shutting down"
        for stream in self._streams:
            stream.stop()
        self._kept.clear()
        self._events = None
        while self._fds:
            os.close(self._fds.pop())
        self._map.madvise(mmap.MADV_DONTNEED)  # a tensor that is kept keeps the addresses alone

    # -- what a transport asks for ----------------------------------------------------------------

    def holds(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(start <= address < end for start, end in self._ranges)

    def current(self) -> FakeStream:
        self._check()
        return getattr(self._mine, "stream", self.compute)

    def now(self) -> FakeEvent:
        return self.mark(self.current())

    def mark(self, stream: FakeStream) -> FakeEvent:
        self._check()
        event = FakeEvent((ctypes.c_uint64 * 2)())
        event.record(stream)
        return event

    def fresh(self, spec: TensorSpec) -> torch.Tensor:
        return self._allocate(spec, self.receives)

    def pinned(self, spec: TensorSpec) -> torch.Tensor:
        self._check()
        return spec.allocate()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        self._check()
        self.copies.append(self._name(stream))
        kept = [each for each in (target, source) if not self.holds(each)]
        to, start, nbytes = target.data_ptr(), source.data_ptr(), source.nbytes

        def move() -> None:
            ctypes.memmove(to, start, nbytes)
            kept.clear()

        stream.give(move, late=True)

    def used(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        offset = tensor.untyped_storage().data_ptr() - self._base
        if offset in self._readers:
            self._readers[offset].append(stream)

    def share(self, nbytes: int) -> FakeMemory:
        self._check()
        fd = self._file(nbytes)
        memory = self._reach(FakeMemory(fd, nbytes))
        memory.handle = f"{os.getpid()} {fd} {nbytes} 0".encode().ljust(64)
        return memory

    def open(self, handle: bytes, nbytes: int) -> FakeMemory:
        self._check()
        memory, _ = self._opened(handle)
        assert memory.nbytes == nbytes
        self._kept.append(memory)
        return memory

    def write(self, address: int, tensor: torch.Tensor, stream: FakeStream) -> None:
        self._check()
        assert self.holds(tensor)
        self.copies.append(self._name(stream))
        start, nbytes = tensor.data_ptr(), tensor.nbytes
        stream.give(lambda: ctypes.memmove(address, start, nbytes) and None, late=True)

    def over(self, address: int, spec: TensorSpec, release: Callable[[], None]) -> torch.Tensor:
        self._check()
        [memory] = [m for m in self._kept if m.address <= address < m.address + m.nbytes]
        array = bytes_type(spec.nbytes).from_buffer(memory.map, address - memory.address)
        weakref.finalize(array, release).atexit = False
        return tensor_over(array, 0, spec)

    def share_event(self) -> tuple[FakeEvent, bytes]:
        self._check()
        if self._events is None:
            self._events_fd = self._file(MAX_EVENTS * 16)
            self._events = FakeMemory(self._events_fd, MAX_EVENTS * 16)
        start, self._events_made = self._events_made * 16, self._events_made + 1
        event = FakeEvent((ctypes.c_uint64 * 2).from_buffer(self._events.map, start))
        return event, f"{os.getpid()} {self._events_fd} {MAX_EVENTS * 16} {start}".encode().ljust(
            64
        )

    def open_event(self, handle: bytes) -> FakeEvent:
        self._check()
        memory, start = self._opened(handle)
        return FakeEvent((ctypes.c_uint64 * 2).from_buffer(memory.map, start))

    # -- what a test asks for ---------------------------------------------------------------------

    def use_stream(self, stream: FakeStream) -> None:
        """Make a stream the calling thread's current one."""
        self._mine.stream = stream

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return self._allocate(TensorSpec.of(like), self.current())

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the GPU, where it comes late."""
        kept = tensor.detach().clone().contiguous()
        made = self.empty(kept)
        if kept.nbytes:
            self.copy(made, kept, self.current())
        return made

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what the tensor is on the calling thread's current stream."""
        made = torch.empty_like(tensor)
        if not self.holds(tensor):
            return made.copy_(tensor)
        self.copy(made, tensor, self.current())
        self.mark(self.current()).synchronize()
        return made

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        """Give the current stream a change of the tensor, as a kernel would be."""
        self.copy(tensor, torch.full_like(tensor, value), self.current())

    # -- memory -----------------------------------------------------------------------------------

    def _allocate(self, spec: TensorSpec, stream: FakeStream) -> torch.Tensor:
        self._check()
        if not spec.nbytes:
            return spec.allocate()
        size = -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        try:
            offset = self._free[stream, size].pop()
        except IndexError:
            offset, self._next = self._next, self._next + size
        array = bytes_type(spec.nbytes).from_buffer(self._map, offset)
        self._readers[offset] = []
        weakref.finalize(array, self._release, offset, size, stream).atexit = False
        return tensor_over(array, 0, spec)

    def _release(self, offset: int, size: int, stream: FakeStream) -> None:
        for reader in self._readers.pop(offset):
            event = FakeEvent((ctypes.c_uint64 * 2)())
            event.record(reader)
            event.wait(stream)
        address = self._base + offset
        stream.give(lambda: ctypes.memset(address, POISON, size) and None)
        self._free[stream, size].append(offset)

    def _reach(self, memory: FakeMemory) -> FakeMemory:
        self._kept.append(memory)
        self._ranges.append((memory.address, memory.address + memory.nbytes))
        return memory

    def _opened(self, handle: bytes) -> tuple[FakeMemory, int]:
        if self.sealed:
            raise RuntimeError(
                "CUDA error: invalid device context (cuIpcOpenMemHandle_v2 gave 201)"
            )
        pid, number, nbytes, start = map(int, handle.split())
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(f"CUDA error: invalid resource handle ({error})") from error
        try:
            return FakeMemory(fd, nbytes), start
        finally:
            os.close(fd)

    def _file(self, nbytes: int) -> int:
        fd = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        self._fds.append(fd)
        return fd

    def _name(self, stream: FakeStream) -> str:
        return {self.sends: "sends", self.receives: "receives"}.get(stream, "compute")

    def _check(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)
