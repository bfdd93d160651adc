"""Puts one small fault at a time into our own code, and sees whether the tests of its room notice.

    python tests/code_mutations.py                 each fault on the test files that stand beside it
    python tests/code_mutations.py --check         only whether each text is found exactly once
    python tests/code_mutations.py --only decoder  the faults of which file, text or tests have it
    python tests/code_mutations.py --whole         the survivors on the whole suite as well

A fault is a file, a piece of its text that occurs exactly once, and what takes its place. It is
made in a copy of this checkout, in which pytest then runs with -x: a test that fails has caught it.
First everything runs without a fault, so that no fault is called caught which a broken test would
have failed anyway. The exit code is 1 when a fault has survived. It is no test itself, because it
takes many minutes.
"""

# ruff: noqa: E501  (a piece of text is found more easily in one line)

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT_S = 240.0  # of one run; a fault that makes the tests hang is caught


class Fault(NamedTuple):
    """One mutation, and the test files (below tests/, without "test_") that should notice it."""

    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # -- barepp/program: what a schedule is ---------------------------------------------------------
    Fault(
        "barepp/program/actions.py",
        "(0|[1-9][0-9]*)([FBIW])(0|[1-9][0-9]*)",
        "([0-9]+)([FBIW])([0-9]+)",
        "program/actions",
    ),
    Fault(
        "barepp/program/dependencies.py",
        "Kind.W: ((Kind.I, 0),)",
        "Kind.W: ((Kind.F, 0),)",
        "program/validation plan/simulate",
    ),
    Fault(
        "barepp/program/dependencies.py",
        "if 0 <= stage + offset < num_stages",
        "if 0 < stage + offset < num_stages",
        "program/lowering plan/simulate",
    ),
    Fault(
        "barepp/program/lowering.py",
        "send_to.get(result_name(action))",
        "send_to.get(action)",
        "program/lowering",
    ),
    Fault(
        "barepp/program/lowering.py",
        "stage << 1 | direction",
        "stage << 1",
        "program/lowering",
    ),
    Fault(
        "barepp/program/validation.py",
        "if kinds not in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]):",
        "if sorted(kinds) not in ([Kind.B, Kind.F], [Kind.F, Kind.I, Kind.W]):",
        "program/validation",
    ),
    Fault(
        "barepp/program/validation.py",
        "            if one > two:\n",
        "            if one > two + 1:\n",
        "program/validation",
    ),
    # -- barepp/schedules ---------------------------------------------------------------------------
    Fault(
        "barepp/schedules/gpipe.py",
        "for microbatch in range(num_microbatches)\n",
        "for microbatch in reversed(range(num_microbatches))\n",
        "program/schedules",
    ),
    Fault(
        "barepp/schedules/one_f_one_b.py",
        "min(num_stages - 1 - stage, num_microbatches)",
        "min(num_stages - stage, num_microbatches)",
        "program/schedules",
    ),
    Fault(
        "barepp/schedules/interleaved_1f1b.py",
        "num_ranks + 2 * (num_ranks - 1 - rank)",
        "num_ranks + (num_ranks - 1 - rank)",
        "program/schedules plan/simulate",
    ),
    Fault(
        "barepp/schedules/zb_h1.py",
        "behind = stage  #",
        "behind = 0  #",
        "program/schedules",
    ),
    Fault(
        "barepp/schedules/zb_v.py",
        '(r, "Iv I^")',
        '(r, "I^ Iv")',
        "program/schedules",
    ),
    # -- barepp/plan --------------------------------------------------------------------------------
    Fault(
        "barepp/plan/partition.py",
        "share + (part < remainder)",
        "share + (part >= parts - remainder)",
        "plan/partition train/batch",
    ),
    Fault(
        "barepp/plan/simulate.py",
        "full = [a + b for a, b in",
        "full = [max(a, b) for a, b in",
        "plan/simulate",
    ),
    Fault(
        "barepp/plan/timeline.py",
        "Kind.B: -1, Kind.I: 0, Kind.W: -1",
        "Kind.B: -1, Kind.I: -1, Kind.W: 0",
        "plan/simulate plan/plan",
    ),
    Fault(
        "barepp/plan/theory.py",
        '(p - 1) / (6 * m + p - 1)", 6 * m + p - 1',
        '(p - 1) / (6 * m + p - 1)", 6 * m + p',
        "plan/simulate plan/plan",
    ),
    Fault(
        "barepp/plan/balance.py",
        "return total + cost * cost",
        "return total + cost",
        "plan/balance",
    ),
    Fault(
        "barepp/plan/layer_costs.py",
        "            inputs += forward\n",
        "            pass\n",
        "plan/balance",
    ),
    # -- barepp/train -------------------------------------------------------------------------------
    Fault(
        "barepp/train/batch.py",
        "uniform_sizes(num_rows, min(num_rows, num_microbatches))",
        "uniform_sizes(num_rows, num_microbatches)",
        "train/batch",
    ),
    Fault(
        "barepp/train/batch.py",
        "[canonical(rows) for rows in microbatch]",
        "list(microbatch)",
        "train/batch train/stage/canonical train/stage/stage",
    ),
    Fault(
        "barepp/train/messages.py",
        "return value if wanted[0] else (_flags([_TENSOR, False]), value)",
        "return value",
        "train/pipeline train/exactness",
    ),
    Fault(
        "barepp/train/executor.py",
        "= copied(made)",
        "= made",
        "train/pipeline train/exactness",
    ),
    Fault(
        "barepp/train/executor.py",
        "split=(stage, microbatch) in self._split",
        "split=False",
        "train/pipeline train/exactness train/stage/recompute",
    ),
    Fault(
        "barepp/train/executor.py",
        "            for send in self._sends:\n                send.wait()\n",
        "",
        "train/pipeline transport/isend_must_not_block trace/trace",
    ),
    Fault(
        "barepp/train/pipeline.py",
        "[size / count for size in sizes]",
        "[1 / len(sizes) for size in sizes]",
        "train/pipeline train/exactness",
    ),
    Fault(
        "barepp/train/pipeline.py",
        "                module.training = mode\n",
        "                module.train(True)\n",
        "train/pipeline",
    ),
    Fault(
        "barepp/train/pipeline.py",
        "        self._steps += 1\n",
        "",
        "train/pipeline train/exactness train/stage/seeding",
    ),
    Fault(
        "barepp/train/parameters.py",
        "for index in range(len(holder)):",
        "for index in reversed(range(len(holder))):",
        "train/pipeline train/exactness",
    ),
    Fault(
        "barepp/train/loss_scaler.py",
        "self._good_steps + 1 if finite else 0",
        "self._good_steps + finite",
        "train/loss_scaler",
    ),
    Fault(
        "barepp/train/loss_scaler.py",
        "torch.maximum",
        "torch.minimum",
        "train/loss_scaler",
    ),
    Fault(
        "barepp/train/shared_parameters.py",
        "[thing.__defaults__, thing.__kwdefaults__, thing.__closure__, *variables]",
        "[thing.__defaults__, thing.__closure__, *variables]",
        "train/shared_parameters",
    ),
    Fault(
        "barepp/train/stage/canonical.py",
        "not tensor.data_ptr() % ALIGNMENT and tensor",
        "tensor",
        "train/stage/canonical",
    ),
    Fault(
        "barepp/train/stage/canonical.py",
        "    if not output.is_leaf:\n",
        "    if False:\n",
        "train/stage/canonical train/stage/stage",
    ),
    Fault(
        "barepp/train/stage/backward.py",
        "accumulate=False, keep_graph=kept",
        "accumulate=False, keep_graph=False",
        "train/stage/backward train/stage/stage",
    ),
    Fault(
        "barepp/train/stage/backward.py",
        "                increment_version(tensor)\n",
        "                pass\n",
        "train/stage/backward",
    ),
    Fault(
        "barepp/train/stage/boundary.py",
        "torch.unsafe_chunk(leaf, 1)[0] if leaf.dim() else leaf.clone()",
        "leaf.clone()",
        "train/stage/stage train/stage/backward train/autocast",
    ),
    Fault(
        "barepp/train/stage/recompute.py",
        "        for module, name, _, then in self._saved:\n            setattr(module, name, then)\n",
        "",
        "train/stage/recompute",
    ),
    Fault(
        "barepp/train/stage/seeding.py",
        '"forward", layer, step, microbatch',
        '"forward", layer, 0, microbatch',
        "train/stage/seeding",
    ),
    Fault(
        "barepp/train/stage/stage.py",
        "torch.full_like(loss, loss_scale, dtype=torch.float32)",
        "torch.ones_like(loss, dtype=torch.float32)",
        "train/loss_scaler train/autocast",
    ),
    # -- barepp/trace -------------------------------------------------------------------------------
    Fault(
        "barepp/trace/recorder.py",
        "flush += end - start",
        "flush = end - start",
        "trace/trace",
    ),
    Fault(
        "barepp/trace/clock_sync.py",
        "theirs - (before + after) // 2",
        "theirs - before",
        "trace/clocks",
    ),
    Fault(
        "barepp/trace/analysis.py",
        "return common[1:] or common",
        "return common",
        "trace/analysis",
    ),
    Fault(
        "barepp/trace/chrome_format.py",
        'args = {"step": step, "action": str(action), "to": to}\n            yield span(f"sending to rank {to}", "send", end, gave, **args)',
        'args = {"step": step, "action": str(action), "to": to}\n            yield span(f"sending to rank {to}", "send", start, gave, **args)',
        "trace/chrome_format",
    ),
    Fault(
        "barepp/trace/step_breakdown.py",
        "self.step_ms - self.computing_ms - self.waiting_ms - self.communicating_ms",
        "self.step_ms - self.computing_ms - self.waiting_ms - self.sending_ms",
        "trace/analysis trace/trace trace/timeline_command",
    ),
    # -- barepp/monitor -----------------------------------------------------------------------------
    Fault(
        "barepp/monitor/rates.py",
        "            history.clear()  # a new world, which counts from 0\n",
        "            pass\n",
        "monitor/table",
    ),
    Fault(
        "barepp/monitor/status_socket.py",
        "if not goes_on or len(questions) + caller.asked > 1:",
        "if not goes_on:",
        "monitor/status_socket",
    ),
    Fault(
        "barepp/monitor/table.py",
        "if value < 99.5 * 60:",
        "if value < 999.5 * 60:",
        "monitor/table",
    ),
    Fault(
        "barepp/monitor/stacks.py",
        '    return "\\n".join(lines[start:end])\n',
        '    return "\\n".join(lines[:end])\n',
        "monitor/stacks launch/hangs",
    ),
    # -- barepp/worker ------------------------------------------------------------------------------
    Fault(
        "barepp/worker/failures.py",
        "return error.code & 0xFF if",
        "return error.code if",
        "worker/failures",
    ),
    Fault(
        "barepp/worker/failures.py",
        "    if isinstance(error, (PeerLost, PeerLeft)):\n",
        "    if isinstance(error, PeerLost):\n",
        "worker/failures worker/world",
    ),
    Fault(
        "barepp/worker/heartbeat.py",
        "dataclasses.replace(self, made_at=other.made_at) == other",
        "self == other",
        "launch/hangs",
    ),
    Fault(
        "barepp/worker/external/environment.py",
        '_number(environ, "MASTER_PORT") + 1',
        '_number(environ, "MASTER_PORT")',
        "worker/environment",
    ),
    Fault(
        "barepp/worker/devices.py",
        "and all(counts))",
        "and any(counts))",
        "worker/devices",
    ),
    Fault(
        "barepp/worker/faults/fault_hook.py",
        "if step != fault.step or self._happened:",
        "if self._happened:",
        "testing/fault_run",
    ),
    # -- barepp/launch ------------------------------------------------------------------------------
    Fault(
        "barepp/launch/hang_detector.py",
        "            sent == beats[peer].received.get(rank, 0)\n",
        "            sent >= beats[peer].received.get(rank, 0)\n",
        "launch/hangs",
    ),
    Fault(
        "barepp/launch/hang_detector.py",
        "if max(self._since[rank] for rank in beats) > min(self._until[rank] for rank in beats):",
        "if False:",
        "launch/hangs",
    ),
    Fault(
        "barepp/launch/referee.py",
        'if event.failure.cause != "lost" or self.failure is not None:',
        "if True:",
        "testing/fault_run worker/failures",
    ),
    Fault(
        "barepp/launch/referee.py",
        "if not told and (status != 0 or (member.joined and not member.left)):",
        "if not told and status != 0:",
        "worker/failures",
    ),
    Fault(
        "barepp/launch/referee.py",
        "if self._lines.connected(rank) else 0.0",
        "if False else 0.0",
        "worker/failures",
    ),
    Fault(
        "barepp/launch/hosts/head.py",
        "if not host.gone:  # after a goodbye nothing counts",
        "if True:",
        "launch/head_referee",
    ),
    Fault(
        "transport/rendezvous/loop.py",
        "if self._callbacks.get(fd) is callback:",
        "if True:",
        "transport/loop",
    ),
    Fault(
        "transport/rendezvous/loop.py",
        "if self._times.get(call, math.inf) <= now:",
        "if True:",
        "transport/loop",
    ),
    Fault(
        "transport/rendezvous/barrier.py",
        "if last or not begun:",
        "if True:",
        "transport/rendezvous",
    ),
    Fault(
        "barepp/launch/job.py",
        "        self._loop.call_at(time.monotonic() + grace_s, self._kill)\n",
        "",
        "testing/fault_run worker/failures",
    ),
    Fault(
        "barepp/launch/output.py",
        'self._take(key.data, b"")',
        "pass",
        "launch/output",
    ),
    # -- barepp/testing, barepp/bench ---------------------------------------------------------------
    Fault(
        "barepp/testing/fault_run.py",
        "        elif survivor.told != self.cause:\n",
        "        elif False:\n",
        "testing/fault_run",
    ),
    Fault(
        "barepp/testing/leaks.py",
        "if name.startswith(ours)}",
        'if name.startswith("barepp-none")}',
        "testing/fault_run worker/failures",
    ),
    Fault(
        "barepp/bench/teams/conductor.py",
        "ends = [max(column) for column",
        "ends = [min(column) for column",
        "bench/bench",
    ),
    # -- transport: bytes ---------------------------------------------------------------------------
    Fault(
        "transport/wire/decoder.py",
        "        if sequence != due:\n",
        "        if False:\n",
        "transport/sockets/wire",
    ),
    Fault(
        "transport/wire/decoder.py",
        "if zlib.crc32(self._scratch[start : start + SIGNED.size]) != crc:",
        "if False:",
        "transport/sockets/wire",
    ),
    Fault(
        "transport/wire/decoder.py",
        "meta_nbytes > limits.meta_nbytes or payload_nbytes > limits.payload_nbytes:\n            over",
        "meta_nbytes > limits.meta_nbytes:\n            over",
        "transport/sockets/wire",
    ),
    Fault(
        "transport/message/tensors.py",
        "if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():",
        "if tensor.is_contiguous() and not tensor.is_conj():",
        "transport/tensors",
    ),
    Fault(
        "transport/message/specs.py",
        "if math.prod(size or 1 for size in shape)",
        "if math.prod(shape)",
        "transport/tensors transport/sockets/fuzz",
    ),
    # -- transport: messages ------------------------------------------------------------------------
    Fault(
        "transport/message/mailbox.py",
        "    first = queue.popleft()\n",
        "    first = queue.pop()\n",
        "transport/transport_contract",
    ),
    Fault(
        "transport/message/mailbox.py",
        "        self._held[receive.peer] -= arrival.spec.nbytes\n",
        "",
        "transport/transport_contract",
    ),
    Fault(
        "transport/message/mailbox.py",
        "mine = [t.clone() for t in arrival.tensors] if arrival.borrowed else arrival.tensors",
        "mine = arrival.tensors",
        "transport/transport_contract",
    ),
    Fault(
        "transport/inproc.py",
        "            if not receive.done and receive.peer in self._hub.gone:\n",
        "            if False:\n",
        "transport/transport_contract",
    ),
    Fault(
        "transport/collectives.py",
        "tensor = combine(so_far, tensor)",
        "tensor = combine(tensor, so_far)",
        "transport/collectives",
    ),
    # -- transport: sockets -------------------------------------------------------------------------
    Fault(
        "transport/sockets/handshake.py",
        "if role != self._role or peer != self._peer:",
        "if role != self._role:",
        "transport/sockets/handshake",
    ),
    Fault(
        "transport/sockets/handshake.py",
        "        if not hmac.compare_digest(data, due):\n",
        "        if False:\n",
        "transport/sockets/handshake",
    ),
    Fault(
        "transport/sockets/connection.py",
        "(self.behind or self.frames).append(",
        "self.frames.append(",
        "transport/cuda/staging",
    ),
    Fault(
        "transport/sockets/buffer_pool.py",
        "if self.idle_nbytes + nbytes > self._idle_limit:",
        "if False:",
        "transport/buffer_pool",
    ),
    Fault(
        "transport/sockets/reachability.py",
        "return bool(unacknowledged) and quiet_ms",
        "return quiet_ms",
        "transport/sockets/reachability",
    ),
    Fault(
        "transport/sockets/connection.py",
        'where = "in the middle of a frame" if self._decoder.mid_frame else "without a goodbye"',
        'where = "without a goodbye"',
        "transport/transport_contract transport/sockets/network",
    ),
    Fault(
        "transport/sockets/event_loop.py",
        "        if self._stopped or (self._timers and self._timers[0][0] < self._sleeps_until):\n",
        "        if self._stopped:\n",
        "transport/sockets/event_loop",
    ),
    # -- transport: shm, rendezvous, cuda, torch_dist -----------------------------------------------
    Fault(
        "transport/shm/arena.py",
        "        if os.getpid() == self._pid:\n            del",
        "        if True:\n            del",
        "transport/shm",
    ),
    Fault(
        "transport/shm/arena.py",
        "or offset + ALIGNMENT + nbytes > self._nbytes or",
        "or",
        "transport/shm",
    ),
    Fault(
        "transport/rendezvous/world_assembly.py",
        "if self._fits(member) and not self.missing():",
        "if not self.missing():",
        "transport/rendezvous",
    ),
    Fault(
        "transport/rendezvous/world_assembly.py",
        "        if member.joins > self.worlds:\n            raise",
        "        if False:\n            raise",
        "transport/rendezvous",
    ),
    Fault(
        "transport/cuda/ipc_sender.py",
        "            self._read[slot].wait(self._gpu.sends)\n",
        "",
        "transport/cuda/cuda_ipc",
    ),
    Fault(
        "transport/cuda/ipc_receiver.py",
        "            for stream in loan.streams:  # (those of copies too, when it was sent on: `keep`)\n                self._gpu.mark(stream).wait(self._gpu.returns)\n",
        "",
        "transport/cuda/cuda_ipc",
    ),
    Fault(
        "transport/torch_dist/off_stream.py",
        "        if self.arriving is not None:\n            self._hold(frame)\n",
        "        if False:\n            self._hold(frame)\n",
        "transport/torch_dist",
    ),
    Fault(
        "transport/registry.py",
        "auto = AUTO_ON_GPU if gpu else AUTO",
        "auto = AUTO",
        "worker/devices transport/transport_contract",
    ),
]


def copy_of_checkout(folder: Path) -> Path:
    """Copy what git would carry, changed files as they are."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def problems(root: Path, faults: Sequence[Fault]) -> list[str]:
    """Return which faults cannot be made, and why."""
    found = []
    for fault in faults:
        path = root / fault.file
        count = path.read_text().count(fault.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{fault.file}: {count} times instead of once: {fault.old!r}")
        for name in test_files(fault):
            if not (root / name).is_file():
                found.append(f"{fault.file}: there is no {name}")
    return found


def test_files(fault: Fault) -> list[str]:
    """Return the paths of a fault's test files."""
    pairs = (word.rpartition("/") for word in fault.tests.split())
    return [f"tests/{room}{slash}test_{name}.py" for room, slash, name in pairs]


def run(root: Path, files: Sequence[str], *, alone: bool) -> tuple[str, float]:
    """Run pytest with -x; return the line of the first failure, or "" when all passed; seconds."""
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={root.parent / 't'}"]
    if alone:
        options += ["-o", "addopts="]  # in this process, not by workers
    environ = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    began = time.monotonic()
    limit_s = LIMIT_S if alone else 10 * LIMIT_S
    try:
        ended = subprocess.run(
            command,
            cwd=root,
            env=environ,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not over after {limit_s:g} s", limit_s
    took = time.monotonic() - began
    if ended.returncode == 0:
        return "", took
    lines = ended.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "Timeout"))]
    last = [line for line in lines[-3:] + ended.stderr.splitlines()[-1:] if line]
    return (failed or last or [f"exit code {ended.returncode}"])[0], took


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults; return the exit code."""
    parser = argparse.ArgumentParser(prog="python tests/code_mutations.py")
    parser.add_argument("--only", nargs="+", default=[""], help="faults with one of these words")
    parser.add_argument("--check", action="store_true", help="only look for the texts")
    parser.add_argument("--whole", action="store_true", help="survivors on the whole suite too")
    parser.add_argument("--part", default="1/1", help="the first of two parts of all: 1/2")
    options = parser.parse_args(arguments)
    number, parts = map(int, options.part.split("/"))
    wanted = [f for f in FAULTS if any(word in f.file + f.old + f.tests for word in options.only)]
    chosen = wanted[number - 1 :: parts]
    if wrong := problems(ROOT, chosen):
        print("\n".join(wrong))
        return 2
    rooms = len({fault.file.rpartition("/")[0] for fault in chosen})
    print(f"{len(chosen)} faults in {rooms} folders", flush=True)
    if options.check:
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="m-") as scratch:
        root = copy_of_checkout(Path(scratch) / "c")
        files = sorted({name for fault in chosen for name in test_files(fault)})
        broken = {}
        for name in files:
            why = run(root, [name], alone=True)[0]
            if why and run(root, [name], alone=True)[0]:  # twice: the machine may be busy
                broken[name] = why
        for name, why in broken.items():
            print(f"without any fault {name} fails: {why}", flush=True)
        for fault in chosen:
            path = root / fault.file
            text = path.read_text()
            path.write_text(text.replace(fault.old, fault.new))
            ours = [name for name in test_files(fault) if name not in broken]
            why, took = run(root, ours, alone=True)
            if not why and options.whole:
                why, took = run(root, [], alone=False)
            path.write_text(text)
            if not why:
                survivors.append(fault)
            told = f"caught   {took:5.1f} s  {fault.file}: {why[:150]}"
            print(
                told if why else f"SURVIVED {took:5.1f} s  {fault.file}: {fault.old!r}", flush=True
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
