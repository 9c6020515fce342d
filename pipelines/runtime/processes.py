"""Run independent tasks in this process, in a process pool, or on a Dask cluster."""

import multiprocessing
import os
import pickle
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import pipelines
from pipelines.runtime.errors import RunError, UsageError
from shards.images.memory import share_memory
from shards.leftovers import name_socket_folder

SHARED = "/dev/shm"  # noqa: S108 (not a temporary file: where Linux keeps shared memory)
LAUNCHER_INTERVAL = 1.0
"""Seconds between checks that the launcher still runs."""
T = TypeVar("T")
R = TypeVar("R")


def num_workers(wanted: int, num_tasks: int) -> int:
    """Number of processes for `num_tasks` tasks; `wanted` 0: one per CPU."""
    if not wanted:
        # macOS has no CPU affinity.
        has_affinity = hasattr(os, "sched_getaffinity")
        wanted = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(wanted, num_tasks))


def refuse_negative_workers(workers: int) -> None:
    """Raise ValueError if `workers` is negative."""
    if workers < 0:
        raise ValueError(f"--workers must be >= 0, got {workers}")


def follow_parent() -> None:
    """Exit this process when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # It waits on a pipe, which closes even if nobody reaps the parent, also under forkserver.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def follow_launcher(name: str) -> None:
    """Exit this rank, called `name` in the message, when its launcher is killed.

    Nothing else ends it: signals and failures of other ranks reach it through the launcher, and it
    would keep its devices and the lock of its run folder. No effect without a launcher.
    """
    # Not ACCELERATE_MIXED_PRECISION, which users set without a launcher too.
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & {*os.environ}:
        return
    process, parent = pipelines.IMPORTED_BY
    if process != os.getpid():
        # Forked after the import.
        parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LAUNCHER_INTERVAL)
        # A pipe that nobody reads must not delay the exit.
        if select.select([], [2], [], 0)[1]:
            with suppress(OSError):
                os.write(2, f"{name}: the launcher was killed; rerun its command\n".encode())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def chunks(items: Sequence[T], workers: int, max_size: int = 64) -> list[Sequence[T]]:
    """Cut items into chunks small enough that all processes finish at about the same time."""
    size = max(1, min(max_size, len(items) // (8 * max(1, workers))))
    return [items[start : start + size] for start in range(0, len(items), size)]


def run_all(
    function: Callable[[T], R],
    tasks: Sequence[T],
    workers: int,
    *,
    scheduler: str | None = None,
    remote: bool = False,
) -> Iterator[tuple[T, R]]:
    """Yield (task, result) as tasks finish, in no particular order.

    Args:
        function: called with each task; picklable, as are tasks and results.
        tasks: arguments of the calls.
        workers: processes; 1: run in this process.
        scheduler: address of a Dask scheduler whose workers run the tasks instead.
        remote: `function` uses a remote store, whose client threads do not survive a fork.

    Raises:
        UsageError: the scheduler is unreachable, or Dask is not installed.
        RunError: a worker process or the scheduler died.
    """
    if workers <= 1 and scheduler is None:
        for task in tasks:
            yield task, function(task)
        return
    with open_executor(workers, scheduler, remote) as executor:
        call = partial(call_task, function)
        futures: dict[Future[R], T] = {}
        try:
            # Submitting fails too, if a worker is killed while it starts.
            futures.update((executor.submit(call, task), task) for task in tasks)
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except CancelledError as error:
            raise RunError(
                "lost the Dask scheduler or its workers; rerun the same command to resume"
            ) from error
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process was killed (out of memory?); rerun the same command to resume"
            ) from error
        finally:
            for future in futures:
                future.cancel()


def call_task(function: Callable[[T], R], task: T) -> R:
    """Call a function in a worker process; its exceptions reach the parent whatever their class.

    An exception that cannot be unpickled would break the pool, as a killed process does.
    """
    try:
        return function(task)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
        except Exception:  # a class decides itself how it is pickled
            what = " ".join(str(error).split())
            raise RunError(f"a worker failed: {type(error).__name__}: {what}") from None
        raise


@contextmanager
def open_executor(workers: int, scheduler: str | None, remote: bool) -> Iterator[Executor]:
    """Open a process pool, or connect to a Dask cluster. Raises UsageError if it cannot."""
    if scheduler is None:
        method = "fork" if sys.platform == "linux" and not remote else "forkserver"
        if method == "forkserver":
            name_socket_folder()
        context = multiprocessing.get_context(method)
        share_memory(workers)
        try:
            pool = ProcessPoolExecutor(workers, context, follow_parent)
        except OSError as error:
            # Its queues have semaphores there.
            raise RunError(
                f"{SHARED} cannot be used by worker processes ({error.strerror}); mount or enlarge "
                "it (Docker: --shm-size 1g), or add --workers 1"
            ) from error
        with pool:
            yield pool
        return
    if not re.fullmatch(r"[a-z]+://.+:[0-9]+", scheduler):
        raise UsageError(f"--scheduler {scheduler} is not an address such as tcp://host:8786")
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError("--scheduler needs Dask: pip install 'unet-shards[dask]'") from error
    try:
        client = Client(scheduler, timeout=20, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: no answer; is the scheduler running?"
        ) from error
    with client:
        yield client.get_executor(pure=False)
