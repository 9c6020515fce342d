"""The life of a DataLoader's worker processes: started, signalled, ended."""

import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running

from pipelines.runtime.processes import follow_parent
from shards.reader import ShardReader

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save and end; they may be sent to all its processes."""


def start_worker(number: int) -> None:
    """Leave it to the trainer to end worker `number`, and end with it if it is killed."""
    del number
    # In a group of its own, so that what is sent to the run's group does not reach it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    follow_parent()


def start_forkserver() -> None:
    """Start the process that remote workers are forked from, deaf to the same signals."""
    get_context("forkserver").set_forkserver_preload(["pipelines.loading.batches"])
    before = {name: signal.signal(name, signal.SIG_IGN) for name in STOPPING}
    try:
        ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def start_method(reader: ShardReader) -> str | None:
    """How workers are started; None: as the platform does."""
    if reader.store.local is None:
        # The threads and connections of remote clients do not survive a fork.
        return "forkserver"
    return "fork" if sys.platform == "linux" else None
