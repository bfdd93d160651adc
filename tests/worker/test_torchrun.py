"""The real torchrun: the same bits, one cause told to every rank, and nothing left behind.

What it tells its ranks is simulated elsewhere (test_external.py, test_two_hosts.py), in a tenth of
the time. Here is what only itself can show: its store at MASTER_PORT, its way to end ranks.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from clusters import TRAIN, the_digest
from jobs import LIMIT_S, MARK, ROOT, marked, write_script
from ports import free_port
from starter import eventually

RANKS = 3  # each takes seconds to import torch

SURVIVE = """
    import barepp, os, signal, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, perhaps before one is told
    with barepp.init() as world:
        try:
            world.barrier()
            if world.rank == {rank}:
                {fault}
            world.recv({rank}, tag=7)
        except barepp.JobFailed as error:   # (ranks share one pipe: a line at once)
            told = error.failure
            os.write(1, f"told {{told.cause}} by {{told.rank}}: {{told.message}}\\n".encode())
            raise
"""


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def all_of_it(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--torchrun"):
        pytest.skip("pytest --torchrun runs it, in three minutes")


def torchrun(folder: Path, text: str, *, ranks: int = RANKS, **extra: str) -> Ended:
    """Run a script's text under torchrun, and check that nothing of it is left."""
    script, mark, temporary = write_script(folder, text), uuid.uuid4().hex, folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), MARK: mark, **extra}
    done = subprocess.run(
        [*command, "--master-port", str(free_port() - 1), str(script)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT_S,
        check=False,
    )
    eventually(lambda: not marked(mark))
    assert not list(temporary.glob("barepp-*"))
    return Ended(done.returncode, done.stdout, done.stderr)


def test_the_same_bits(tmp_path: Path, undisturbed: str) -> None:
    check_bits(torchrun(tmp_path, TRAIN), undisturbed)


@pytest.mark.usefixtures("all_of_it")
def test_the_same_bits_over_gloo(tmp_path: Path, undisturbed: str) -> None:
    check_bits(torchrun(tmp_path, TRAIN, BAREPP_TRANSPORT="gloo"), undisturbed)


def check_bits(ended: Ended, undisturbed: str) -> None:
    assert ended.code == 0, ended.err
    assert the_digest(ended.out) == undisturbed
    for rank in range(RANKS):  # (six worlds came one after the other)
        assert ended.out.count(f"family {rank} ") == 6


# fault: what every other rank is told
FAULTS = {
    "os.kill(os.getpid(), signal.SIGKILL)": "lost by 2: it is gone: its control connection ended",
}
MORE_FAULTS = {
    "raise ValueError('boom')": "exception by 2: ValueError: boom",
    "sys.exit(3)": "exit by 2: it called sys.exit(3)",
    "os._exit(0)": "lost by 2: it is gone: its control connection ended",
    # (torchrun gives a stopped process 30 s to heed its SIGTERM)
    "os.kill(os.getpid(), signal.SIGSTOP)": "hang by 2: no sign of life for 2 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_cause(fault: str, tmp_path: Path) -> None:
    check_fault(fault, FAULTS[fault], tmp_path)


@pytest.mark.usefixtures("all_of_it")
@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("fault", [*FAULTS, *MORE_FAULTS])
def test_one_cause_of_any_kind(fault: str, transport: str, tmp_path: Path) -> None:
    says = {**FAULTS, **MORE_FAULTS}[fault]
    check_fault(fault, says, tmp_path, BAREPP_TRANSPORT=transport)


def check_fault(fault: str, says: str, folder: Path, **extra: str) -> None:
    text = SURVIVE.format(rank=2, fault=fault)
    ended = torchrun(folder, text, BAREPP_HEARTBEAT="2", **extra)
    assert ended.code == 1
    told = re.findall(r"^told .*", ended.out, re.MULTILINE)
    assert len(told) == RANKS - 1 and all(f"told {says}" in line for line in told), told
    shown = ended.err.count("ValueError: boom\n")
    assert shown >= 1 if "ValueError" in fault else shown == 0  # its own traceback, on its stderr
