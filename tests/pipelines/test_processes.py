"""Workers exit when their command is killed, and ranks when their launcher is."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from pipelines.runtime.errors import RunError
from pipelines.runtime.processes import run_all

SLEEPERS = """
from pipelines.runtime.processes import run_all
# One write for `up` and newline, since two processes share the pipe.
task = "import os, time; os.write(1, bytes([117, 112, 10])); time.sleep(600)"
list(run_all(exec, [task] * 2, 2, remote={remote}))
"""


@pytest.mark.parametrize("remote", [False, True], ids=["fork", "forkserver"])
def test_workers_exit_with_a_killed_parent_that_is_not_reaped(remote: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS.format(remote=remote)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
        # Not reaped, so that it stays a zombie with a process id.
        os.kill(process.pid, signal.SIGKILL)
        # At end of file once the last process that can write has exited.
        assert select.select([process.stdout], [], [], 20)[0], "the workers are still running"
        assert process.stdout.read() == b""
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


RANK = """
import os, sys, time
from pipelines.runtime.processes import follow_launcher
follow_launcher("unet train")
os.write(1, b"up\\n")
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"])
def test_a_rank_exits_when_its_launcher_is_killed(variable: str) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        env={**os.environ, variable: "no"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    try:
        assert launcher.stdout.readline() == b"up\n"
        launcher.kill()
        # At end of file once the rank has exited too.
        assert select.select([launcher.stdout], [], [], 20)[0], "the rank is still running"
        assert launcher.stdout.read() == b""
        assert launcher.stderr.read() == b"unet train: the launcher was killed; rerun its command\n"
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()


def test_a_process_without_a_launcher_outlives_its_parent() -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, start_new_session=True
    )
    assert started.stdout is not None
    try:
        assert started.stdout.readline() == b"up\n"
        started.kill()
        # As after `nohup unet train &` and a logout.
        assert not select.select([started.stdout], [], [], 3)[0], "the process has exited"
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def test_a_worker_that_is_killed_while_it_starts_is_one_error(monkeypatch) -> None:
    def submit(*_: object) -> None:
        raise BrokenProcessPool("A child process terminated abruptly")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(RunError, match=r"^a worker process was killed \(out of memory\?\); rerun"):
        list(run_all(abs, [1, 2], 2))
