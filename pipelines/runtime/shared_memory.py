"""Memory that worker processes fill with images and the main process reads, again and again.

What is allocated anew for each batch costs a page fault every 4 kB, once in the worker and once in
the main process: on virtual machines as long as a third of the decoding.
"""

import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

from shards.sample import Uint8

WAITING = 4
"""Batches of each worker that are under way or ready in training (DataLoader's prefetch_factor)."""
PLACES = WAITING + 2
"""Batches that a worker has memory for: those, the one in use, and the one that is drawn next.
Where more are held, as in prediction that draws overlays, further ones travel as they are."""
LARGE = 31 * 2**20
"""Bytes of an array, just small enough for glibc to learn from it."""


class Buffers:
    """Places for batches in memory that this process shares with those it forks.

    Args:
        num_workers: processes that fill them.
        num_bytes: of one batch.
    """

    def __init__(self, num_workers: int, num_bytes: int) -> None:
        self.num_bytes, self.owner = num_bytes, os.getpid()
        self.memory = mmap.mmap(-1, num_workers * PLACES * num_bytes)
        self.taken = mmap.mmap(-1, num_workers * PLACES)

    def take(self, worker: int) -> int | None:
        """A free place of a worker, which is then taken; None where there is none."""
        for place in range(worker * PLACES, (worker + 1) * PLACES):
            if not self.taken[place]:
                self.taken[place] = 1
                return place
        return None

    def array(self, place: int) -> Uint8:
        """The bytes of a place [num_bytes], to be filled."""
        return np.frombuffer(self.memory, np.uint8, self.num_bytes, place * self.num_bytes)

    def lend(self, place: int) -> Tensor:
        """The bytes of a place [num_bytes], free again when no tensor shares them any more."""
        array = self.array(place)
        # The tensor's storage, which its views share, holds the array and nobody else does.
        weakref.finalize(array, self.release, place).atexit = False
        return torch.from_numpy(array)

    def release(self, place: int) -> None:
        """Let a place be taken again; not from a child that was forked with the tensor."""
        if os.getpid() == self.owner:
            self.taken[place] = 0


def keep_freed_memory() -> None:
    """Let this process use freed memory again that it would otherwise give back, page by page.

    glibc takes up to 32 MiB from the system for each large array, and returns them, until it has
    seen an array of that size come and go (mallopt(3), M_MMAP_THRESHOLD); elsewhere nothing
    happens. Decoded images are such arrays.
    """
    np.empty(LARGE, dtype=np.uint8)
