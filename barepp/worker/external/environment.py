"""Reads from the environment which other launcher has started this process, and as which rank.

    torchrun    RANK WORLD_SIZE MASTER_ADDR MASTER_PORT   (and any launcher that sets these four)
                LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    srun        SLURM_PROCID SLURM_NTASKS SLURM_STEP_NODELIST
                SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_ID

torchrun's come first, because it may itself have been started by srun. The rendezvous is at the
host of rank 0: MASTER_ADDR, else the first one of Slurm's node list. Its port is the first of

    BAREPP_PORT
    MASTER_PORT + 1                             torchrun's own store listens at MASTER_PORT
    20000 + (job + 1009 * step) mod 12000       Slurm: below the ports that the kernel hands out

Everything here is a pure function of a mapping; sources are torchrun's manual ("Environment
Variables") and srun(1), "OUTPUT ENVIRONMENT VARIABLES".
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final

from barepp.errors import UsageError
from barepp.worker.devices import chosen_device
from barepp.worker.spec import MAX_SECONDS, Options

TORCHRUN: Final = "torchrun"
SRUN: Final = "srun"
LOOPBACK: Final = "127.0.0.1"
_NODE_LISTS: Final = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_RANGE: Final = r"\d+(?:-\d+)?"
_NODES: Final = rf"(?:[^\[\],]|\[{_RANGE}(?:,{_RANGE})*\])+"  # between two commas of a node list
_PORTS: Final = range(1, 65536)


@dataclasses.dataclass(frozen=True)
class Started:
    """What another launcher says of this process.

    Attributes:
        by: the launcher, "torchrun" or "srun".
        rank, world_size: its number, and how many ranks there are.
        local_rank: its number among the ranks of its host.
        host, port: where rank 0 serves the rendezvous.
        one_host: whether all ranks are on one host. The rendezvous is at its loopback then.
        run: tells this run from others of the same user on one host.
    """

    by: str
    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    one_host: bool
    run: str


def started_by_others(environ: Mapping[str, str]) -> Started | None:
    """Return what another launcher says; None when none has started more than this process.

    Raises:
        UsageError: one has, but what it says is incomplete or makes no sense.
    """
    launchers = (
        ("WORLD_SIZE", "RANK", TORCHRUN, _by_torchrun),
        ("SLURM_NTASKS", "SLURM_PROCID", "Slurm's srun", _by_srun),
    )
    for size, rank, _, read in launchers:
        if rank in environ and size in environ:
            started = read(environ) if _number(environ, size) > 1 else None
            if started is not None and started.rank >= started.world_size:
                ranks = f"ranks 0 to {started.world_size - 1}"
                raise UsageError(f"{rank}={started.rank}, but the world has {ranks}")
            return started
    # Each of its processes would silently train a model of its own.
    for size, rank, who, _ in launchers:
        if environ.get(size, "1") != "1":
            raise UsageError(
                f"{size}={environ[size]}, but {rank} is not set: start the script by {who}, "
                "which sets both, or by python -m barepp.launch"
            )
    return None


def _by_torchrun(environ: Mapping[str, str]) -> Started:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise UsageError(
                f"RANK and WORLD_SIZE are set, but {name} is not: all ranks need the address of "
                "rank 0; torchrun sets it"
            )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    host = environ["MASTER_ADDR"]
    if "LOCAL_WORLD_SIZE" in environ:
        one_host = _number(environ, "LOCAL_WORLD_SIZE") == world_size
    else:
        one_host = host in ("localhost", "::1") or host.startswith("127.")
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Started(
        TORCHRUN,
        rank,
        world_size,
        _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank,
        LOOPBACK if one_host else host,
        _port(environ, 0),
        one_host,
        f"{environ.get('TORCHELASTIC_RUN_ID', 'none')}.{restart}",
    )


def _by_srun(environ: Mapping[str, str]) -> Started:
    found = [name for name in _NODE_LISTS if environ.get(name)]
    if not found and "MASTER_ADDR" not in environ:
        raise UsageError(f"SLURM_PROCID is set, but neither {_NODE_LISTS[0]} nor MASTER_ADDR is")
    node, one_host = first_node(environ[found[0]]) if found else ("", False)
    rank = _number(environ, "SLURM_PROCID")
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    host = environ.get("MASTER_ADDR") or node
    return Started(
        SRUN,
        rank,
        _number(environ, "SLURM_NTASKS"),
        _number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else rank,
        LOOPBACK if one_host else host,
        _port(environ, 20000 + (numbers[0] + 1009 * numbers[1]) % 12000),
        one_host,
        f"{job}.{step}",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{name} is a number, not {text!r:.100}")
    return int(text)


def _port(environ: Mapping[str, str], otherwise: int) -> int:
    """Return the port of the rendezvous by the table at the top."""
    if "BAREPP_PORT" in environ:
        name, port = "BAREPP_PORT", _number(environ, "BAREPP_PORT")
    elif "MASTER_PORT" in environ:
        name, port = "MASTER_PORT + 1", _number(environ, "MASTER_PORT") + 1
    else:
        return otherwise
    if port not in _PORTS:
        raise UsageError(f"{name} is a port, 1 to 65535, not {port}; BAREPP_PORT sets another one")
    return port


# -- the limits, which are flags of our own launcher ----------------------------------------------

_SECONDS: Final = {
    "BAREPP_HEARTBEAT": "heartbeat_s",
    "BAREPP_TIMEOUT": "timeout_s",
    "BAREPP_GRACE": "grace_s",
    "BAREPP_JOIN_TIMEOUT": "join_timeout_s",
}


def options_from(world_size: int, environ: Mapping[str, str]) -> Options:
    """Return what BAREPP_TRANSPORT, _DEVICE, _CHECKSUM, and of the limits _HEARTBEAT and so on say.

    They mean what the launcher's flags of those names do, and must be the same on all ranks.

    Raises:
        UsageError: a limit is not a number of seconds, or transport and device contradict.
        UnknownTransport: there is no such transport.
    """
    transport = environ.get("BAREPP_TRANSPORT", "auto")
    options = Options(
        world_size,
        transport,
        device=chosen_device(environ.get("BAREPP_DEVICE"), transport),
        checksum=environ.get("BAREPP_CHECKSUM", "0") not in ("", "0"),
    )
    limits: dict[str, Any] = {
        field: _seconds(environ, name) for name, field in _SECONDS.items() if name in environ
    }
    return dataclasses.replace(options, **limits)


def _seconds(environ: Mapping[str, str], name: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(environ[name])) <= MAX_SECONDS:
            return seconds
    text = f"{name} is in seconds, from 0 to {MAX_SECONDS:g}"
    raise UsageError(f"{text}, not {environ[name]!r:.100}")


# -- Slurm's node lists ---------------------------------------------------------------------------


def first_node(text: str) -> tuple[str, bool]:
    """Return the first host of a node list in its compressed form, and whether it is the only one.

    "node[01-03,07],login" begins with node01; a name may have several brackets.

    Raises:
        UsageError: it is not a node list.
    """
    brackets = re.findall(r"\[(.*?)\]", text)
    ranges = re.findall(r"(\d+)-(\d+)", ",".join(brackets))
    whole = re.fullmatch(f"({_NODES})(?:,{_NODES})*", text)
    if whole is None or any(int(low) > int(high) for low, high in ranges):
        raise UsageError(f"this is not a node list of Slurm's: {text!r:.200}")
    alone = whole[1] == text and all(re.fullmatch(r"(\d+)(-\1)?", numbers) for numbers in brackets)
    return re.sub(r"\[(\d+).*?\]", r"\1", whole[1]), alone
