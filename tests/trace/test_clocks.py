"""Clocks that differ are compared to within half a round trip; those that are one are not asked."""

from __future__ import annotations

import time

import barepp
from barepp.trace.clock_sync import EXCHANGES, Reading, clock_name, compare_clocks, on_rank_0s_clock

SECOND = 1_000_000_000


class Skewed:
    """A clock that is ahead and goes wrong: `ppm` microseconds a second too fast."""

    def __init__(self, ahead: int, ppm: int) -> None:
        self.ahead, self.ppm = ahead, ppm
        self.born = time.perf_counter_ns()

    def __call__(self) -> int:
        return self.of(time.perf_counter_ns())

    def of(self, true: int) -> int:
        return true + self.ahead + (true - self.born) * self.ppm // 1_000_000

    def true(self, mine: int) -> int:
        """Undo `of`, to the nanosecond."""
        since = (mine - self.ahead - self.born) * 1_000_000 // (1_000_000 + self.ppm)
        return self.born + since


CLOCKS = [Skewed(0, 0), Skewed(5 * SECOND, 300), Skewed(-3600 * SECOND, -50_000)]


def compare_twice(world):
    clock = CLOCKS[world.rank]
    readings = []
    for _ in range(2):
        readings.append(compare_clocks(world.transport, clock, f"host {world.rank}"))
        world.barrier()
    return readings, world.transport.traffic.sent.copy()


def test_the_estimate_is_as_good_as_it_says():
    (readings, sent), *others = barepp.run(compare_twice, 3, transport="inproc")
    assert [found for found, _ in others] == [[[], []]] * 2
    # (The last message says that there is nothing more to ask.)
    assert sent == {1: 2 * (EXCHANGES + 1), 2: 2 * (EXCHANGES + 1)}
    for comparison in readings:
        for clock, reading in zip(CLOCKS[1:], comparison[1:], strict=True):
            true = reading.at - clock.true(reading.at)
            assert abs(reading.ahead - true) <= reading.error + 1
            assert 0 < reading.error < SECOND


def test_drift_between_two_readings_is_taken_out():
    (readings, _), *_ = barepp.run(compare_twice, 3, transport="inproc")
    for rank, clock in enumerate(CLOCKS):
        before, after = readings[0][rank], readings[1][rank]
        worst = max(before.error, after.error) + 2
        for part in range(5):
            mine = before.at + (after.at - before.at) * part // 4
            assert abs(on_rank_0s_clock(mine, [before, after]) - clock.true(mine)) <= worst


def test_one_reading_is_one_difference_and_order_is_kept():
    assert on_rank_0s_clock(105, [Reading(7, 100, 3)]) == 5
    long_ago = 10**18  # a clock that has run for 30 years, with drift, to the nanosecond
    readings = [Reading(long_ago, 50, 1), Reading(long_ago + 1000, 60, 1)]
    moved = [on_rank_0s_clock(long_ago + t, readings) for t in (0, 500, 1000, 2000)]
    assert moved == [long_ago - 50, long_ago + 445, long_ago + 940, long_ago + 1930]


def scripted(world):
    """Round trips of 90, 10 and 50 ns by rank 0's clock; in the middle one rank 1 shows 1055."""
    trips = [(0, 90), (1000, 1010), (2000, 2050)] + [(3000, 3070)] * (EXCHANGES - 3)
    ticks = iter([7, *(at for trip in trips for at in trip)])
    replies = iter([5, 1055, 2000, *[0] * (EXCHANGES - 3)])
    return compare_clocks(
        world.transport, lambda: next(replies if world.rank else ticks), f"host {world.rank}"
    )


def test_the_shortest_round_trip_is_believed():
    found, _ = barepp.run(scripted, 2, transport="inproc")
    assert found == [Reading(7, 0, 0), Reading(at=1055, ahead=50, error=5)]


def same_clock(world):
    found = compare_clocks(world.transport)
    return found, world.transport.traffic.sent.copy()


def test_one_clock_is_not_asked():
    (readings, sent), (none, _) = barepp.run(same_clock, 2, transport="inproc")
    assert [(reading.ahead, reading.error) for reading in readings] == [(0, 0), (0, 0)]
    assert (sent, none) == ({1: 1}, [])


def processes(world):
    names = compare_clocks(world.transport)
    estimated = compare_clocks(world.transport, name=f"host {world.rank}")
    return clock_name(), names, estimated


def test_processes_of_one_host_have_one_clock():
    """And were they asked all the same, the answer would be zero, to within the round trip."""
    (name, readings, estimated), (other, _, _) = barepp.run(processes, 2)
    assert name == other
    assert [(reading.ahead, reading.error) for reading in readings] == [(0, 0), (0, 0)]
    assert abs(estimated[1].ahead) <= estimated[1].error < SECOND
