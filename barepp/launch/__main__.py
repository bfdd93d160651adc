"""`python -m barepp.launch --world 4 script.py`: runs a script on several ranks, here or on hosts.

On several hosts the same command is given on each, with --nodes, --node-rank and --rendezvous: see
protocol.py. The exit code is the same on all of them, as far as they could still hear of each
other.

Exit code: 0 when every rank ended well; else the failing script's own (an exception is 1),
128 + signal for a rank killed by a signal, 124 for a job that hung, 130, 143 or 129 when the
launcher itself was sent SIGINT, SIGTERM or SIGHUP, and 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from barepp.errors import BareppError, UsageError
from barepp.launch.hosts.node_agent import tell_refusal
from barepp.launch.hosts.protocol import Nodes
from barepp.launch.job import Job
from barepp.launch.output import EventLog, Output
from barepp.launch.report import tell
from barepp.monitor.client import line_to
from barepp.monitor.rates import looks
from barepp.monitor.table import MIN_INTERVAL_S, interval, picture
from barepp.monitor.terminal import size_of
from barepp.worker.devices import DEVICES, chosen_device
from barepp.worker.external.secret import NO_TLS, given_secret
from barepp.worker.spec import MAX_SECONDS, Options, Script
from transport.errors import TransportError
from transport.registry import check_name, transport_names
from transport.sockets.addresses import is_loopback

MAX_WORLD: Final = 1024

_LIMITS: Final = (
    ("--heartbeat", 10.0, "that a rank may give no sign of life; 0 for ever"),
    ("--timeout", 300.0, "that ranks may wait while nothing moves anywhere; 0 for ever"),
    ("--grace", 0.5, "between the first failure and the end of ranks that are still busy"),
    ("--join-timeout", 60.0, "between the first rank's init() and the last one's"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parsed = _parser().parse_args(arguments)
    nodes = None
    try:
        _check(parsed)
        nodes = _nodes(parsed)
        _check_script(parsed)
        log_dir = _prepared(parsed.log_dir)
        events = EventLog(log_dir / "events.jsonl" if log_dir is not None else None)
    except OSError as error:
        return _refuse(f"the events cannot be written: {error}", nodes, parsed.world)
    except (UsageError, TransportError) as error:
        return _refuse(error, nodes, parsed.world)
    if nodes is not None and nodes.node == 0 and not is_loopback(nodes.host):
        print(NO_TLS, file=sys.stderr)
    options = Options(
        parsed.world,
        parsed.transport,
        parsed.grace,
        parsed.join_timeout,
        parsed.heartbeat,
        parsed.timeout,
        parsed.checksum,
        device=chosen_device(parsed.device, parsed.transport),
        stacks_on_quit=True,
    )
    task = Script(parsed.script, tuple(parsed.args))
    try:
        with Output(log_dir) as output:
            with watching(output, parsed.interval) if parsed.watch else nullcontext():
                outcome = Job(task, options, output, events, nodes=nodes).run()
            tell(outcome, output)
    except UsageError as error:
        return _refuse(error)
    except TransportError as error:  # node 0 cannot listen, or be reached
        _refuse(error)
        return 1
    except KeyboardInterrupt:  # the job has ended, only its output has not
        return 130
    finally:
        events.close()
    return outcome.exit_code


def _refuse(why: object, nodes: Nodes | None = None, world_size: int = 0) -> int:
    """Say why nothing is started here; to node 0 as well, which would wait for this node."""
    print(f"barepp.launch: {why}", file=sys.stderr)
    if nodes is not None and nodes.node != 0:
        tell_refusal(nodes, world_size, str(why))
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m barepp.launch",
        description="Run a script on several ranks, on one machine or on several.",
        epilog="While it runs, Ctrl-\\ (SIGQUIT to this process) prints every rank's Python stack "
        "and who waits for whom, as python -m barepp.stacks does from elsewhere; the job goes on.",
    )
    parser.add_argument(
        "--world",
        type=int,
        required=True,
        metavar="N",
        help="number of ranks (processes), on all nodes",
    )
    parser.add_argument(
        "--transport",
        default="auto",
        help=f"how tensors travel: {', '.join(transport_names())} (default: auto)",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"where the ranks compute: {', '.join(DEVICES)}; auto is cuda if all find a GPU "
        "(default: cpu, and cuda where the transport is for that)",
    )
    parser.add_argument(
        "--checksum",
        action="store_true",
        help="let each payload that crosses a socket carry a sum, which its receiver checks",
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="write rank0.log ... and events.jsonl there"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show what every rank does in a table, which rich (pip install 'barepp[ui]') keeps "
        "below what the ranks print; python -m barepp.top shows it in another terminal",
    )
    parser.add_argument(
        "--interval", type=interval, default=1.0, metavar="S", help="seconds between pictures (1)"
    )
    for flag, default, what in _LIMITS:
        parser.add_argument(
            flag, type=float, default=default, metavar="S", help=f"seconds {what} ({default:g})"
        )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of hosts")
    parser.add_argument(
        "--node-rank", type=int, metavar="I", help="which of them this is, from 0; node 0 decides"
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="where node 0 is reached, the same on all nodes"
    )
    parser.add_argument(
        "--address",
        default="",
        metavar="HOST",
        help="where other nodes reach this one (default: where it reaches node 0 from)",
    )
    parser.add_argument("script", help="the Python file that every rank runs")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _check(parsed: argparse.Namespace) -> None:
    """Find what cannot work before any process starts."""
    if not 1 <= parsed.world <= MAX_WORLD:
        raise UsageError(f"--world is the number of ranks, 1 to {MAX_WORLD}, not {parsed.world}")
    if check_name(parsed.transport) == "inproc" and parsed.world > 1:
        raise UsageError(
            "--transport inproc is for ranks that are threads of one process (barepp.run); "
            "the launcher starts processes"
        )
    chosen_device(parsed.device, parsed.transport)
    for flag, _, _ in _LIMITS:
        value = getattr(parsed, flag.lstrip("-").replace("-", "_"))
        if not 0 <= value <= MAX_SECONDS:
            raise UsageError(f"{flag} is in seconds, from 0 to {MAX_SECONDS:g}, not {value}")


def _check_script(parsed: argparse.Namespace) -> None:
    """Find a script that no rank could run; on this host, it may be another one elsewhere."""
    script = Path(parsed.script)
    if not script.is_file():
        what = "is a directory" if script.is_dir() else "does not exist"
        raise UsageError(f"the script {parsed.script} {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ranks will say it
            compile(script.read_bytes(), parsed.script, "exec", dont_inherit=True)
    except OSError as error:
        raise UsageError(f"the script {parsed.script} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"the script {parsed.script} is not valid Python: {error}") from error


def _nodes(parsed: argparse.Namespace) -> Nodes | None:
    """Return which launcher of several this is; None when there is one."""
    count, node = parsed.nodes, parsed.node_rank
    if not 1 <= count <= parsed.world:
        text = f"--nodes is the number of hosts, from 1 to the number of ranks, {parsed.world}"
        raise UsageError(f"{text}, not {count}")
    if not 0 <= (node or 0) < count:
        raise UsageError(f"--node-rank is from 0 to {count - 1} with --nodes {count}, not {node}")
    if count == 1:
        return None
    if node is None or parsed.rendezvous is None:
        raise UsageError(
            f"--nodes {count} needs --node-rank, which of them this is, and --rendezvous, the "
            "HOST:PORT where node 0 is reached"
        )
    match = re.fullmatch(r"(?:\[(.+)\]|([^:]+)):(\d{1,5})", parsed.rendezvous)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UsageError(
            f"--rendezvous is HOST:PORT, or [ADDRESS]:PORT for IPv6, not {parsed.rendezvous!r}"
        )
    secret = given_secret(os.environ)
    if secret is None:
        raise UsageError(
            "several nodes need a secret that they share: set BAREPP_SECRET_FILE to a file that "
            "only you can read (mode 0600), with the same content on all nodes, or BAREPP_SECRET"
        )
    return Nodes(node, count, match[1] or match[2], int(match[3]), secret, parsed.address)


def _prepared(log_dir: Path | None) -> Path | None:
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--log-dir {log_dir} cannot be made: {error.strerror or error}"
            ) from error
    return log_dir


@contextlib.contextmanager
def watching(output: Output, interval_s: float) -> Iterator[None]:
    """Show the job that this process launches in the block, below what its ranks print."""
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch_own_job, args=(output, interval_s, stop), name="barepp-watch", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        output.let_stand()


def _watch_own_job(output: Output, interval_s: float, stop: threading.Event) -> None:
    while not stop.wait(MIN_INTERVAL_S):
        with (
            contextlib.suppress(BareppError),  # it has not started yet, or has just ended
            line_to(str(os.getpid())) as line,
        ):
            for job, readings in looks(line, interval_s, stop):
                size = size_of(2)
                output.show_below(picture(job, readings, size), size)


if __name__ == "__main__":
    sys.exit(main())
