"""Work side by side: nobody works on for a command that was killed."""

import os
import select
import signal
import subprocess
import sys

import pytest

SLEEPERS = """
from pipelines.parallel import run_all
# `up` and a line's end in one write: two processes share the pipe.
piece = "import os, time; os.write(1, bytes([117, 112, 10])); time.sleep(600)"
list(run_all(exec, [piece] * 2, 2, remote={remote}))
"""


@pytest.mark.parametrize("remote", [False, True], ids=["fork", "forkserver"])
def test_workers_end_with_a_parent_that_was_killed_and_that_nobody_waits_for(remote: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS.format(remote=remote)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
        # Not reaped: it stays as a zombie that has a process number.
        os.kill(process.pid, signal.SIGKILL)
        # Readable at its end, when the last process that could write has gone.
        assert select.select([process.stdout], [], [], 20)[0], "the workers live on"
        assert process.stdout.read() == b""
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
