"""Independent pieces of work, side by side: in this process, in several, or on a Dask cluster."""

import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from pipelines.config import RunError, UsageError

T = TypeVar("T")
R = TypeVar("R")


def num_workers(wanted: int, num_pieces: int) -> int:
    """Processes for so many pieces of work; `wanted` 0 means one for each CPU."""
    if not wanted:
        # macOS has no affinity to ask for.
        alone = not hasattr(os, "sched_getaffinity")
        wanted = (os.cpu_count() or 1) if alone else len(os.sched_getaffinity(0))
    return max(1, min(wanted, num_pieces))


def follow_parent() -> None:
    """End this process when the one that started it was killed: nobody waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # A pipe, which closes even if nobody reaps the parent, and also behind a fork server.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def chunks(items: Sequence[T], workers: int, most: int = 64) -> list[Sequence[T]]:
    """Items in runs small enough that the processes end together."""
    size = max(1, min(most, len(items) // (8 * max(1, workers))))
    return [items[start : start + size] for start in range(0, len(items), size)]


def run_all(
    work: Callable[[T], R],
    pieces: Sequence[T],
    workers: int,
    *,
    scheduler: str | None = None,
    remote: bool = False,
) -> Iterator[tuple[T, R]]:
    """(piece, result) as they are done, in no order.

    Args:
        work: called with each piece; picklable, as are pieces and results.
        pieces: what is to be done.
        workers: processes; 1 works in this one.
        scheduler: address of a Dask scheduler, whose workers do it instead.
        remote: `work` talks to a remote store, whose client's threads do not survive a fork.
    """
    if workers <= 1 and scheduler is None:
        for piece in pieces:
            yield piece, work(piece)
        return
    with executor_of(workers, scheduler, remote) as executor:
        futures: dict[Future[R], T] = {executor.submit(work, piece): piece for piece in pieces}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except CancelledError as error:
            raise RunError(
                "the scheduler or its workers went away; the same command goes on"
            ) from error
        except BrokenProcessPool as error:
            raise RunError(
                "a working process was killed (out of memory?); the same command goes on"
            ) from error
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def executor_of(workers: int, scheduler: str | None, remote: bool) -> Iterator[Executor]:
    """Processes of this machine, or the workers of a Dask cluster."""
    if scheduler is None:
        method = "fork" if sys.platform == "linux" and not remote else "forkserver"
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(workers, context, follow_parent) as pool:
            yield pool
        return
    if not re.fullmatch(r"[a-z]+://.+:[0-9]+", scheduler):
        raise UsageError(f"--scheduler {scheduler} is no address such as tcp://host:8786")
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("--scheduler needs Dask: pip install 'unet-shards[dask]'") from error
    try:
        client = Client(scheduler, timeout=20, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"--scheduler {scheduler}: no scheduler answers there") from error
    with client:
        yield client.get_executor(pure=False)
