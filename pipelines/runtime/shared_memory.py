"""Reusable shared-memory batches: worker processes fill them, the main process reads them.

A new allocation per batch costs a page fault every 4 kB, in the worker and in the main process: on
virtual machines up to a third of the decoding time.
"""

import mmap
import os
import shutil
import sys
import tempfile
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.sample import Uint8

WAITING = 4
"""Batches that each worker prefetches in training (DataLoader's prefetch_factor)."""
PLACES = WAITING + 2
"""Batches that fit into the memory of a worker: those prefetched, the one in use, and the next. If
more are held, as in prediction that draws overlays, the others are sent without shared memory."""
LARGE = 31 * 2**20
"""Bytes of an array just below the largest size that glibc adapts its threshold to."""


SHARED = Path("/dev/shm")  # noqa: S108 (not a temporary file: where Linux keeps shared memory)
MIN_FREE = 8 * 2**20
"""Bytes that must be free there: semaphores, and a batch of whole images that is on its way."""


def usable_workers(workers: int, num_bytes: int = 0) -> int:
    """Return the number of workers that shared memory allows: `workers`, or 0; prints why.

    Workers hand over batches and wait for semaphores in /dev/shm. Where it is missing, read-only or
    full they would crash or hang; this process then loads the batches itself.

    Args:
        workers: worker processes that are wanted.
        num_bytes: bytes of all batches that are sent through /dev/shm, as far as they are known.
    """
    if not workers or sys.platform != "linux":
        return workers
    problem, needed = "", max(MIN_FREE, num_bytes)
    try:
        with tempfile.TemporaryFile(dir=SHARED):
            free = shutil.disk_usage(SHARED).free
    except OSError as error:
        problem = f"cannot be written to ({error.strerror})"
    else:
        if free < needed:
            problem = f"has {free / 2**20:.1f} MiB free of {needed / 2**20:.1f} that workers need"
    if not problem:
        return workers
    report(problem)
    return 0


@cache
def report(problem: str) -> None:
    """Print once why there are no workers."""
    print(
        f"warning: {SHARED} {problem}: no worker processes, batches are loaded in ordinary memory; "
        "for speed, enlarge it (Docker: --shm-size 1g)",
        file=sys.stderr,
    )


class Buffers:
    """Places for batches in memory shared with forked workers.

    Args:
        num_workers: worker processes.
        num_bytes: size of a batch.
    """

    def __init__(self, num_workers: int, num_bytes: int) -> None:
        self.num_bytes, self.owner = num_bytes, os.getpid()
        self.memory = mmap.mmap(-1, num_workers * PLACES * num_bytes)
        self.taken = mmap.mmap(-1, num_workers * PLACES)

    def take(self, worker: int) -> int | None:
        """Take a free place of a worker; None if all are taken."""
        for place in range(worker * PLACES, (worker + 1) * PLACES):
            if not self.taken[place]:
                self.taken[place] = 1
                return place
        return None

    def array(self, place: int) -> Uint8:
        """Return the bytes of a place [num_bytes], for writing."""
        return np.frombuffer(self.memory, np.uint8, self.num_bytes, place * self.num_bytes)

    def lend(self, place: int) -> Tensor:
        """Return the bytes of a place [num_bytes]; released when no tensor shares them any more."""
        array = self.array(place)
        # Only the storage of the tensor, which its views share, holds a reference to the array.
        weakref.finalize(array, self.release, place).atexit = False
        return torch.from_numpy(array)

    def release(self, place: int) -> None:
        """Free a place; ignored in a child process that was forked with the tensor."""
        if os.getpid() == self.owner:
            self.taken[place] = 0


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse instead of returning it to the system.

    glibc maps and unmaps each array of up to 32 MiB until it has freed one of that size, which
    raises its threshold (mallopt(3), M_MMAP_THRESHOLD). Decoded images are such arrays. No effect
    with other allocators.
    """
    np.empty(LARGE, dtype=np.uint8)
