"""Start DataLoader workers that neither outlive a killed trainer nor die unnoticed."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from typing import Any, TypeVar

from torch.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from pipelines.runtime.processes import follow_parent
from shards.leftovers import name_socket_folder
from shards.reader import ShardReader

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to checkpoint and exit; schedulers may send them to all its processes."""
DEATH_SECONDS = 0.2
"""Seconds between the loss of a worker's memory and its exit status."""
T = TypeVar("T")
# Torch has no public name for it.
raise_for_dead_workers = signal_handling._error_if_any_worker_fails  # pyright: ignore[reportPrivateImportUsage]


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
    name_socket_folder()
    get_context("forkserver").set_forkserver_preload(["pipelines.loading.batches"])
    before = {name: signal.signal(name, signal.SIG_IGN) for name in STOPPING}
    try:
        ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers of a loader. Its batches must be drawn through `watch_workers`."""
    # Torch's handler of SIGCHLD raises wherever the main thread happens to be: in a constructor, an
    # import or a finaliser, where Python prints a traceback or the process hangs.
    signal_handling._SIGCHLD_handler_set = True
    # The first such block imports modules, which the exception about a killed worker would break.
    with record_function("start_workers"):
        return iter(loader)


def watch_workers(batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches. Raises RuntimeError at the next one if a worker was killed."""
    while True:
        with report_killed_workers():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (EOFError, OSError):
                # A batch may refer to memory that its worker took with it, moments before its
                # parent can wait for it.
                time.sleep(DEATH_SECONDS)
                raise_for_dead_workers()
                raise
        yield batch


@contextmanager
def report_killed_workers() -> Iterator[None]:
    """Raise RuntimeError in this block if a worker was killed before or is killed now.

    Without a signal, waiting for the rest of a batch that a killed worker sent in part never ends.
    """
    if threading.current_thread() is not threading.main_thread():
        raise_for_dead_workers()
        yield
        return
    before = signal.signal(signal.SIGCHLD, lambda *_: raise_for_dead_workers())
    try:
        raise_for_dead_workers()
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def start_method(reader: ShardReader) -> str | None:
    """Return the start method of workers; None: the default of the platform."""
    if reader.store.local is None:
        # The threads and connections of remote clients do not survive a fork.
        return "forkserver"
    return "fork" if sys.platform == "linux" else None
