"""The job's secret where no launcher of ours hands it over: who may read it, and what is left."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ROOT
from transport_worlds import SOON_S, start

from barepp.errors import UsageError
from barepp.worker.external.secret import SharedSecret, _started, given_secret


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def own(folder: Path) -> Path:
    return folder / f"barepp-{os.geteuid()}"


def test_the_environment_gives_it_or_a_file(tmp_path: Path) -> None:
    assert given_secret({}) is None
    assert given_secret({"BAREPP_SECRET": "0123456789abcdef"}) == b"0123456789abcdef"
    assert given_secret({"BAREPP_SECRET": "0123456789abcdef\udcff"}) == b"0123456789abcdef\xff"
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef in a file\n")
    path.chmod(0o600)
    given = {"BAREPP_SECRET_FILE": str(path)}
    assert given_secret(given) == b"0123456789abcdef in a file"
    path.chmod(0o640)
    with pytest.raises(UsageError, match="has mode 0640: others may read it; chmod 600 it"):
        given_secret(given)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(UsageError, match=r"has 5 bytes, which can be guessed: it needs 16"):
        given_secret(given)
    path.unlink()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        given_secret(given)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match="belongs to user 12345"):
        given_secret({"BAREPP_SECRET_FILE": str(path)})


def test_the_others_wait_for_it_and_only_we_can_read_it(temporary_folder: Path) -> None:
    reading = start(lambda: SharedSecret("user-run/1-29501").read(SOON_S))
    published = SharedSecret("user-run/1-29501")
    secret = published.publish()
    assert len(secret) == 32
    assert reading.result(SOON_S).secret == secret
    folder = own(temporary_folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["user-run_1-29501.secret"]
    assert stat.S_IMODE(published.path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="belongs to a job that is running"):
        SharedSecret("user-run/1-29501").publish()
    published.remove()
    published.remove()
    assert not folder.exists()
    with pytest.raises(UsageError, match=r"has not left the job's secret in .* within 0\.1 s"):
        published.read(0.1)


def test_what_a_dead_process_has_left_is_not_believed_and_removed(temporary_folder: Path) -> None:
    shared = SharedSecret("x")
    killed = f"""
import sys, os, tempfile; tempfile.tempdir = {str(temporary_folder)!r}
from barepp.worker.external.secret import SharedSecret
shared = SharedSecret("x"); shared.publish()
os.link(shared.path, str(shared.path) + f".{{os.getpid()}}")   # as if it died in between
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", killed], env=environ, check=True, timeout=60)
    assert len(list(own(temporary_folder).iterdir())) == 2
    with pytest.raises(UsageError, match="has not left"):
        shared.read(0.05)
    # Not even when its number belongs to another process by now.
    content = json.loads(shared.path.read_text())
    shared.path.write_text(json.dumps({**content, "pid": os.getpid()}))
    with pytest.raises(UsageError, match="has not left"):
        shared.read(0.05)
    secret = shared.publish()
    assert shared.read(1.0).secret == secret
    assert list(own(temporary_folder).iterdir()) == [shared.path]


def test_a_dead_process_of_the_same_launcher_was_rank_0_of_this_very_job(
    temporary_folder: Path,
) -> None:
    """One of another launcher may be of an earlier run; one without a launcher, of any."""
    published = f"""
import sys, tempfile; tempfile.tempdir = {str(temporary_folder)!r}
from barepp.worker.external.secret import SharedSecret
SharedSecret("x", launched=bool(int(sys.argv[1]))).publish()
"""
    reading = f"""
import sys, tempfile; tempfile.tempdir = {str(temporary_folder)!r}
from barepp.worker.external.secret import SharedSecret
print(SharedSecret("x", launched=bool(int(sys.argv[1]))).read(0.05).alive)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}

    def read_after(wrote: str, reads: str, *shell: str) -> str:
        for code, how in ((published, wrote), (reading, reads)):
            command = [*(shell if code is published else ()), sys.executable, "-c", code, how]
            ended = subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=60, check=False
            )
        return (ended.stdout + ended.stderr).strip().splitlines()[-1]

    assert read_after("1", "1") == "False"
    assert "has not left" in read_after("0", "0")
    assert "has not left" in read_after("1", "0")
    assert "has not left" in read_after("1", "1", "sh", "-c", '"$@"; true', "sh")


def test_a_process_that_has_ended_and_was_not_collected_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").exists() and _started(process.pid) == ""
    assert _started(os.getpid()) != ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1}', '{"pid": "x"}'])
def test_a_file_that_makes_no_sense_is_no_secret(content: str) -> None:
    shared = SharedSecret("x")
    shared.path.parent.mkdir(mode=0o700)
    shared.path.touch(mode=0o600)
    shared.path.write_text(content)
    with pytest.raises(UsageError, match="has not left"):
        shared.read(0.02)


def test_a_file_that_is_not_ours_alone_is_no_secret() -> None:
    shared = SharedSecret("x")
    secret = shared.publish()
    shared.path.chmod(0o644)
    with pytest.raises(UsageError, match="has not left"):
        shared.read(0.02)
    shared.path.chmod(0o600)
    assert shared.read(0.02).secret == secret
    elsewhere = shared.path.rename(shared.path.with_suffix(".elsewhere"))
    shared.path.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="has not left"):
        shared.read(0.02)
    if os.geteuid() == 0:
        shared.path.unlink()
        elsewhere.rename(shared.path)
        os.chown(shared.path, 12345, 12345)
        with pytest.raises(UsageError, match="has not left"):
            shared.read(0.02)


def refused() -> None:
    with pytest.raises(UsageError, match="is not a folder of yours with mode 0700"):
        SharedSecret("x").publish()
    with pytest.raises(UsageError, match="is not a folder of yours with mode 0700"):
        SharedSecret("x").read(0.02)


def test_what_stands_in_the_folders_place_is_refused(temporary_folder: Path) -> None:
    folder = own(temporary_folder)
    elsewhere = temporary_folder / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    refused()
    folder.unlink()
    folder.write_text("a file")
    refused()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o755)
    refused()
    if os.geteuid() == 0:
        folder.chmod(0o700)
        os.chown(folder, 12345, 12345)
        refused()
