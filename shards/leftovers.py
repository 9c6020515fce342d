"""Leftovers of killed processes in /dev/shm and the temporary folder, removed by the next start.

Its name holds the machine (or container) and the process that owns it. Semaphores of worker
processes that are not forked have names until their process ends: eleven per killed command.
"""

import hashlib
import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from functools import cache
from multiprocessing import process, util
from pathlib import Path
from typing import Any

SHARED = Path("/dev/shm")  # noqa: S108 (not a temporary file: where Linux keeps shared memory)
PREFIX = "unet-"


@cache
def process_space() -> str:
    """Return 8 hex digits that differ between machines, their boots, and PID namespaces.

    Process ids are compared only within one of them.
    """
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def own_prefix() -> str:
    """Return the prefix of the names of what this process owns."""
    return f"{PREFIX}{process_space()}-{os.getpid()}-"


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Make a temporary folder that is removed by its `with` block, else by a later start."""
    return tempfile.TemporaryDirectory(prefix=own_prefix())


def name_semaphores() -> None:
    """Name the semaphores that `multiprocessing` makes in this process and its children."""
    if sys.platform == "linux":
        settings()["semprefix"] = f"/{own_prefix()[:-1]}"


def name_socket_folder() -> None:
    """Make the folder of the sockets of `multiprocessing`, where its fork server listens."""
    if settings().get("tempdir") is None:
        folder = tempfile.mkdtemp(prefix=own_prefix())
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        settings()["tempdir"] = folder


def settings() -> dict[str, Any]:
    """Return the settings of `multiprocessing` of this process, which its children inherit."""
    # Neither name can be chosen by a public function.
    return process.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]


def remove_leftovers() -> None:
    """Remove what dead processes of this program and user have left."""
    start = f"{PREFIX}{process_space()}-"
    for folder, before in ((SHARED, "sem."), (Path(tempfile.gettempdir()), "")):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(before + start):
                    remove_if_dead(entry, entry.name.removeprefix(before + start))


def remove_if_dead(entry: "os.DirEntry[str]", rest: str) -> None:
    """Remove a file or folder of this user whose name ends in `rest`: PID-RANDOM of a dead one."""
    pid, dash, _ = rest.partition("-")
    if not (dash and pid.isascii() and pid.isdecimal()) or is_alive(int(pid)):
        return
    # Another start may remove it at the same time.
    with suppress(OSError):
        if entry.stat(follow_symlinks=False).st_uid != os.getuid():
            return
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def is_alive(pid: int) -> bool:
    """Return whether a process exists, of whichever user."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
