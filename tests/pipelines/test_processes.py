"""Parallel tasks: workers exit when their command is killed."""

import os
import select
import signal
import subprocess
import sys

import pytest

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
