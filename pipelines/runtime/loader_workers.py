"""Start DataLoader workers so that signals and a killed trainer do not leave them behind."""

import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running

from pipelines.runtime.processes import follow_parent
from shards.reader import ShardReader

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to checkpoint and exit; schedulers may send them to all its processes."""


def start_worker(number: int) -> None:
    """Initialise worker `number`: ignore the stop signals of the run and exit with the trainer."""
    del number
    # In its own process group, which signals to the group of the run do not reach.
    os.setpgid(0, 0)
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    follow_parent()


def start_forkserver() -> None:
    """Start the server that remote workers are forked from; it ignores the stop signals too."""
    get_context("forkserver").set_forkserver_preload(["pipelines.loading.batches"])
    before = {name: signal.signal(name, signal.SIG_IGN) for name in STOPPING}
    try:
        ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def start_method(reader: ShardReader) -> str | None:
    """Return the start method of workers; None: the default of the platform."""
    if reader.store.local is None:
        # The threads and connections of remote clients do not survive a fork.
        return "forkserver"
    return "fork" if sys.platform == "linux" else None
