"""What every test needs: one compute thread, the demos within reach; and the suite's options.

    python -m pytest                        all tests, by three workers
    python -m pytest tests/launch -n 0      in one process, as without -n for files that are named
    python -m pytest --matrix=all           every case of the fault matrix, and every combination
                                            where otherwise any two values meet (covering.py): hours
    python -m pytest --matrix=500           so many cases of the fault matrix
    python -m pytest -m gpu                 what needs a GPU

The folders are those of barepp/ and transport/; what tests share is in helpers/.
"""

import gc
import os
import random
import signal
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpus import why_no_gpu

pytest.register_assert_rewrite("jobs", "clusters")  # their assertions explain themselves as well

from clusters import TRAIN, the_digest  # noqa: E402
from jobs import ROOT, write_script  # noqa: E402
from starter import Starter  # noqa: E402

sys.path.insert(0, str(ROOT / "demos"))  # as when a demo runs: its own folder comes first

# Workers of pytest-xdist. Most tests are several processes themselves, and many of them wait. Tests
# that look at how long something took, or load the machine, are marked `xdist_group("timed")`: they
# run one after the other.
WORKERS = 3
SEED = pytest.StashKey[int]()
TOLD_MS = pytest.StashKey[list[float]]()


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread() -> None:
    # With more threads a sum is cut into more parts, and rounds differently.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    # Every count of what a test leaves behind runs the collector, which takes 0.2 s to look at all
    # that torch has imported. That is there to stay.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and why_no_gpu():
        pytest.skip(why_no_gpu())


# -- two workers ----------------------------------------------------------------------------------


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many workers `-n auto` (pyproject.toml) has: none for files that are named."""
    named = any(".py" in argument for argument in config.args)
    one_only = config.option.markexpr == "gpu" or config.getoption("--wire") is not None
    return 0 if named or one_only else WORKERS


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker the controller's seed: all workers have to collect the same cases."""
    node.workerinput["matrix_seed"] = node.config.stash[SEED]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["told_ms"] = session.config.stash[TOLD_MS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[TOLD_MS].extend(getattr(node, "workeroutput", {}).get("told_ms", []))


# -- scripts that are started in a tenth of a second ----------------------------------------------


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    with Starter() as made:
        yield made


@pytest.fixture(scope="session")
def undisturbed(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process learns by `TRAIN`."""
    script = write_script(tmp_path_factory.mktemp("alone"), TRAIN)
    end = starter.start(script, {}).wait()
    assert end.code == 0, end.err
    return the_digest(end.out)


# -- test_fault_matrix.py -------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        default="40",
        help="how many cases of the fault matrix; all: those, and every product of factors in full",
    )
    parser.addoption(
        "--wire",
        type=float,
        help="run the worlds over tcp between two hosts, so many seconds apart",
    )
    parser.addoption(
        "--torchrun",
        action="store_true",
        help="more failures, and gloo, under the real torchrun: three minutes",
    )
    parser.addoption("--matrix-seed", type=int, default=os.environ.get("BAREPP_MATRIX_SEED"))


def pytest_configure(config: pytest.Config) -> None:
    delay_s = config.getoption("--wire")
    if delay_s is not None:
        import far

        config.add_cleanup(far.arrange(delay_s).close)
    # xdist tells its workers how wide the controller's terminal is; what we draw would heed it.
    os.environ.pop("COLUMNS", None)
    # `nohup` and shells' background jobs ignore these; a test's launcher would inherit that, and
    # rightly ignore what the test sends it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = getattr(config, "workerinput", {}).get("matrix_seed")  # by the controller
    given = config.getoption("--matrix-seed") if told is None else told
    config.stash[SEED] = random.randrange(10**6) if given is None else int(given)
    config.stash[TOLD_MS] = []


def pytest_report_header(config: pytest.Config) -> str:
    count, seed = config.getoption("--matrix"), config.stash[SEED]
    if count == "all":
        return "fault matrix: all cases"
    again = f"--matrix={count} --matrix-seed={seed}"
    return f"fault matrix: {count} cases; these again: {again}, all: --matrix=all"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        import matrix

        count, seed = metafunc.config.getoption("--matrix"), metafunc.config.stash[SEED]
        drawn = matrix.cases() if count == "all" else matrix.sample(int(count), seed)
        metafunc.parametrize("case", drawn, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix") != "all":
        rest = [item for item in items if item.get_closest_marker("rest") is not None]
        if rest:
            config.hook.pytest_deselected(items=rest)
            items[:] = [item for item in items if item.get_closest_marker("rest") is None]


@pytest.fixture
def full_products(request: pytest.FixtureRequest) -> bool:
    """Whether a test that draws its own combinations shall take all of them."""
    return bool(request.config.getoption("--matrix") == "all")


@pytest.fixture
def told_ms(request: pytest.FixtureRequest) -> list[float]:
    return request.config.stash[TOLD_MS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    told = config.stash[TOLD_MS]
    if told:
        middle, worst = statistics.median(told), max(told)
        terminalreporter.write_line(pytest_report_header(config))
        terminalreporter.write_line(
            f"{len(told)} survivors raised after {middle:.1f} ms (median), {worst:.1f} ms (worst)"
        )
