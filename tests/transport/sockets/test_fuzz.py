"""The first cases of the fuzzer, the same each time; `python tests/fuzz.py` goes on from there."""

from __future__ import annotations

import random
import time
import tracemalloc

import fuzz
import pytest
from fuzz import TARGETS, Finding, Tally, Target, run_case

from transport.errors import ProtocolError
from transport.wire import format as wire
from transport.wire.format import Limits

SEED = 20
CASES = {
    "decoder": 250,
    "metadata": 400,
    "handshake": 600,
    "words": 400,
    "records": 100,
    "listener": 60,
    "rendezvous": 30,
    "transport": 80,
    "lending": 80,
    "notes": 100,
}


@pytest.mark.parametrize("name", TARGETS)
def test_broken_bytes_are_refused_and_nothing_else_comes_of_them(name: str) -> None:
    tally = Tally()
    for case in range(CASES[name]):
        run_case(name, SEED, case, tally, traced=case % 8 == 0)
    assert tally.accepted > 0 and tally.refused > 5, tally  # both ways were taken


def crash(rng: random.Random) -> bool:
    return bool([][rng.randrange(1)])


def gorge(rng: random.Random) -> bool:
    return bool(bytearray(fuzz.MEMORY_NBYTES))


def dawdle(rng: random.Random) -> bool:
    time.sleep(0.02)
    return True


@pytest.mark.parametrize(("target", "says"), [(crash, "IndexError"), (gorge, "over the bound")])
def test_a_finding_says_how_to_see_it_again(
    target: Target, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "decoder", target)
    with pytest.raises(Finding, match=says) as found:
        run_case("decoder", 7, 16, Tally())
    assert "python tests/fuzz.py --target decoder --seed 7 --case 16" in str(found.value)


def test_a_case_that_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SLOW_S", 0.01)
    monkeypatch.setitem(TARGETS, "decoder", dawdle)
    with pytest.raises(Finding, match="it took 0.0"):
        run_case("decoder", 7, 1, Tally())


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz.main(["--seconds", "0.1", "--seed", "5", "--target", "handshake"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5\nhandshake ") and "accepted" in said
    monkeypatch.setitem(TARGETS, "handshake", crash)
    assert fuzz.main(["--seed", "5", "--target", "handshake", "--case", "3"]) == 1
    assert "again: python tests/fuzz.py --target handshake --seed 5 --case 3" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("empty", [b"\x90", b"\x80", b"\xa0", b"\xc4\x00"])
def test_the_most_memory_that_metadata_can_take(empty: bytes) -> None:
    """Empty lists are the worst: 8 bytes in their list and 56 of their own, for one on the wire."""
    limit = Limits().meta_nbytes
    row = b"\xdc\x0f\xff" + empty * 4095
    rows = (limit - 3) // len(row)
    worst = b"\xdc" + rows.to_bytes(2, "big") + row * rows
    assert 0.8 * limit < len(worst) <= limit
    tracemalloc.start()
    try:
        assert len(wire.unpack(worst)) == rows
        wide = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        for claim in (b"\xdc\x0f\xff", b"\xdd\x00\x00\xff\x00", b"\xdf\x00\x00\x7f\x00"):
            with pytest.raises(ProtocolError):  # lists in lists, each said to hold thousands
                wire.unpack((claim * 2000).ljust(limit, b"\xc0"))
        deep = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert wide < 80 * limit
    assert wide + deep < fuzz.MEMORY_NBYTES
