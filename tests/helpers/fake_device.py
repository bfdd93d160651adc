"""A device whose time is ours: a host that goes on, a stream that follows, events in between."""

from __future__ import annotations

import struct
import threading


class FakeDevice:
    """What CUDA does with events, in nanoseconds that the test decides.

    The host's time passes by `host_ns`. Work begins when the host has given it and the stream has
    come so far; the device's own clock runs `drift` times as fast as the host's, from another zero.
    """

    def __init__(self, drift: float = 1.0, offset_ns: int = 0) -> None:
        self.now_ns = 1_000_000_000
        self.drift, self.offset_ns = drift, offset_ns
        self.free_ns = 0  # when the stream has done all that it was given
        self.waits = 0  # of the host, for the device
        self.events = 0  # that were made
        self._lock = threading.Lock()

    def host(self) -> int:
        return self.now_ns

    def pass_host(self, ns: int) -> None:
        self.now_ns += ns

    def give(self, ns: int) -> None:
        """Give the stream work for so long."""
        self.free_ns = max(self.free_ns, self.now_ns) + ns

    def event(self) -> FakeEvent:
        self.events += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.at_ns = 0  # on the host's clock

    def record(self) -> None:
        self.at_ns = self._device.free_ns = max(self._device.free_ns, self._device.now_ns)

    def query(self) -> bool:
        return self._device.now_ns >= self.at_ns

    def synchronize(self) -> None:
        self._device.waits += not self.query()
        self._device.now_ns = max(self._device.now_ns, self.at_ns)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "the device has not come there"
        ms = (end.at_ns - self.at_ns) * self._device.drift / 1e6
        return struct.unpack("<f", struct.pack("<f", ms))[0]  # CUDA's answer is a float32
