"""What starting on a device does to the process."""

import platform
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
