"""What starting on a device does to the process."""

import os
import platform
import socket
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from pipelines.devices import hold_memory
hold_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere it does nothing")
def test_memory_of_one_forward_pass_serves_the_next() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    first, *later = map(int, done.stdout.split())
    # 128 MiB are 32,768 pages, unless those are huge. A block taken from the middle of what is
    # kept leaves too little beside it, so that the heap grows once or twice more.
    assert sum(later) < len(later) * first / 4


TIMEOUT = """
import sys, torch
from pipelines.devices import start
start(rank_timeout=float(sys.argv[1]))
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
print(group.options._timeout.total_seconds())
"""


@pytest.mark.ranks
@pytest.mark.parametrize("minutes", [0.5, 10])
def test_ranks_wait_for_each_other_as_long_as_they_are_told(minutes: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TIMEOUT, str(minutes)],
            env={
                **os.environ,
                "ACCELERATE_USE_CPU": "true",
                **{name: str(value) for name, value in about.items()},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [round(float(text)) for text in said] == [60 * minutes] * 2
