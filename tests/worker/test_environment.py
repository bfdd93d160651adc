"""What torchrun and srun say in the environment, and the limits that stand there for us."""

from __future__ import annotations

import itertools

import pytest

from barepp.errors import UsageError
from barepp.worker.external.environment import Started, first_node, options_from, started_by_others
from barepp.worker.spec import Options
from transport.errors import UnknownTransport

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job 5/a",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "node[09-10]",
    "SLURM_JOB_NODELIST": "node[01-20]",
}


def test_torchruns_variables() -> None:
    run = "job 5/a.2"
    assert started_by_others(TORCHRUN) == Started(
        "torchrun", 3, 4, 1, "node07", 29501, one_host=False, run=run
    )
    here = {**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "BAREPP_PORT": "4711"}
    assert started_by_others(here) == Started(
        "torchrun", 3, 4, 1, "127.0.0.1", 4711, one_host=True, run=run
    )


@pytest.mark.parametrize(
    ("address", "one_host"), [("localhost", True), ("127.0.0.1", True), ("::1", True), ("a", False)]
)
def test_four_variables_are_enough(address: str, one_host: bool) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "1000"}
    started = started_by_others(given)
    assert started is not None
    assert (started.one_host, started.port, started.rank) == (one_host, 1001, 1)


def test_slurms_variables() -> None:
    port = 20000 + (1234 + 3 * 1009) % 12000
    assert started_by_others(SRUN) == Started(
        "srun", 5, 8, 1, "node09", port, one_host=False, run="1234.3"
    )
    one = started_by_others({**SRUN, "SLURM_STEP_NODELIST": "node09"})
    assert one is not None and (one.host, one.one_host) == ("127.0.0.1", True)
    told = started_by_others({**SRUN, "MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "5000"})
    assert told is not None and (told.host, told.port) == ("10.0.0.9", 5001)
    without = {name: value for name, value in SRUN.items() if "STEP" not in name}
    fallen_back = started_by_others(without)
    assert fallen_back is not None and fallen_back.host == "node01"


def test_torchrun_under_srun_is_torchrun() -> None:
    started = started_by_others({**SRUN, **TORCHRUN})
    assert started is not None and started.by == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7"},
    ],
)
def test_a_process_alone_is_started_by_nobody(environ: dict[str, str]) -> None:
    assert started_by_others(environ) is None


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK is not set"),
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4, but SLURM_PROCID is not set"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR is not: all ranks need the address"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, but the world has ranks 0 to 3"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is a number, not '-1'"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE is a number, not 'four'"),
        ({**TORCHRUN, "MASTER_PORT": "65535"}, "a port, 1 to 65535, not 65536; BAREPP_PORT sets"),
        ({**TORCHRUN, "BAREPP_PORT": "0"}, "BAREPP_PORT is a port"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "neither SLURM_STEP_NODELIST nor MASTER_ADDR"),
    ],
)
def test_what_is_incomplete_is_refused_in_a_sentence(environ: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        started_by_others(environ)


# -- node lists -----------------------------------------------------------------------------------

NODE_LISTS = {
    "a": ("a", True),
    "a,b": ("a", False),
    "node[01-03,07],other": ("node01", False),
    "node[9-11]": ("node9", False),
    "node[099-101]": ("node099", False),
    "n[1,3-4]-ib,m2": ("n1-ib", False),
    "rack[1-2]node[08-09]": ("rack1node08", False),
    "rack[2]node[08-08]": ("rack2node08", True),
    "rack[2]node[08,09]": ("rack2node08", False),
    "gpu-a100-[12].cluster": ("gpu-a100-12.cluster", True),
    "10.0.0.[1-2]": ("10.0.0.1", False),
    "10-9": ("10-9", True),
    "a[0-99999999999]": ("a0", False),
}


@pytest.mark.parametrize("text", NODE_LISTS)
def test_the_first_of_a_node_list_and_whether_it_is_the_only_one(text: str) -> None:
    assert first_node(text) == NODE_LISTS[text]


def test_what_is_compressed_has_the_first_name_that_it_was_made_of() -> None:
    for width, first, more in itertools.product((1, 2, 4), (0, 7, 95), (0, 1, 9)):
        text = f"x[{first:0{width}}-{first + more:0{width}}]"
        assert first_node(text) == (f"x{first:0{width}}", more == 0)
        assert first_node(f"{text},y") == (f"x{first:0{width}}", False)


@pytest.mark.parametrize(
    "text", ["", "a,", ",a", "a[", "a]", "a[1", "a[]", "a[1-]", "a[2-1]", "a[[1]]", "a[x]",
             "a[1]]", "a[1,]", "a[1 ]"]
)  # fmt: skip
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a node list"):
        first_node(text)


# -- limits ---------------------------------------------------------------------------------------


def test_limits_are_those_of_the_launchers_flags() -> None:
    assert options_from(4, {}) == Options(4)
    given = {
        "BAREPP_TRANSPORT": "tcp",
        "BAREPP_CHECKSUM": "1",
        "BAREPP_HEARTBEAT": "5",
        "BAREPP_TIMEOUT": "0",
        "BAREPP_GRACE": "0.25",
        "BAREPP_JOIN_TIMEOUT": "7",
    }
    assert options_from(2, given) == Options(2, "tcp", 0.25, 7.0, 5.0, 0.0, checksum=True)


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "1e9", ""])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="BAREPP_GRACE is in seconds, from 0 to 1e"):
        options_from(2, {"BAREPP_GRACE": text})


def test_a_transport_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownTransport, match="these exist"):
        options_from(2, {"BAREPP_TRANSPORT": "pigeon"})
