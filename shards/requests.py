"""Requests to remote file systems: bounded in time, retried, with errors of one line."""

import errno
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from shards.sample import DataError

REMOTE_TIMEOUT = 60.0
"""Default number of seconds for a request with all its retries."""
VARIABLE = "UNET_REMOTE_TIMEOUT"
"""Environment variable with that number, which worker processes inherit."""
RETRY_DELAYS = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Seconds to wait before a failed request is retried; half of each is random."""
UPLOAD_RATE = 2**18
"""Bytes per second below which an upload counts as stalled."""
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
"""Errors that are not retried, like an OSError with EINVAL, which S3 returns for wrong ranges."""

T = TypeVar("T")


def set_remote_timeout(seconds: float) -> None:
    """Set `--remote-timeout` for this process and those that it starts.

    Raises ValueError unless it is a number above 0.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"--remote-timeout must be a number of seconds > 0, got {seconds}")
    os.environ[VARIABLE] = str(seconds)


def remote_timeout() -> float:
    """Return the seconds that a request may take."""
    return float(os.environ.get(VARIABLE, REMOTE_TIMEOUT))


def retry(request: Callable[[], T], timeout: float) -> T:
    """Return the result of `request`; errors that may be temporary are retried with backoff.

    All attempts together take at most `timeout` seconds, each at most half of them: a connection
    that is never answered leaves time for another.
    """
    deadline = time.monotonic() + timeout
    for delay in (*RETRY_DELAYS, None):
        try:
            remaining = deadline - time.monotonic()
            return finish_within(request, min(timeout / 2, remaining), timeout)
        except PERMANENT_ERRORS:
            raise
        except Exception as error:  # each client library has its own exceptions
            if delay is None or getattr(error, "errno", None) == errno.EINVAL:
                raise
            pause = random.uniform(delay / 2, delay)  # noqa: S311 (jitter, not a secret)
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def finish_within(request: Callable[[], T], seconds: float, timeout: float) -> T:
    """Return the result of `request`, or raise TimeoutError naming `timeout` after `seconds`.

    The request runs in a thread, which is abandoned if it is late: clients have timeouts of their
    own, some of minutes for each of many retries, and some none.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(request())
        except BaseException as error:  # raised again in the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if results:
        return results[0]
    if errors:
        raise errors[0]
    raise TimeoutError(f"no answer within --remote-timeout {timeout:g}")


@contextmanager
def wrap_store_errors(where: str) -> Iterator[None]:
    """Convert the exceptions of a remote file system to DataError, or to FileNotFoundError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        # Each client has its own wording.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from error
    except Exception as error:  # each client library has its own exceptions
        raise unreachable_error(where, error) from error


def unreachable_error(where: str, error: Exception) -> DataError:
    """Return a DataError with the exception of a remote file system in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{where}: {reason}; check address, credentials and network, then rerun the same command "
        "to resume"
    )
